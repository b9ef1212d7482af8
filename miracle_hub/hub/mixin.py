"""`MiracleHubMixin`: small networks that are pushed and loaded in the manner of PyTorchModelHubMixin."""

from pathlib import Path
from typing import Any

from huggingface_hub import PyTorchModelHubMixin, hf_hub_download
from huggingface_hub.constants import SAFETENSORS_SINGLE_FILE
from torch import nn

from miracle_hub.hub.variational import load, save


class MiracleHubMixin(PyTorchModelHubMixin):
    """For `class Net(nn.Module, MiracleHubMixin)`: a coded network saves as one small file and loads from it.

    `save_pretrained` and `push_to_hub` need a network that `make_variational` and `code_model` went over;
    `from_pretrained` gives an ordinary dense one. Arguments of `__init__` go through config.json, as in
    huggingface_hub.
    """

    def _save_pretrained(self, save_directory: Path) -> None:
        """
        Raises:
            OptionError: the network is not coded.
        """
        assert isinstance(self, nn.Module)
        save(self, save_directory / SAFETENSORS_SINGLE_FILE)

    @classmethod
    def _from_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride]
        cls,
        *,
        model_id: str,
        revision: str | None,
        cache_dir: str | Path | None,
        force_download: bool,
        local_files_only: bool,
        token: str | bool | None,
        map_location: str = "cpu",
        strict: bool = False,
        **model_kwargs: Any,
    ) -> Any:
        """
        Raises:
            FormatError: and its subclasses: the file is not sound, or is that of another module.
        """
        model = cls(**model_kwargs)
        local = Path(model_id) / SAFETENSORS_SINGLE_FILE
        path = local if local.exists() else hf_hub_download(
            repo_id=model_id, filename=SAFETENSORS_SINGLE_FILE, revision=revision, cache_dir=cache_dir,
            force_download=force_download, token=token, local_files_only=local_files_only,
        )  # fmt: skip
        assert isinstance(model, nn.Module)
        return load(path, model).to(map_location).eval()
