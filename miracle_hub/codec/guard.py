"""Guards: digests of all that a repository holds, plain tensors, names, dtypes and shapes included.

A guard of a file covers its metadata and one line per entry; that of a repository covers its files; that of
config.json covers its other fields. What a payload decodes to is its own frame's business: here it stands for
itself by its first bytes, so that nothing is decoded and plain tensors are all that is hashed.

FORMAT.md, "Guard".
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from miracle_hub.codec.naming import STREAM
from miracle_hub.codec.payloads import has_magic
from miracle_hub.errors import ChecksumError
from miracle_hub.files.container import raw_entries
from miracle_hub.format import frame
from miracle_hub.format.spec import TensorSpec

# Of a file of a repository, whose config.json or index states another; of a file that stands alone.
GUARD, GUARD_ALONE = "miracle_guard", "miracle_guard_alone"
_DIGITS = 32  # 128 bits find every damage, and are half the bytes of a whole SHA-256


@dataclass(frozen=True)
class Line(TensorSpec):
    """What a guard covers of one entry, as the file's header has it.

    Attributes:
        content: of a payload or a network's stream its frame, of all others the start of their SHA-256, as
            hexadecimal digits.
    """

    content: str

    @property
    def is_framed(self) -> bool:
        """Whether it is a payload or a stream, which checks its own bytes."""
        return len(self.content) == 2 * frame.SIZE

    @property
    def text(self) -> str:
        """The line, in ASCII, ended by a newline."""
        return f"{json.dumps(self.name)} {self.dtype} [{','.join(map(str, self.shape))}] {self.content}\n"


@dataclass(frozen=True)
class Contents:
    """What a guard covers of one file; `metadata` is all of the file's, guards included."""

    path: Path
    metadata: Mapping[str, str]
    lines: Sequence[Line]

    @property
    def digest(self) -> str:
        """SHA-256, hexadecimal, of the metadata but for guards and of the lines."""
        others = {key: value for key, value in self.metadata.items() if key not in (GUARD, GUARD_ALONE)}
        items = sorted(f"{json.dumps(key)} {json.dumps(value)}\n" for key, value in others.items())
        text = "".join([*items, *sorted(line.text for line in self.lines)])
        return hashlib.sha256(text.encode("ascii")).hexdigest()

    @property
    def guard(self) -> str:
        """What the file's metadata has to state."""
        return self.digest[:_DIGITS]

    @property
    def stated(self) -> str | None:
        """What the file's metadata states; None for a file without a guard."""
        return self.metadata.get(GUARD, self.metadata.get(GUARD_ALONE))

    @property
    def is_part(self) -> bool:
        """Whether the file was written as a part of a guarded repository."""
        return GUARD in self.metadata

    def check(self) -> None:
        """
        Raises:
            ChecksumError: the file states another guard than it has.
        """
        if self.stated not in (None, self.guard):
            culprit = self.lines[0].name if len(self.lines) == 1 else f"one of its {len(self.lines)} tensors"
            raise ChecksumError(
                f"{self.path}: expected what guard {self.stated} covers, found {self.guard}: {culprit}, "
                "a name, a shape or the metadata is damaged (one guard covers them all); download it again"
            )


def line_of(entry: TensorSpec, pieces: Iterable[bytes | memoryview]) -> Line:
    """The line of an entry from its bytes, which come in pieces; of a payload only the first is taken."""
    pieces = iter(pieces)
    first = next(pieces, b"")
    start = bytes(first[: frame.SIZE])
    if entry.is_bytes and len(start) == frame.SIZE and has_magic(entry.name, start):
        return Line(entry.name, entry.dtype, entry.shape, start.hex())
    checksum = hashlib.sha256(first)
    for piece in pieces:
        checksum.update(piece)
    return Line(entry.name, entry.dtype, entry.shape, checksum.hexdigest()[:_DIGITS])


def read_contents(path: Path) -> Contents:
    """What a guard covers of a file; its plain tensors are read, a piece in memory at a time.

    Raises:
        FormatError: the file is not a sound safetensors file.
    """
    metadata, entries = raw_entries(path)
    return Contents(path, metadata, tuple(line_of(entry, raw) for entry, raw in entries))


def placeholder(key: str) -> dict[str, str]:
    """Metadata as long as those with a guard: with them sizes are known before anything is written."""
    return {key: "0" * _DIGITS}


class Sealing:
    """The guard of a file that is being written: takes note of every tensor that passes."""

    def __init__(self, metadata: Mapping[str, str], key: str = GUARD) -> None:
        """
        Args:
            metadata: of the file, but for guards.
            key: GUARD or GUARD_ALONE.
        """
        self._metadata, self._key, self._lines = dict(metadata), key, list[Line]()

    def noting(self, data: Callable[[TensorSpec], bytes]) -> Callable[[TensorSpec], bytes]:
        """The same bytes of every entry, of which note is taken."""

        def noted(entry: TensorSpec) -> bytes:
            raw = data(entry)
            self._lines.append(line_of(entry, [raw]))
            return raw

        return noted

    @property
    def metadata(self) -> dict[str, str]:
        """Those of the file with its guard, as long as `placeholder` makes them."""
        return {**self._metadata, self._key: Contents(Path(), self._metadata, self._lines).guard}

    def contents(self, path: Path) -> Contents:
        """What was written to a file."""
        return Contents(path, self.metadata, tuple(self._lines))


def is_stream_alone(entries: Sequence[TensorSpec]) -> bool:
    """Whether a file holds a network's stream and nothing else, whose frame covers it: it needs no guard."""
    return [entry.name for entry in entries] == [STREAM]


def repository_guard(digests: Iterable[str]) -> str:
    """SHA-256, hexadecimal, of the digests of the files of a repository, in any order."""
    return hashlib.sha256("".join(sorted(f"{digest}\n" for digest in digests)).encode("ascii")).hexdigest()


def guards_of_stages(stages: Sequence[Sequence[Contents]]) -> list[str]:
    """The guard of the first n stages for every n, from the files of each stage."""
    digests = [[contents.digest for contents in files] for files in stages]
    return [repository_guard(sum(digests[:n], [])) for n in range(1, len(digests) + 1)]


def config_guard(config: Mapping[str, Any]) -> str:
    """SHA-256, hexadecimal, of all of a config.json but where it states this very digest.

    As canonical JSON, so that layout and order do not count.
    """
    facts = config.get("quantization_config")
    rest = {key: value for key, value in config.items() if key != GUARD}
    if isinstance(facts, dict) and isinstance(facts.get("guard"), dict):
        guard = {key: value for key, value in facts["guard"].items() if key != "config"}
        rest["quantization_config"] = {**facts, "guard": guard}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def with_guard(config: Mapping[str, Any], tensors: Sequence[str]) -> dict[str, Any]:
    """A finished config.json with the guards of the first n stages for every n, and its own."""
    guard: dict[str, Any] = {"tensors": list(tensors)}
    guarded = {key: value for key, value in config.items() if key != GUARD}
    guarded["quantization_config"] = {**config["quantization_config"], "guard": guard}
    guard["config"] = config_guard(guarded)
    return guarded


def with_own_guard(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json of a network's arguments, which has no quantization_config, with a guard of its own."""
    return {**config, GUARD: config_guard(config)}
