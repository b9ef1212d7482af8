"""What every room refuses in the same words: a value that is no choice, no whole number, or not positive."""

import math
import os
from collections.abc import Collection, Mapping
from typing import Any

from miracle_hub.errors import BudgetError, OptionError

# Of the options of a compression, those that say how many bits to lose, and how.
_BUDGETS = ("bits_per_weight", "size")
_LOSSES = ("window_bits", "rotation", "seed", "stages", "effort", "work")


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


def check_data(name: str, value: object) -> None:
    """Refuse what can be no data: a number, or no text at all. Whoever reads the data says the rest.

    Raises:
        OptionError: it is that.
    """
    if isinstance(value, int | float | complex) or (isinstance(value, str) and not value.strip()):
        raise OptionError(
            f'{name}: expected "self", "none", a path, a Hub id or data, found {value!r}; leave it out for '
            '"self"'
        )


def check_path(name: str, value: object) -> None:
    """Refuse what can be no path; None is none.

    Raises:
        OptionError: it is that.
    """
    is_path = isinstance(value, str | os.PathLike) and bool(str(value).strip())
    if value is not None and not is_path:
        raise OptionError(f"{name}: expected a path, found {value!r}; leave it out for none")


def check_one_budget(where: str, **budgets: object) -> None:
    """Refuse anything but exactly one budget.

    Raises:
        BudgetError: there is none, or more than one.
    """
    given = [name for name, value in budgets.items() if value is not None]
    if len(given) != 1:
        *others, last = budgets
        raise BudgetError(
            f"{where}: expected exactly one of {', '.join(others)} and {last}, found "
            f"{' and '.join(given) or 'none'}; give one of them"
        )


def check_lossless(given: Mapping[str, tuple[Any, Any]]) -> None:
    """Refuse what a lossless compression would have to ignore.

    Args:
        given: options of a compression, each with its default, by name.

    Raises:
        BudgetError: there is a size. OptionError: there is another of them.
    """
    found = [name for name in (*_BUDGETS, *_LOSSES) if given[name][0] != given[name][1]]
    calibrate = given["calibrate"][0]
    is_idle = calibrate is None or (isinstance(calibrate, str) and calibrate in ("self", "none"))
    for name in found if is_idle else [*found, "calibrate"]:
        raise (BudgetError if name in _BUDGETS else OptionError)(
            f"exact: expected no {name}, since no bit is lost and the size is what that takes, found "
            f"{str(given[name][0])[:80]!r}; leave out either"
        )
