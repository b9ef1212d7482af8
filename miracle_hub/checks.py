"""What every room refuses in the same words: a value that is no choice, no whole number, or not positive."""

import math
from collections.abc import Collection

from miracle_hub.errors import OptionError


def check_choice(name: str, value: object, choices: Collection[str]) -> None:
    """Refuse what is none of some choices.

    Raises:
        OptionError: it is none of them.
    """
    if value not in choices:
        raise OptionError(f"{name}: expected one of {choices}, found {value!r}; choose one of them")


def check_integer(
    name: str, value: object, low: int, high: int | None = None, *, hint: str = "choose another value"
) -> None:
    """Refuse what is no whole number in a range.

    Raises:
        OptionError: it is not.
    """
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= (high or value):
        what = f"{low} or more" if high is None else f"{low} to {high}"
        raise OptionError(f"{name}: expected {what}, found {value!r}; {hint}")


def check_positive(name: str, value: object) -> None:
    """Refuse what is no positive, finite number.

    Raises:
        OptionError: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise OptionError(f"{name}: expected a positive number, found {value!r}; choose another value")
