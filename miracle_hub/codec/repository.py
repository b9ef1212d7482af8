"""A repository: the files that hold a model together, read and checked as one, and written as one."""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from miracle_hub.codec.based import with_base
from miracle_hub.codec.config import digests_of, read_config, read_facts
from miracle_hub.codec.guard import GUARD, Contents, Sealing, placeholder, read_contents
from miracle_hub.codec.guarded import check_config, check_together
from miracle_hub.codec.inherited import is_inherited
from miracle_hub.codec.naming import ADAPTER_STEM, CONFIG, INDEX, index_name, shard_names
from miracle_hub.codec.reading import Reading
from miracle_hub.codec.source import used_index, weight_files
from miracle_hub.codec.stored import StoredTensor, joined, stored_in
from miracle_hub.errors import ChecksumError, OptionError
from miracle_hub.files.container import encode_file_header, files_kept_open, write_file
from miracle_hub.files.whole import writing
from miracle_hub.format.spec import TensorSpec


@dataclass(frozen=True)
class Repository:
    """The tensors of a folder or of one file, whose headers agree with each other.

    Attributes:
        path: of the folder or file.
        facts: the quantization_config of a compressed folder; empty for a dense one and for a file.
        stages: how many of the `n_stages` were read.
    """

    path: Path
    tensors: tuple[StoredTensor, ...]
    facts: Mapping[str, Any]
    stages: int
    n_stages: int

    @property
    def files(self) -> list[Path]:
        """That hold the tensors."""
        return sorted({part.path for tensor in self.tensors for part in tensor.parts})

    @property
    def digest(self) -> str:
        """Of all payloads, as their headers promise it."""
        return digest_of(self.tensors)


@files_kept_open()
def open_repository(path: Path, stages: int | None = None, base: Path | None = None) -> Repository:
    """Every tensor of a compressed folder or file by the headers, which are checked, as are the guards of all
    that is read; nothing is decoded.

    Args:
        stages: of a folder, how many to read; None means all.
        base: the reader's own copy of the base, of a repository that has one.

    Raises:
        FormatError: and its subclasses: a file is not sound; the message names the tensor.
        BaseModelError: the base is missing, or another.
        OptionError: the folder has not so many stages.
        MissingWeightsError: there are no weights.
    """
    if path.is_file():
        tensors = tuple(with_base(stored_in([path]), {}, path, _tensors_of))
        read_contents(path).check()
        return Repository(path, tensors, {}, 1, 1)
    facts = _facts(path)
    digests = digests_of(facts, path / CONFIG)
    stages = check_stages(stages, len(digests), str(path))
    index = index_name(stages, len(digests))
    files = weight_files(path, index)
    own = sound_tensors(files, digests[stages - 1], stages, used_index(path, index))
    return Repository(
        path, tuple(with_base(own, facts, path, _tensors_of, base)), facts, stages, len(digests)
    )


@files_kept_open()
def sound_tensors(
    files: list[Path], digest: str | None, stages: int, index: Path | None
) -> list[StoredTensor]:
    """The tensors of the first `stages` of a folder, compared with all that it states of them but the guard
    of config.json itself.

    Args:
        files: that hold them, and nothing else.
        digest: of their payloads; None where nobody states it.
        index: that named the files, if one did.

    Raises:
        FormatError: and its subclasses: a file is not sound; the message names the tensor.
    """
    folder, tensors = files[0].parent, stored_in(files)
    check_digest(tensors, digest, str(folder))
    # Last, as the others name the tensor.
    check_together(folder, [read_contents(file) for file in files], stages, index)
    return tensors


def repository_of(reading: Reading, base: Path | None = None) -> Repository:
    """The repository of files that were read whole; that of every smaller number of stages is checked too.

    Args:
        base: the reader's own copy of the base, of a repository that has one.

    Raises:
        FormatError: and its subclasses: they do not belong together.
        MissingWeightsError: there are no weights.
    """
    path, by_file = reading.path, {file.path: file for file in reading.files}
    facts = _facts(path) if path.is_dir() else {}
    digests, tensors = digests_of(facts, path / CONFIG), []
    for stages, digest in enumerate(digests, 1):
        index = index_name(stages, len(digests))
        files = [path] if path.is_file() else weight_files(path, index)
        contents = [by_file[file].sound_contents() for file in files]
        tensors = joined([tensor for file in files for tensor in by_file[file].tensors])
        check_digest(tensors, digest, str(path))
        if path.is_dir():
            check_together(path, contents, stages, used_index(path, index))
    based = with_base(tensors, facts, path, _tensors_of, base)
    return Repository(path, tuple(based), facts, len(digests), len(digests))


def _tensors_of(folder: Path) -> Sequence[StoredTensor]:
    """See `based.Read`."""
    return open_repository(folder).tensors


def _facts(folder: Path) -> dict[str, Any]:
    """See `read_facts`; config.json is compared with its guard.

    Raises:
        FormatError: and its subclasses, and SourceError: it is not sound.
    """
    facts = read_facts(folder)
    if facts or not is_inherited(folder):
        check_config(folder / CONFIG, read_config(folder))
    return facts


def check_stages(stages: object, n_stages: int, where: str) -> int:
    """The number of stages asked for; None means all.

    Raises:
        OptionError: it is not one of them.
    """
    if stages is None:
        return n_stages
    if not isinstance(stages, int) or isinstance(stages, bool) or not 1 <= stages <= n_stages:
        raise OptionError(
            f"{where}: stages: expected a number from 1 to {n_stages}, found {stages!r}; leave it out for all"
        )
    return stages


def check_digest(tensors: Iterable[StoredTensor], expected: str | None, where: str) -> None:
    """Compare with config.json: finds payloads that were lost, renamed or hidden by a damaged magic.

    Raises:
        ChecksumError: the payloads are others.
    """
    tensors = list(tensors)
    if expected is None or expected == (found := digest_of(tensors)):
        return
    names = [t.name for t in tensors if not t.is_coded and t.is_bytes]
    suspects = f"; not compressed, though they look it: {', '.join(names[:4])}" if names else ""
    raise ChecksumError(
        f"{where}: config.json promises compressed tensors of digest {expected}, found {found}{suspects}; "
        "tensors are damaged, missing or from another version: download the folder again"
    )


def digest_of(tensors: Iterable[StoredTensor]) -> str:
    """One digest for all payloads of tensors."""
    return payloads_digest(
        {
            part.name: facts.digest
            for tensor in tensors
            for part, facts in zip(tensor.parts, tensor.facts, strict=False)
        }
    )


def payloads_digest(digests: Mapping[str, int]) -> str:
    """One digest for payloads: SHA-256 of the lines "name digest", in order of name."""
    lines = "".join(f"{name} {digests[name]:016x}\n" for name in sorted(digests))
    return hashlib.sha256(lines.encode()).hexdigest()


@dataclass(frozen=True)
class OutputFile:
    """One safetensors file to write: its entries in order, and its metadata.

    Attributes:
        metadata: but for its guard.
        guard: the key in its metadata of its guard; empty for a file that states none.
    """

    name: str
    entries: list[TensorSpec]
    metadata: dict[str, str]
    guard: str = ""

    @property
    def n_bytes(self) -> int:
        """Of the whole file, guard included."""
        return len(encode_file_header(self.entries, self._unsealed)) + sum(e.n_bytes for e in self.entries)

    @property
    def _unsealed(self) -> dict[str, str]:
        return self.metadata | (placeholder(self.guard) if self.guard else {})

    def write(self, folder: Path, data: Callable[[TensorSpec], bytes]) -> Contents | None:
        """Write the file, with its guard once all else is written; `data` is asked for one entry at a time.

        Returns:
            What guards cover of it; None of a file without one.

        Raises:
            OutputWriteError: it cannot be written.
        """
        path, sealing = folder / self.name, Sealing(self.metadata, self.guard)
        if not self.guard:
            write_file(path, self.entries, self.metadata, data)
            return None
        write_file(path, self.entries, self._unsealed, sealing.noting(data), lambda: sealing.metadata)
        return sealing.contents(path)


def total_bytes(files: Iterable[OutputFile]) -> int:
    """Bytes of files together, headers included."""
    return sum(file.n_bytes for file in files)


def sharded(
    entries: list[TensorSpec], max_shard_bytes: int, stem: str = "model", guard: str = GUARD
) -> list[OutputFile]:
    """Files of at most `max_shard_bytes` of data each (one tensor may exceed it), named as on the Hub.

    Args:
        guard: see `OutputFile`.

    Raises:
        OptionError: an adapter, of which PEFT reads one file, would have several.
    """
    shards: list[list[TensorSpec]] = [[]]
    filled = 0
    for entry in entries:
        if shards[-1] and filled + entry.n_bytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(entry)
        filled += entry.n_bytes
    if stem == ADAPTER_STEM and len(shards) > 1:
        raise OptionError(
            f"max_shard_size: expected room for all of an adapter, which PEFT reads from one file, found "
            f"{max_shard_bytes:,} bytes, {len(shards)} files; give more"
        )
    names = shard_names(stem, len(shards))
    return [OutputFile(n, shard, {"format": "pt"}, guard) for n, shard in zip(names, shards, strict=True)]


def write_indices(folder: Path, stages: Sequence[Sequence[OutputFile]], guards: Sequence[str] = ()) -> None:
    """An index for all stages, and one for every smaller number of them; none for a single file.

    Args:
        guards: of the first n stages, for every n; none for files without them.
    """
    if len(stages) == 1 and len(stages[0]) == 1:
        return
    for n in range(1, len(stages) + 1):
        files = [file for stage in stages[:n] for file in stage]
        guard = {GUARD: guards[n - 1]} if guards else {}
        write_index(folder, files, index_name(n, len(stages)), guard)


def write_index(
    folder: Path, files: Sequence[OutputFile], name: str = INDEX, guard: Mapping[str, str] | None = None
) -> None:
    """The index of a sharded repository, as transformers reads it.

    Raises:
        OutputWriteError: it cannot be written.
    """
    total = sum(entry.n_bytes for file in files for entry in file.entries)
    weight_map = {entry.name: file.name for file in files for entry in file.entries}
    index = {"metadata": {"total_size": total, **(guard or {})}, "weight_map": weight_map}
    with writing(folder / name):
        (folder / name).write_text(json.dumps(index, indent=2) + "\n")
