"""A compressed folder → a state dict, or an ordinary dense checkpoint, one tensor at a time."""

import shutil
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from miracle_hub.codec.config import write_dense_config
from miracle_hub.codec.dtypes import raw_bytes
from miracle_hub.codec.naming import STREAM, WEIGHTS_ENDING
from miracle_hub.codec.repository import open_repository, sharded, write_indices
from miracle_hub.codec.source import companion_files, weight_files
from miracle_hub.codec.stored import StoredTensor
from miracle_hub.coding.backend import choose
from miracle_hub.errors import FormatError
from miracle_hub.files.container import files_kept_open
from miracle_hub.files.whole import output_folder, refuse_overlap, writing
from miracle_hub.format import network
from miracle_hub.format.spec import TensorSpec, item_bits
from miracle_hub.options import parse_size


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
    tensors = open_repository(Path(path), stages).tensors
    _refuse_stream(tensors)
    return {tensor.name: tensor.load(verify=verify, backend=chosen).cpu() for tensor in tensors}


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
    repository = open_repository(source, stages)
    _refuse_stream(repository.tensors)
    tensors = {tensor.name: tensor for tensor in repository.tensors}
    files = sharded(_dense_entries(tensors.values()), parse_size(max_shard_size, "max_shard_size"), guard="")
    total = sum(tensor.n_weights for tensor in tensors.values())
    with output_folder(out, overwrite) as temporary:
        _copy_companions(source, temporary)
        with tqdm(
            total=total, unit="weights", unit_scale=True, desc="decompress", disable=not progress
        ) as bar:

            def data(entry: TensorSpec) -> bytes:
                bar.update(entry.n_weights)
                return raw_bytes(tensors[entry.name].load(backend=chosen).cpu())

            for file in files:
                file.write(temporary, data)
        write_indices(temporary, [files])
        write_dense_config(source, temporary)
        return sum(path.stat().st_size for path in temporary.rglob(f"*{WEIGHTS_ENDING}"))


def _refuse_stream(tensors: Iterable[StoredTensor]) -> None:
    """A network's stream has no names of tensors: handed out as one, it would be bytes for weights.

    Raises:
        FormatError: there is one.
    """
    for tensor in tensors:
        part = tensor.parts[0]
        if tensor.name != STREAM or not (part.dtype == "U8" and len(part.shape) == 1):
            continue
        if bytes(part.head(len(network.MAGIC)).tolist()) == network.MAGIC:
            raise FormatError(
                f"{part.path}: expected tensors by name, found a network's stream, whose names and shapes "
                "are its module's; read it with miracle_hub.load(path, module)"
            )


def _copy_companions(source: Path, target: Path) -> None:
    for relative in companion_files(source, weight_files(source)):
        with writing(target / relative):
            (target / relative).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / relative, target / relative)


def _dense_entries(tensors: Iterable[StoredTensor]) -> list[TensorSpec]:
    """Widest first, which keeps them aligned."""
    entries = [TensorSpec(tensor.name, tensor.dtype, tensor.shape) for tensor in tensors]
    return sorted(entries, key=lambda entry: -item_bits(entry.dtype))
