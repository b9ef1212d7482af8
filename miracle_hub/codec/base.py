"""The base of a repository: the model elsewhere to whose tensors it adds its own.

FORMAT.md, "Base". What config.json states of it, and where it lies; `based` finds its tensors, `stored` adds
them up.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from miracle_hub.codec.config import read_facts
from miracle_hub.codec.naming import CONFIG
from miracle_hub.codec.purpose import STAYING_PATTERNS
from miracle_hub.codec.stored import BASE_DIGITS
from miracle_hub.errors import BaseModelError, FormatError, MiracleError
from miracle_hub.format.payload import DTYPES

FIELD = "base_model"  # in the quantization_config
_COMMIT = re.compile(r"[0-9a-f]{40}")
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_DIGEST = re.compile(rf"[0-9a-f]{{{BASE_DIGITS}}}")
_CACHED = re.compile(r"models--(.+)")


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
            raise BaseModelError(
                f"{where}: expected its base {self.said}, which cannot be had: {error}"
            ) from error


def is_hub_id(text: str) -> bool:
    """Whether a text may be the id of a repository of the Hub, and no path that leaves its folder."""
    return _REPOSITORY.fullmatch(text) is not None and ".." not in text


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
    if base.repository and not is_hub_id(base.repository):
        raise _unsound(where, "a Hub id as repository", base.repository)
    if base.repository and not _COMMIT.fullmatch(base.revision):
        raise _unsound(where, "a commit of 40 hexadecimal digits as revision", base.revision)
    for name, digest in base.digests.items():
        if not _DIGEST.fullmatch(digest) or not name.startswith(base.prefix[0]):
            raise _unsound(
                where, f"a digest of {BASE_DIGITS} hexadecimal digits for every tensor", f"{name}: {digest}"
            )
    for name, dtype in base.dtypes.items():
        if dtype not in DTYPES or name not in base.digests:
            raise _unsound(
                where, f"dtypes of {', '.join(DTYPES)}, for tensors of the base", f"{name}: {dtype}"
            )


def _unsound(where: Path, expected: str, found: str) -> FormatError:
    return FormatError(
        f"{where}: quantization_config.{FIELD}: expected {expected}, found {found[:80]!r}; the file is "
        "hostile or damaged: download it again"
    )


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


def has_base(folder: Path) -> bool:
    """Whether a compressed folder has a base.

    Raises:
        FormatError, SourceError: its config.json is not sound.
    """
    return FIELD in read_facts(folder)
