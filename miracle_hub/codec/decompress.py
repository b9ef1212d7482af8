"""A compressed folder → a state dict, or an ordinary dense checkpoint, one tensor at a time."""

from collections.abc import Iterable
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from miracle_hub.codec.companions import of_repository
from miracle_hub.codec.config import write_dense_config
from miracle_hub.codec.detector import TO_DECODE, require
from miracle_hub.codec.dtypes import raw_bytes
from miracle_hub.codec.naming import STREAM, WEIGHTS_ENDING
from miracle_hub.codec.payloads import has_magic
from miracle_hub.codec.repository import open_repository, sharded, write_indices
from miracle_hub.codec.source import stem_in, weight_files
from miracle_hub.codec.stored import StoredTensor
from miracle_hub.coding.backend import choose
from miracle_hub.errors import FormatError
from miracle_hub.files.container import files_kept_open
from miracle_hub.files.whole import output_folder, refuse_overlap
from miracle_hub.format.spec import TensorSpec, item_bits
from miracle_hub.options import DecompressOptions
from miracle_hub.sizes import parse_size


@files_kept_open()
def load_state_dict(
    path: str | Path,
    *,
    verify: bool = True,
    backend: str = "auto",
    stages: int | None = None,
    base: Path | None = None,
) -> dict[str, Tensor]:
    """All tensors of a compressed folder or file, dense, in their source dtypes.

    Args:
        path: a local folder, or one safetensors file.
        verify: compare the digests in the file with those of what was decoded.
        backend: who decodes: "cpu", "triton", or "auto" for a GPU where there is one. The state dict is
            on the CPU in any case.
        stages: of a folder, how many to decode; None means all.
        base: of a repository that has a base, a folder with it; None means the one that it names.

    Raises:
        FormatError: and its subclasses: the file is not sound; the message names the tensor.
        SourceKindError: it is another kind of model. PickleRefusedError: its weights are pickle.
        MissingWeightsError: there is no safetensors file.
        BackendError: the backend cannot run here.
        OptionError: there are not so many stages.
    """
    require(Path(path), TO_DECODE)
    chosen = choose(backend)
    tensors = open_repository(Path(path), stages, base).tensors
    _refuse_stream(tensors)
    return {tensor.name: tensor.load(verify=verify, backend=chosen).cpu() for tensor in tensors}


@files_kept_open()
def decompress_folder(
    source: Path,
    out: Path,
    options: DecompressOptions,
    base: Path | None = None,
) -> int:
    """Write an ordinary checkpoint; returns its bytes. See `miracle_hub.decompress`."""
    refuse_overlap(out, source)
    backend, shard_bytes = choose(options.backend), parse_size(options.max_shard_size, "max_shard_size")
    require(source, TO_DECODE)
    if source.is_file():
        weight_files(source)  # says that a folder is wanted
    repository, companions = open_repository(source, options.stages, base), of_repository(source)
    _refuse_stream(repository.tensors)
    tensors = {tensor.name: tensor for tensor in repository.tensors}
    files = sharded(_dense_entries(tensors.values()), shard_bytes, stem_in(source), guard="")
    total = sum(tensor.n_weights for tensor in tensors.values())
    with output_folder(out, options.overwrite) as temporary:
        companions.copy(temporary)
        with tqdm(
            total=total, unit="weights", unit_scale=True, desc="decompress", disable=not options.progress
        ) as bar:

            def data(entry: TensorSpec) -> bytes:
                bar.update(entry.n_weights)
                return raw_bytes(tensors[entry.name].load(backend=backend).cpu())

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
        is_plain = tensor.name == STREAM and not tensor.is_coded
        for part in tensor.parts if is_plain else ():
            if not (part.is_bytes and has_magic(STREAM, bytes(part.head(4).tolist()))):
                continue
            raise FormatError(
                f"{part.path}: expected tensors by name, found a network's stream, whose names and shapes "
                "are its module's; read it with miracle_hub.load(path, module)"
            )


def _dense_entries(tensors: Iterable[StoredTensor]) -> list[TensorSpec]:
    """Widest first, which keeps them aligned."""
    entries = [TensorSpec(tensor.name, tensor.dtype, tensor.shape) for tensor in tensors]
    return sorted(entries, key=lambda entry: -item_bits(entry.dtype))
