"""Sizes of files and rates of coding as users state them: what they are in bytes, and which are none."""

import re
from fractions import Fraction

from miracle_hub.code import MAX_WINDOW_BITS
from miracle_hub.errors import BudgetError, OptionError

_MAX_BITS_PER_WEIGHT = 64
_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def budget_bytes(bits_per_weight: float | None, size: str | int | None, n_weights: int) -> int:
    """Bytes of whole files that either of two budgets asks for.

    Raises:
        OptionError, BudgetError: it is none.
    """
    check_budget(bits_per_weight, size)
    if size is not None:
        return parse_size(size)
    assert bits_per_weight is not None
    return int(Fraction(bits_per_weight) * n_weights / 8)


def asked_for(bits_per_weight: float | None, n_bytes: int) -> str:
    """What the error of a budget of whole files begins with, in the unit that it was given in."""
    if bits_per_weight is None:
        return f"size: {n_bytes:,} bytes were asked for"
    return f"bits_per_weight: {bits_per_weight} were asked for ({n_bytes:,} bytes)"


def amount(n_bytes: int, rate: float, why: str, *, in_bits: bool) -> str:
    """A size in both units, first in the one that the budget was given in, and why it is so large."""
    if in_bits:
        return f"{rate} bits per weight ({n_bytes:,} bytes: {why})"
    return f"{n_bytes:,} bytes ({rate} bits per weight: {why})"


def check_budget(bits_per_weight: object, size: str | int | None) -> None:
    """Refuse a budget of whole files that no model could have.

    Raises:
        OptionError: the size is none. BudgetError: the rate of the files is out of range.
    """
    if size is not None:
        parse_size(size)
    if bits_per_weight is None:
        return
    if not isinstance(bits_per_weight, int | float) or not 0 < bits_per_weight < _MAX_BITS_PER_WEIGHT:
        raise BudgetError(
            f"bits_per_weight: expected a number above 0 and below {_MAX_BITS_PER_WEIGHT}, found "
            f"{bits_per_weight!r}; 2 to 4 suit most models"
        )


def check_rate(rate: object) -> None:
    """Refuse bits per coded value that no code has; None is no rate.

    Raises:
        BudgetError: the rate is out of range.
    """
    if rate is not None and not (isinstance(rate, int | float) and 0 < rate <= MAX_WINDOW_BITS):
        raise BudgetError(
            f"rate: expected more than 0 and at most {MAX_WINDOW_BITS} bits per coded value, found {rate!r}; "
            "choose another value (0.1 to 4 are usual)"
        )


def parse_size(size: str | int, what: str = "size") -> int:
    """Bytes of "5.5MB", "800 kB", "1GiB" or a plain number.

    Raises:
        OptionError: the text is no size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]?I?B|)\s*", str(size).upper())
    n_bytes = int(float(match[1]) * _UNITS.get(match[2] or "B", 0)) if match else 0
    if n_bytes <= 0:
        raise OptionError(
            f"{what}: expected a positive number of bytes such as 5.5MB, 800kB or 1GiB, found {size!r}"
        )
    return n_bytes
