"""A compressed folder → a state dict, or an ordinary dense checkpoint, one tensor at a time."""

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from miracle_hub.code import FORMAT_VERSION, MAX_STAGES, QUANT_METHOD
from miracle_hub.codec.artifact import (
    raw_bytes,
    read_config,
    read_quantization,
    repository_digest,
    shard_entries,
    write_index,
)
from miracle_hub.codec.source import (
    SourceTensor,
    companion_files,
    file_metadata,
    item_bits,
    list_tensors,
    weight_files,
)
from miracle_hub.codec.stages import check_stages, decode_stages, index_name, stage_of
from miracle_hub.codec.tensor import TORCH_DTYPES
from miracle_hub.coding.backend import Backend, choose
from miracle_hub.errors import ChecksumError, FormatError, UnsupportedVersionError
from miracle_hub.files.container import Entry, files_kept_open, write_file
from miracle_hub.files.whole import output_folder, refuse_overlap, writing
from miracle_hub.format.payload import Header, decode_header, is_payload
from miracle_hub.options import parse_size


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a compressed file: a payload (`header` is set) or a plain tensor."""

    stored: SourceTensor
    header: Header | None
    dtype: str
    shape: tuple[int, ...]
    refinements: tuple["StoredTensor", ...] = ()

    def load(self, *, verify: bool = True, backend: Backend | str = "auto") -> Tensor:
        """The tensor in its source dtype and shape; a payload's, on the backend's device.

        Raises:
            FormatError: and its subclasses, when the payload is not sound.
        """
        tensor = self.stored.load()
        if self.header is not None:
            later = [refinement.stored.load() for refinement in self.refinements]
            return decode_stages(tensor, later, self.stored.name, verify=verify, backend=backend)
        return tensor.to(TORCH_DTYPES[self.dtype]) if self.dtype in TORCH_DTYPES else tensor

    @property
    def n_weights(self) -> int:
        return torch.Size(self.shape).numel()


def stored_tensors(path: Path, stages: int | None = None) -> list[StoredTensor]:
    """Every tensor of a compressed folder or file; payload headers are read and checked.

    Args:
        stages: of a folder, how many to read; None means all.

    Raises:
        FormatError: and its subclasses: a file is not sound; the message names the tensor.
        OptionError: the folder has not so many stages.
    """
    if path.is_file():
        return tensors_of([path])
    _check_version(path)
    digests = read_stage_digests(path)
    stages = check_stages(stages, len(digests), str(path))
    tensors = tensors_of(weight_files(path, index_name(stages, len(digests))))
    _check_digest(path, tensors, digests[stages - 1])
    return tensors


@files_kept_open()
def tensors_of(files: list[Path]) -> list[StoredTensor]:
    """The tensors of files that belong together, with their refinements.

    Raises:
        FormatError: and its subclasses: a file is not sound; the message names the tensor.
    """
    narrowed = {file: _narrowed(file) for file in files}
    return joined_stages([_stored(tensor, narrowed[tensor.path]) for tensor in list_tensors(files)])


def joined_stages(tensors: list[StoredTensor]) -> list[StoredTensor]:
    """Refinements, which are entries of their own, with the tensors that they refine.

    Raises:
        FormatError: a refinement is that of no tensor, or is not sound.
    """
    by_name = {tensor.stored.name: tensor for tensor in tensors if stage_of(tensor.stored.path) == 1}
    later = sorted((t for t in tensors if stage_of(t.stored.path) > 1), key=lambda t: stage_of(t.stored.path))
    for tensor in later:
        stage = stage_of(tensor.stored.path)
        name = tensor.stored.name.removesuffix(f".stage_{stage}")
        base = by_name.get(name)
        fits = base is not None and base.header is not None and tensor.header is not None
        if base is None or not fits or len(base.refinements) != stage - 2 or base.shape != tensor.shape:
            raise FormatError(
                f"{tensor.stored.path}: {tensor.stored.name}: expected a payload that refines what stages 1 "
                f"to {stage - 1} hold, of the same shape, found one of shape {list(tensor.shape)} for "
                f"{base and list(base.shape)}; a file is missing or from elsewhere: download it again"
            )
        by_name[name] = replace(base, refinements=(*base.refinements, tensor))
    return list(by_name.values())


def stored_digest(tensors: list[StoredTensor]) -> str:
    """The digest of a repository, as its headers promise it."""
    parts = [part for tensor in tensors for part in (tensor, *tensor.refinements)]
    return repository_digest({p.stored.name: p.header.digest for p in parts if p.header is not None})


@files_kept_open()
def load_state_dict(
    path: str | Path, *, verify: bool = True, backend: str = "auto", stages: int | None = None
) -> dict[str, Tensor]:
    """All tensors of a compressed folder or file, dense, in their source dtypes.

    Args:
        path: a local folder, or one safetensors file.
        verify: compare the digests in the file with those of what was decoded.
        backend: who decodes: "cpu", "triton", or "auto" for a GPU where there is one. The state dict is
            on the CPU in any case.
        stages: of a folder, how many to decode; None means all.

    Raises:
        FormatError: and its subclasses: the file is not sound; the message names the tensor.
        MissingWeightsError: there is no safetensors file.
        BackendError: the backend cannot run here.
        OptionError: there are not so many stages.
    """
    chosen = choose(backend)
    tensors = stored_tensors(Path(path), stages)
    return {t.stored.name: t.load(verify=verify, backend=chosen).cpu() for t in tensors}


@files_kept_open()
def decompress_folder(
    source: Path,
    out: Path,
    *,
    max_shard_size: str | int,
    overwrite: bool,
    progress: bool,
    backend: str = "auto",
    stages: int | None = None,
) -> int:
    """Write an ordinary checkpoint; returns its bytes. See `miracle_hub.decompress`."""
    refuse_overlap(source, out)
    chosen = choose(backend)
    tensors = {tensor.stored.name: tensor for tensor in stored_tensors(source, stages)}
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
        n_bytes = sum(path.stat().st_size for path in temporary.rglob("*.safetensors"))
    return n_bytes


def _write_dense_config(source: Path, target: Path) -> None:
    config = read_config(source)
    if read_quantization(source).get("quant_method") == QUANT_METHOD:
        del config["quantization_config"]
        config.pop("stages", None)
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
    if facts.get("quant_method") == QUANT_METHOD and found not in range(1, FORMAT_VERSION + 1):
        raise UnsupportedVersionError(
            f"{folder / 'config.json'}: this miracle-hub reads format versions up to {FORMAT_VERSION}, found "
            f"{found}; upgrade: pip install -U miracle-hub"
        )


def read_stage_digests(folder: Path) -> list[str | None]:
    """The digest of the first n stages for every n, as config.json has it; one None where it has none.

    Raises:
        FormatError: there is no such list where there should be one.
    """
    facts = read_quantization(folder)
    if facts.get("quant_method") != QUANT_METHOD:
        return [None]
    digests = facts.get("stage_digests", [facts.get("digest")])
    if not isinstance(digests, list) or not 1 <= len(digests) <= MAX_STAGES:
        raise FormatError(
            f"{folder / 'config.json'}: stage_digests: expected a list of 1 to {MAX_STAGES} digests, found "
            f"{str(digests)[:80]!r}; download it again"
        )
    return digests


def _check_digest(folder: Path, tensors: list[StoredTensor], expected: str | None) -> None:
    """Compare with config.json: finds payloads that were lost, renamed or hidden by a damaged magic."""
    if expected is None or expected == (found := stored_digest(tensors)):
        return
    names = [t.stored.name for t in tensors if t.header is None and t.dtype == "U8" and len(t.shape) == 1]
    suspects = f"; not compressed, though they look it: {', '.join(names[:4])}" if names else ""
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
    except (ValueError, RecursionError):
        names = None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise FormatError(
            f"{file}: metadata narrowed_from_F32: expected '*' or a JSON list of names, found "
            f"{text[:80]!r}; the file is damaged: download it again"
        )
    return set(names)
