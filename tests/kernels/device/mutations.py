"""PTX texts with one thing left out, as a compiler or its user may: a barrier, a wait, a fence, a mask."""

import re
from collections.abc import Iterator
from typing import NamedTuple


class Mutation(NamedTuple):
    """What is left out, the how-maniest of its kind it is, its line, and the text without it."""

    kind: str
    place: int
    line: str
    text: str


_BARRIER = re.compile(r"^\s*(?:bar|barrier)\.(?:warp\.)?sync[^;]*;", re.MULTILINE)
_WAIT = re.compile(r"^\s*(?:cp\.async\.wait_group|wgmma\.wait_group\.sync\.aligned)[^;]*;", re.MULTILINE)
_FENCE = re.compile(r"^\s*fence\.proxy\.async[^;]*;", re.MULTILINE)
_MASK = re.compile(r"@(%p\d+) (?=(?:ld|st)\.global|cp\.async)")
KINDS = {"barrier": _BARRIER, "wait": _WAIT, "fence": _FENCE, "mask": _MASK}


def mutations(text: str) -> Iterator[Mutation]:
    """Every text with one of them missing; lines stay where they are."""
    for kind, pattern in KINDS.items():
        for place, found in enumerate(pattern.finditer(text)):
            yield Mutation(
                kind, place, _line(text, found), _replaced(text, found, "\n" * found[0].count("\n"))
            )


def of_masked_threads(text: str, mutation: Mutation, instructions: str) -> str:
    """The text with instructions before a masked access, for the threads that the mask excludes."""
    found = list(_MASK.finditer(text))[mutation.place]
    added = "".join(f"@!{found[1]} {one}; " for one in instructions.split("; "))
    return _replaced(text, found, added + found[0])


def with_other_values(text: str, mutation: Mutation) -> str:
    """The text with a masked load that gives the threads which the mask excludes what they cannot expect."""
    targets = re.findall(r"%\w+", mutation.line.partition("{")[2].partition("}")[0])
    return of_masked_threads(text, mutation, "; ".join(f"mov.b64 {target}, 0x7FC54321" for target in targets))


def with_inverse_mask(text: str, mutation: Mutation) -> str:
    """The text with an access by the threads that its mask excludes, and by no others."""
    found = list(_MASK.finditer(text))[mutation.place]
    return _replaced(text, found, f"@!{found[1]} ")


def _replaced(text: str, found: re.Match[str], by: str) -> str:
    return text[: found.start()] + by + text[found.end() :]


def _line(text: str, found: re.Match[str]) -> str:
    return text[text.rindex("\n", 0, found.end()) + 1 : text.index("\n", found.end())].strip()
