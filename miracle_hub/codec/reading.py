"""Every file of a repository, read once: hashed, its tensors described, and each shown to whoever asked."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from torch import Tensor

from miracle_hub.codec import payloads
from miracle_hub.codec.guard import Contents, line_of
from miracle_hub.codec.naming import WEIGHTS_ENDING
from miracle_hub.codec.payloads import Payload
from miracle_hub.codec.source import list_tensors, narrowed_names
from miracle_hub.codec.stored import StoredTensor, described
from miracle_hub.errors import FormatError, MiracleError, SourceError
from miracle_hub.files.container import files_kept_open, opened, read_through
from miracle_hub.files.digests import Hashes, hashes_of, pieces
from miracle_hub.files.folders import visible_files

# Takes a tensor, its payload (None if it is plain) and the entry that the file holds of it.
Look = Callable[[StoredTensor, Payload | None, Tensor], None]


@dataclass(frozen=True)
class FileReading:
    """One file, read whole.

    Attributes:
        name: relative to the repository.
        tensors: in it; refinements count as tensors of their own here.
        contents: what guards cover of it, compared with its own; None unless it is a sound file of weights.
        defect: what is wrong with it; empty if nothing is.
    """

    path: Path
    name: str
    hashes: Hashes
    tensors: tuple[StoredTensor, ...] = ()
    contents: Contents | None = None
    defect: str = ""

    def sound_contents(self) -> Contents:
        """`contents` of a file of weights.

        Raises:
            FormatError: it is not sound.
        """
        if self.contents is None:
            raise FormatError(self.defect)
        return self.contents


@dataclass(frozen=True)
class Reading:
    """All visible files of a folder, or one file.

    Attributes:
        weights_sha256: of the files of weights right in the folder, one after the other; a card states it.
    """

    path: Path
    files: tuple[FileReading, ...]
    weights_sha256: str


@files_kept_open()
def read_all(path: Path, look: Look = lambda tensor, payload, entry: None) -> Reading:
    """Read a repository.

    Args:
        look: called for every tensor; a MiracleError that it raises is the file's defect.

    Raises:
        SourceError: a file is a link that leaves the folder.
    """
    together, files = Hashes(0), []
    for file in [path] if path.is_file() else list(visible_files(path)):
        name = file.name if path.is_file() else file.relative_to(path).as_posix()
        is_weights = file == path or file.suffix == WEIGHTS_ENDING  # a file by itself may have any name
        together_with = [together] if is_weights and file.parent in (path, path.parent) else []
        files.append(_read(file, name, look, together_with) if is_weights else _hashed(file, name))
    return Reading(path, tuple(files), together.sha256)


def _hashed(file: Path, name: str) -> FileReading:
    """A file that holds no weights."""
    hashes = Hashes(file.stat().st_size)
    for piece in pieces(file):
        hashes.update(piece)
    return FileReading(file, name, hashes)


def _read(file: Path, name: str, look: Look, others: Sequence[Hashes]) -> FileReading:
    hashes = Hashes(file.stat().st_size)
    try:
        tensors, contents = _read_tensors(file, look, [hashes, *others])
        contents.check()
        return FileReading(file, name, hashes, tuple(tensors), contents)
    except MiracleError as error:
        return FileReading(file, name, hashes_of(file), defect=str(error))


def _read_tensors(file: Path, look: Look, hashes: Sequence[Hashes]) -> tuple[list[StoredTensor], Contents]:
    """
    Raises:
        MiracleError: the file, or a tensor, is not sound.
    """
    entries, narrowed = {entry.name: entry for entry in list_tensors([file])}, narrowed_names(file)
    found, lines = [], []
    with opened(file) as opened_file:
        metadata = opened_file.metadata() or {}
    try:
        for name, tensor, data in read_through(file, hashes):
            entry, payload = entries[name], payloads.read(tensor, name)
            lines.append(line_of(entry, [data]))
            found.append(described(entry, payload, narrowed))
            look(found[-1], payload, tensor)
    except SafetensorError as error:
        raise SourceError(
            f"{file}: expected dtypes that torch knows, found one that it does not ({error}); upgrade "
            "torch and safetensors, or convert the tensor"
        ) from None
    return found, Contents(file, metadata, tuple(lines))
