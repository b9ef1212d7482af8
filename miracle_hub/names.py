"""The one rule by which names of modules and tensors select: that of PEFT's target_modules; and what a name
that selects nothing may have meant.

Source: `check_target_module_exists` and `match_target_against_key` of PEFT, for names of tensors too.
"""

import re
from collections.abc import Iterable, Sequence
from difflib import SequenceMatcher, get_close_matches
from functools import lru_cache

from miracle_hub.errors import OptionError

# Choices: as many names as one reads in a message.
_OFFERED, _LISTED = 3, 12


def matches(name: str, wanted: str | Sequence[str]) -> bool:
    """Whether a selection takes a tensor or module: by its own name, or by that of a module above it.

    Args:
        name: dotted, as "encoder.layer.1.attention.weight", a tensor of the module before the last dot.
        wanted: a string is a regular expression that must match a whole name; a list holds names, or ends
            of names after a dot: "layer.1" takes "encoder.layer.1", and not "encoder.layer.10".

    Raises:
        OptionError: the string is no regular expression.
    """
    parts = name.split(".")
    return any(is_named(".".join(parts[:n]), wanted) for n in range(1, len(parts) + 1))


def is_named(name: str, wanted: str | Sequence[str]) -> bool:
    """Whether a selection means this very name, not only a module above it.

    Raises:
        OptionError: the string is no regular expression.
    """
    if isinstance(wanted, str):
        return _compiled(wanted).fullmatch(name) is not None
    return any(name == end or name.endswith(f".{end}") for end in wanted)


def unmatched(wanted: str | Sequence[str], names: Iterable[str]) -> list[str]:
    """What of a selection takes none of these tensors or modules, by the rule of `matches`.

    Raises:
        OptionError: the string is no regular expression.
    """
    if isinstance(wanted, str):
        return [] if any(matches(name, wanted) for name in names) else [wanted]
    taken = _selectors(names)  # to ask `matches` of each is slow for thousands
    return [name for name in wanted if name not in taken]


def _selectors(names: Iterable[str]) -> set[str]:
    """All that could stand in a list and take something."""
    found: set[str] = set()
    for parts in (name.split(".") for name in names):
        ends = range(1, len(parts) + 1)
        found |= {".".join(parts[start:end]) for end in ends for start in range(end)}
    return found


def near(name: object, names: Iterable[str]) -> list[str]:
    """Names that one may have meant, the likeliest first: all that are one character away, or a few others.

    One character more, less or another, or two that changed places; upper and lower case are alike.
    """
    wanted, folded = str(name).casefold(), {other: other.casefold() for other in names}
    one_away = [other for other, text in folded.items() if _is_one_edit(wanted, text)]
    close = set(get_close_matches(wanted, set(folded.values()), n=_OFFERED))
    others = [other for other, text in folded.items() if text in close]
    return one_away or sorted(others, key=lambda other: -_likeness(wanted, folded[other]))[:_OFFERED]


def _likeness(a: str, b: str) -> float:
    return SequenceMatcher(None, a, b).ratio()


def _is_one_edit(a: str, b: str) -> bool:
    """Whether a text becomes another by one character at most, or by two that change places."""
    start = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    a, b = a[start:], b[start:]
    return a[1:] == b[1:] or a[1:] == b or a == b[1:] or (a[:2] == b[1::-1] and a[2:] == b[2:])


def offer(name: object, names: Iterable[str]) -> str:
    """What an error says of a name that there is not: what it may have meant, or else what there is."""
    names = list(names)
    if found := near(name, names):
        return f"near it: {', '.join(map(repr, found))}"
    more = ", …" if len(names) > _LISTED else ""
    return f"there are: {', '.join(names[:_LISTED]) or 'none'}{more}"


def check_taken(wanted: str | Sequence[str] | None, names: Iterable[str], what: str, where: str) -> None:
    """Refuse a selection of which a name takes no tensor or module: it is misspelled.

    Args:
        names: of all tensors and modules that there are.
        what: the option, and `where` whose names they are, for messages.

    Raises:
        OptionError: a name, or the regular expression, takes nothing.
    """
    names = list(names)
    if not wanted or not (absent := unmatched(wanted, names)):
        return
    is_pattern = isinstance(wanted, str)
    close = near_selection(absent[0] if is_pattern else absent[:1], names)
    rule = (
        "a string is a regular expression of whole names" if is_pattern else "give the option once for each"
    )
    raise OptionError(
        f"{what}: expected modules or tensors of {where}, found {absent[0]!r}, which takes none; "
        f"{close or offer('', names)}; correct it ({rule}), or leave it out"
    )


def near_selection(wanted: str | Sequence[str], names: Iterable[str], keywords: Sequence[str] = ()) -> str:
    """What a selection that takes nothing may have meant, for messages; empty where nothing is near.

    Args:
        keywords: what may stand for a selection.
    """
    selectors = sorted(_selectors(names), key=lambda name: (name.count("."), name))
    pattern = wanted.replace("\\", "") if isinstance(wanted, str) else ""
    if pattern in selectors:
        return f"{pattern!r} is the end of a name: write [{pattern!r}], or '.*{pattern}'"
    for name in [pattern] if isinstance(wanted, str) else wanted:
        if near(name, [*keywords, *selectors]):
            return offer(name, [*keywords, *selectors])
    return ""


def check_names(wanted: object, what: str) -> None:
    """Refuse what selects nothing by this rule.

    Args:
        wanted: a regular expression, a list of names, or None for no selection.
        what: the option, for messages.

    Raises:
        OptionError: it is none of these, or the string is no regular expression.
    """
    if wanted is None:
        return
    if isinstance(wanted, str):
        try:
            _compiled(wanted)
        except OptionError as error:
            raise OptionError(f"{what}: {error}") from None
    elif not (isinstance(wanted, list) and all(isinstance(name, str) for name in wanted)):
        raise OptionError(
            f"{what}: expected a list of names or a regular expression, found {wanted!r}; write ['name'] for "
            "one"
        )


@lru_cache
def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise OptionError(
            f"expected a regular expression, found {pattern!r} ({error}); write a list of names, such as "
            "['layer.1'], to have them taken as they are"
        ) from None
