"""The base of a repository: the model elsewhere to whose tensors it adds its own, or of which it changes none.

FORMAT.md, "Base". What a base is, where it lies and how its tensors are known is here; `stored` adds them up.
"""

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from miracle_hub.codec.config import read_facts
from miracle_hub.codec.naming import CONFIG
from miracle_hub.codec.purpose import STAYING_PATTERNS
from miracle_hub.codec.source import weight_files
from miracle_hub.codec.stored import BASE_DIGITS, StoredTensor, stored_in
from miracle_hub.errors import BaseModelError, FormatError, MiracleError
from miracle_hub.format.payload import DTYPES

FIELD = "base_model"  # in the quantization_config
_COMMIT = re.compile(r"[0-9a-f]{40}")
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_DIGEST = re.compile(rf"[0-9a-f]{{{BASE_DIGITS}}}")
_CACHED = re.compile(r"models--(.+)")
# The tensors of a compressed folder.
Read = Callable[[Path], Sequence[StoredTensor]]


@dataclass(frozen=True)
class Base:
    """Where a base is, and which of its tensors are used.

    Attributes:
        repository: its Hub id; empty for a folder that only the reader knows.
        revision: the commit.
        digests: of tensors as readers get them of the base, by their names here.
        dtypes: of tensors that nothing is added to, where they are not the base's.
        left_out: names of tensors that differ from the base's, though nothing is added to them.
        prefix: what names here begin with in place of what the base's begin with.
    """

    repository: str
    revision: str
    digests: Mapping[str, str] = field(default_factory=dict)
    dtypes: Mapping[str, str] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    prefix: tuple[str, str] = ("", "")

    @property
    def said(self) -> str:
        """For people."""
        return f"{self.repository} at {self.revision}" if self.repository else "a local folder"

    def name_in_base(self, name: str) -> str:
        """What the base calls a tensor."""
        own, theirs = self.prefix
        return theirs + name.removeprefix(own)

    def name_here(self, name: str) -> str:
        """What a tensor of the base is called here; the mirror of `name_in_base`."""
        own, theirs = self.prefix
        return own + name.removeprefix(theirs)

    def facts(self) -> dict[str, Any]:
        """As the quantization_config states it; `read_base` reads it back."""
        stated: dict[str, Any] = {"repository": self.repository, "revision": self.revision}
        stated |= {"prefix": list(self.prefix)} if any(self.prefix) else {}
        stated |= {"dtypes": dict(self.dtypes)} if self.dtypes else {}
        stated |= {"left_out": list(self.left_out)} if self.left_out else {}
        return {FIELD: stated | {"tensors": dict(self.digests)}}

    def folder(self, given: Path | None, where: Path) -> Path:
        """Where its files are.

        Args:
            given: the reader's own copy, which is compared like any other.
            where: the repository that needs it, for messages.

        Raises:
            BaseModelError: it cannot be had.
        """
        if given is not None:
            return given
        if not self.repository:
            raise BaseModelError(
                f"{where}: expected to be told where the base is, which was a local folder, found nothing; "
                "give its folder or Hub id as base (miracle … --base, MiracleConfig(base=…))"
            )
        from miracle_hub.files.snapshots import snapshot

        try:
            return snapshot(self.repository, revision=self.revision, ignore_patterns=STAYING_PATTERNS)
        except MiracleError as error:
            raise BaseModelError(f"{where}: expected its base {self.said}, which cannot be had: {error}") from error


def read_base(facts: Mapping[str, Any], where: Path) -> Base | None:
    """The base that a quantization_config states; None if it states none.

    Args:
        where: config.json, for messages.

    Raises:
        FormatError: what it states is none.
    """
    stated = facts.get(FIELD)
    if stated is None:
        return None
    names = dict.fromkeys(("repository", "revision"), "")
    try:
        texts = {name: _text(stated.get(name, "")) for name in names}
        digests = {_text(name): _text(digest) for name, digest in stated["tensors"].items()}
        dtypes = {_text(name): _text(dtype) for name, dtype in stated.get("dtypes", {}).items()}
        own, theirs = map(_text, stated.get("prefix", ("", "")))
        left_out = tuple(map(_text, stated.get("left_out", ())))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise _unsound(where, "an object with repository, revision and tensors", repr(error)) from None
    found = Base(**texts, digests=digests, dtypes=dtypes, left_out=left_out, prefix=(own, theirs))
    _check(found, where)
    return found


def _text(value: object) -> str:
    """
    Raises:
        TypeError: it is no text.
    """
    if not isinstance(value, str):
        raise TypeError(f"{str(value)[:80]!r} is no text")
    return value


def _check(base: Base, where: Path) -> None:
    """Refuse what would be read as a path, or may be moved.

    Raises:
        FormatError: it is no base.
    """
    if base.repository and not (_REPOSITORY.fullmatch(base.repository) and ".." not in base.repository):
        raise _unsound(where, "a Hub id as repository", base.repository)
    if base.repository and not _COMMIT.fullmatch(base.revision):
        raise _unsound(where, "a commit of 40 hexadecimal digits as revision", base.revision)
    for name, digest in base.digests.items():
        if not _DIGEST.fullmatch(digest) or not name.startswith(base.prefix[0]):
            raise _unsound(where, f"a digest of {BASE_DIGITS} hexadecimal digits for every tensor", f"{name}: {digest}")
    for name, dtype in base.dtypes.items():
        if dtype not in DTYPES or name not in base.digests:
            raise _unsound(where, f"dtypes of {', '.join(DTYPES)}, for tensors of the base", f"{name}: {dtype}")


def _unsound(where: Path, expected: str, found: str) -> FormatError:
    return FormatError(
        f"{where}: quantization_config.{FIELD}: expected {expected}, found {found[:80]!r}; the file is hostile "
        "or damaged: download it again"
    )


def compared(tensors: Sequence[StoredTensor]) -> list[StoredTensor]:
    """Tensors whose bases are those that are stated, for who must know before any is loaded; those of a base
    that is compressed are compared when they are decoded.

    Raises:
        BaseModelError: one is another.
    """
    dense = [t for t in tensors if t.base is not None and not t.base.is_coded]
    with ThreadPoolExecutor() as pool:  # hashing needs no lock of the interpreter
        for _ in pool.map(StoredTensor.load_base, dense):
            pass
    names = {tensor.name for tensor in dense}
    return [replace(t, base_digest="") if t.name in names else t for t in tensors]


def names_left_out(facts: Mapping[str, Any], where: Path) -> tuple[str, ...]:
    """Tensors that were not the base's, though nothing is added to them.

    Raises:
        FormatError: what the quantization_config states of a base is none.
    """
    base = read_base(facts, where / CONFIG)
    return () if base is None else base.left_out


def said_of_base(facts: Mapping[str, Any], where: Path) -> str:
    """The base that a quantization_config states, for people; empty if there is none.

    Raises:
        FormatError: what it states is none.
    """
    base = read_base(facts, where / CONFIG)
    return "" if base is None else base.said


def given_base(base: str | Path | None) -> Path | None:
    """The folder of a base that a reader gives as a folder or a Hub id; None if none is given.

    Raises:
        SourceError: there is no such folder or repository.
    """
    if base is None or os.path.exists(base):
        return None if base is None else Path(base)
    from miracle_hub.files.snapshots import snapshot

    return snapshot(str(base), revision=None, ignore_patterns=STAYING_PATTERNS)


def named_base(folder: Path) -> tuple[str, str]:
    """Hub id and commit of a folder in the client's cache; two empty texts for any other."""
    cached = _CACHED.fullmatch(folder.parent.parent.name)
    if cached is None or folder.parent.name != "snapshots" or not _COMMIT.fullmatch(folder.name):
        return "", ""
    return cached[1].replace("--", "/", 1), folder.name


def tensors_of_base(folder: Path, read: Read) -> dict[str, StoredTensor]:
    """Every tensor of a base, dense or compressed; of a dense one by the headers alone.

    Args:
        read: opens a compressed one.

    Raises:
        BaseModelError: it cannot be read, or needs a base itself.
    """
    try:
        if not read_facts(folder):
            return {tensor.name: tensor for tensor in stored_in(weight_files(folder))}
        if has_base(folder):
            raise BaseModelError(
                f"{folder}: expected a base that is a model by itself, found one that has a base of its own; "
                "use that one, or decompress this one first (miracle decompress)"
            )
        return {tensor.name: tensor for tensor in read(folder)}
    except BaseModelError:
        raise
    except MiracleError as error:
        raise BaseModelError(f"{folder}: expected a base, found files that cannot be read: {error}") from error


def with_base(
    tensors: Iterable[StoredTensor],
    facts: Mapping[str, Any],
    where: Path,
    read: Read,
    given: Path | None = None,
) -> list[StoredTensor]:
    """The tensors of a repository with those of its base, which are compared when they are loaded.

    Args:
        tensors: of the repository's own files.
        facts: its quantization_config.
        where: the repository.
        read: opens a base that is compressed.
        given: the reader's own copy of the base.

    Raises:
        BaseModelError: the base is missing, or has other tensors.
        FormatError: what is stated of it does not fit the files.
    """
    own = {tensor.name: tensor for tensor in tensors}
    base = read_base(facts, where / CONFIG)
    digests = {} if base is None else base.digests
    for tensor in own.values():
        is_difference = any(facts.is_difference for facts in tensor.facts)
        if is_difference is not (tensor.name in digests):
            raise BaseModelError(
                f"{where}: {tensor.name}: expected {'a base in config.json' if is_difference else 'a difference'}"
                f", found {'none' if is_difference else 'weights of its own'}; "
                + (
                    "these are differences to a base, which alone mean nothing: read the folder that they are in"
                    if is_difference
                    else "files are from elsewhere: download the folder again"
                )
            )
    if base is None:
        return list(own.values())
    folder = base.folder(given, where)
    found = tensors_of_base(folder, read)
    based = {name: _based(name, own.get(name), base, found, folder) for name in base.digests}
    return [*(based.get(name, tensor) for name, tensor in own.items()), *(based[n] for n in based if n not in own)]


def _based(
    name: str, own: StoredTensor | None, base: Base, found: Mapping[str, StoredTensor], folder: Path
) -> StoredTensor:
    """
    Raises:
        BaseModelError: the base has no such tensor.
    """
    theirs = found.get(base.name_in_base(name))
    if theirs is None or (own is not None and own.shape != theirs.shape):
        wanted = "" if own is None else f" of shape {list(own.shape)}"
        raise BaseModelError(
            f"{folder}: {base.name_in_base(name)}: expected this tensor{wanted} in the base, {base.said}, found "
            f"{'none' if theirs is None else f'shape {list(theirs.shape)}'}; this is another model, or half of it"
        )
    digest = base.digests[name]
    if own is not None:
        return replace(own, base=theirs, base_digest=digest)
    dtype = base.dtypes.get(name, theirs.dtype)
    return StoredTensor(name, dtype, theirs.shape, (), base=theirs, base_digest=digest)


def has_base(folder: Path) -> bool:
    """Whether a compressed folder has a base.

    Raises:
        FormatError, SourceError: its config.json is not sound.
    """
    return FIELD in read_facts(folder)
