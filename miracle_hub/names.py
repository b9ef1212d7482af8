"""The one rule by which names of modules and tensors select: that of PEFT's target_modules.

Source: `check_target_module_exists` and `match_target_against_key` of PEFT, for names of tensors too.
"""

import re
from collections.abc import Iterable, Sequence
from functools import lru_cache

from miracle_hub.errors import OptionError


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
    taken: set[str] = set()  # by what could stand in a list; to ask `matches` of each is slow for thousands
    for parts in (name.split(".") for name in names):
        ends = range(1, len(parts) + 1)
        taken |= {".".join(parts[start:end]) for end in ends for start in range(end)}
    return [name for name in wanted if name not in taken]


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
