"""A folder or a Hub id → a local folder."""

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from miracle_hub.errors import SourceError

# Everything a repository needs besides other copies of its weights.
_IGNORED = ["*.bin", "*.h5", "*.msgpack", "*.onnx", "*.gguf", "*.ot", "*.pt", "*.pth", "*.ckpt"]
_IGNORED += ["onnx/*", "openvino/*", "coreml/*", "*.tflite", "*.mlmodel"]


def local_folder(source: str | Path, revision: str | None = None) -> Path:
    """The folder itself, or a snapshot of the Hub repository of that id.

    Raises:
        SourceError: there is neither such a folder nor such a repository.
    """
    path = Path(source)
    if path.exists():
        return path
    try:
        return Path(snapshot_download(str(source), revision=revision, ignore_patterns=_IGNORED))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise SourceError(
            f"{source}: expected a local folder or a Hub repository id, found neither "
            f"({type(error).__name__}: {first_line}); check the spelling, or log in with `hf auth login` "
            "if the repository is private"
        ) from error
