"""A compressed folder → a state dict, or an ordinary dense checkpoint, one tensor at a time."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from miracle_hub.codec.artifact import (
    parse_size,
    raw_bytes,
    read_config,
    read_quantization,
    repository_digest,
    shard_entries,
    write_index,
)
from miracle_hub.codec.folder import output_folder, refuse_overlap
from miracle_hub.codec.source import (
    SourceTensor,
    companion_files,
    file_metadata,
    item_bits,
    list_tensors,
    weight_files,
)
from miracle_hub.codec.tensor import TORCH_DTYPES, decode_payload
from miracle_hub.coding.backend import Backend, choose
from miracle_hub.config import FORMAT_VERSION, QUANT_METHOD
from miracle_hub.errors import ChecksumError, FormatError, UnsupportedVersionError
from miracle_hub.format.container import Entry, write_file, writing
from miracle_hub.format.payload import Header, decode_header, is_payload


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a compressed file: a payload (`header` is set) or a plain tensor."""

    stored: SourceTensor
    header: Header | None
    dtype: str
    shape: tuple[int, ...]

    def load(self, *, verify: bool = True, backend: Backend | str = "auto") -> Tensor:
        """The tensor in its source dtype and shape; a payload's, on the backend's device.

        Raises:
            FormatError: and its subclasses, when the payload is not sound.
        """
        tensor = self.stored.load()
        if self.header is not None:
            return decode_payload(tensor, self.stored.name, verify=verify, rounded=True, backend=backend)[0]
        return tensor.to(TORCH_DTYPES[self.dtype]) if self.dtype in TORCH_DTYPES else tensor

    @property
    def n_weights(self) -> int:
        return torch.Size(self.shape).numel()


def stored_tensors(path: Path) -> list[StoredTensor]:
    """Every tensor of a compressed folder or file; payload headers are read and checked.

    Raises:
        FormatError: and its subclasses: a file is not sound; the message names the tensor.
    """
    if path.is_dir():
        _check_version(path)
    files = [path] if path.is_file() else weight_files(path)
    narrowed = {file: _narrowed(file) for file in files}
    tensors = [_stored(tensor, narrowed[tensor.path]) for tensor in list_tensors(files)]
    if path.is_dir():
        _check_digest(path, tensors)
    return tensors


def stored_digest(tensors: list[StoredTensor]) -> str:
    """The digest of a repository, as its headers promise it."""
    return repository_digest({t.stored.name: t.header.digest for t in tensors if t.header is not None})


def load_state_dict(path: str | Path, *, verify: bool = True, backend: str = "auto") -> dict[str, Tensor]:
    """All tensors of a compressed folder or file, dense, in their source dtypes.

    Args:
        path: a local folder, or one safetensors file.
        verify: compare the digests in the file with those of what was decoded.
        backend: who decodes: "cpu", "triton", or "auto" for a GPU where there is one. The state dict is
            on the CPU in any case.

    Raises:
        FormatError: and its subclasses: the file is not sound; the message names the tensor.
        MissingWeightsError: there is no safetensors file.
        BackendError: the backend cannot run here.
    """
    chosen = choose(backend)
    tensors = stored_tensors(Path(path))
    return {t.stored.name: t.load(verify=verify, backend=chosen).cpu() for t in tensors}


def decompress_folder(
    source: Path,
    out: Path,
    *,
    max_shard_size: str | int,
    overwrite: bool,
    progress: bool,
    backend: str = "auto",
) -> int:
    """Write an ordinary checkpoint; returns its bytes. See `miracle_hub.decompress`."""
    refuse_overlap(source, out)
    chosen = choose(backend)
    tensors = {tensor.stored.name: tensor for tensor in stored_tensors(source)}
    entries = [_dense_entry(tensor) for tensor in tensors.values()]
    entries.sort(key=lambda entry: -item_bits(entry.dtype))  # keeps them aligned
    files = shard_entries(entries, parse_size(max_shard_size, "max_shard_size"))
    with output_folder(out, overwrite) as temporary:
        for relative in companion_files(source, weight_files(source)):
            with writing(temporary / relative):
                (temporary / relative).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source / relative, temporary / relative)
        total = sum(tensor.n_weights for tensor in tensors.values())
        with tqdm(
            total=total, unit="weights", unit_scale=True, desc="decompress", disable=not progress
        ) as bar:

            def data(entry: Entry) -> bytes:
                bar.update(tensors[entry.name].n_weights)
                return raw_bytes(tensors[entry.name].load(backend=chosen).cpu())

            for file in files:
                write_file(temporary / file.name, file.entries, {"format": "pt"}, data)
        if len(files) > 1:
            write_index(temporary, files)
        _write_dense_config(source, temporary)
    return sum(path.stat().st_size for path in out.rglob("*.safetensors"))


def _write_dense_config(source: Path, target: Path) -> None:
    config = read_config(source)
    if read_quantization(source).get("quant_method") == QUANT_METHOD:
        del config["quantization_config"]
        with writing(target / "config.json"):
            (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _dense_entry(tensor: StoredTensor) -> Entry:
    n_bytes = tensor.n_weights * item_bits(tensor.dtype) // 8
    return Entry(tensor.stored.name, tensor.dtype, tensor.shape, n_bytes)


def _stored(tensor: SourceTensor, narrowed: set[str] | None) -> StoredTensor:
    """`narrowed` None means every F16 tensor was F32."""
    if tensor.dtype == "U8" and len(tensor.shape) == 1:
        data = tensor.load().numpy().tobytes()
        if is_payload(data):
            header, _ = decode_header(data, tensor.name)
            return StoredTensor(tensor, header, header.dtype, header.shape)
    was_float32 = tensor.dtype == "F16" and (narrowed is None or tensor.name in narrowed)
    return StoredTensor(tensor, None, "F32" if was_float32 else tensor.dtype, tensor.shape)


def _check_version(folder: Path) -> None:
    facts = read_quantization(folder)
    found = facts.get("format_version", FORMAT_VERSION)
    if facts.get("quant_method") == QUANT_METHOD and found != FORMAT_VERSION:
        raise UnsupportedVersionError(
            f"{folder / 'config.json'}: this miracle-hub reads format version {FORMAT_VERSION}, found "
            f"{found}; upgrade: pip install -U miracle-hub"
        )


def _check_digest(folder: Path, tensors: list[StoredTensor]) -> None:
    """Compare with config.json: finds payloads that were lost, renamed or hidden by a damaged magic."""
    facts = read_quantization(folder)
    expected = facts.get("digest") if facts.get("quant_method") == QUANT_METHOD else None
    if expected is None or expected == (found := stored_digest(tensors)):
        return
    names = [t.stored.name for t in tensors if t.header is None and t.dtype == "U8" and len(t.shape) == 1]
    suspects = f"; not compressed, though they look it: {', '.join(names)}" if names else ""
    raise ChecksumError(
        f"{folder}: config.json promises compressed tensors of digest {expected}, found {found}{suspects}; "
        "tensors are damaged, missing or from another version: download the folder again"
    )


def _narrowed(file: Path) -> set[str] | None:
    text = file_metadata(file).get("narrowed_from_F32", "[]")
    if text == "*":
        return None
    try:
        names = json.loads(text)
    except ValueError:
        names = None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise FormatError(
            f"{file}: metadata narrowed_from_F32: expected '*' or a JSON list of names, found "
            f"{text[:80]!r}; the file is damaged: download it again"
        )
    return set(names)
