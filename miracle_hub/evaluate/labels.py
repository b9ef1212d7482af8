"""Labels as they were written → classes by name and number; what may mean two things is refused."""

import logging
import math
from collections.abc import Sequence
from typing import Any

from miracle_hub.errors import DataError
from miracle_hub.names import offer

_LOGGER = logging.getLogger("miracle_hub")
_MAX_CLASSES = 2**16  # a choice: more are an id column, or scores
# What tables have where nothing is known; as one of several names it may be a class (Namibia is NA).
_MISSING = ("na", "n/a", "nan", "null", "none", "-", "?", ".")


def class_names(labels: Sequence[Any], where: str) -> tuple[str, ...]:
    """Names of the classes, by number: of whole numbers from 0 on these, of texts the texts in their order.

    Args:
        where: data and column, for messages.

    Raises:
        DataError: there are fewer than two, or a label is missing, is of another kind than the others, or a
            number with a fraction.
    """
    found = _of_one_kind(labels, where)
    if isinstance(found[0], str):
        return tuple(sorted(found))
    if min(found) < 0 or max(found) >= _MAX_CLASSES:
        raise DataError(
            f"{where}: expected whole numbers from 0 on, found {min(found)} to {max(found)}; number the "
            "classes"
        )
    if absent := sorted(set(range(max(found))) - set(found)):
        _LOGGER.warning("%s: no row has the classes %s, which the model gets all the same", where, absent[:9])
    return tuple(str(number) for number in range(max(found) + 1))


def class_numbers(labels: Sequence[Any], names: tuple[str, ...], where: str) -> list[int]:
    """Every row's class by its number in `names`.

    Raises:
        DataError: a label is none of them, neither by name nor by number, or is the name of one and the
            number of another.
    """
    numbers = {name: number for number, name in enumerate(names)}
    plain = [_plain(label) for label in labels]
    are_names = all(isinstance(label, str) and label in numbers for label in plain)
    if are_names and any(_whole(label) is None for label in plain):
        return [numbers[label] for label in plain]
    return [_class_number(label, i, numbers, where) for i, label in enumerate(plain)]


def _class_number(label: Any, row: int, numbers: dict[str, int], where: str) -> int:
    names, named, number = list(numbers), numbers.get(str(label)), _whole(label)
    is_numbered = number is not None and 0 <= number < len(numbers)
    if label is not None and named is not None and (not is_numbered or named == number):
        return named
    shown = str(label) if _is_number(str(label)) else repr(label)
    if named is not None and label is not None:
        raise DataError(
            f"{where}: expected a label that means one class, found {shown} in row {row}, the name of class "
            f"{named} and the number of class {names[number or 0]!r}; write names that are no numbers, or "
            "number from 0 on"
        )
    if not is_numbered:
        raise DataError(
            f"{where}: expected one of {tuple(names[:8])}, found {shown} in row {row}; "
            f"{offer(label, names)}; complete or correct the labels"
        )
    assert number is not None
    return number


def _of_one_kind(labels: Sequence[Any], where: str) -> list[Any]:
    """The different labels: whole numbers or names.

    Raises:
        DataError: they are of no one kind, or fewer than two.
    """
    plain = [_plain(label) for label in labels]
    odd = next((label for label in plain if not isinstance(label, str | int | float | None)), None)
    if odd is not None:
        raise _no_class(odd, plain, where)
    found = list(dict.fromkeys(plain))
    if None in found or len(found) < 2:
        at = f" and none in row {plain.index(None)}" if None in found else ""
        raise DataError(
            f"{where}: expected a class for every row, of two classes or more, found "
            f"{sorted(map(str, set(found) - {None}))[:4]}{at}; complete the labels"
        )
    if other := next((i for i, label in enumerate(labels) if type(label) is not type(labels[0])), None):
        kinds = [f"{label!r} ({type(label).__name__})" for label in (labels[0], labels[other])]
        raise DataError(
            f"{where}: expected labels of one kind, found {' and '.join(kinds)} in row {other}; write them "
            "alike"
        )
    if isinstance(found[0], str):
        return _of_texts(found, plain, where)
    if not isinstance(found[0], int):
        raise _no_class(found[0], plain, where)
    return found


def _of_texts(found: list[str], plain: list[Any], where: str) -> list[Any]:
    """Labels of texts, as numbers where they are written so.

    Raises:
        DataError: they are numbers with a fraction, or differ only in how they are written.
    """
    whole = [number for label in found if (number := _whole(label)) is not None]
    if len(whole) == len(found):
        return whole
    others = [label for label in found if _whole(label) is None]
    if whole and all(label.casefold() in _MISSING for label in others):
        raise DataError(
            f"{where}: expected a class for every row, found whole numbers and {others[0]!r} in row "
            f"{plain.index(others[0])}; complete the labels, or name all classes"
        )
    if all(_is_number(label) for label in found):
        raise _no_class(others[0], plain, where)
    if {"true", "false"} == {label.casefold() for label in found} and len(found) > 2:
        raise DataError(f"{where}: expected one spelling of each class, found {found}; write them alike")
    if whole:  # as 1, 2, 3+ are; or a column was filled in two ways, which a text does not tell
        _LOGGER.warning("%s: whole numbers stand beside %r: they are taken for names too", where, others[0])
    return found


def _no_class(label: Any, plain: list[Any], where: str) -> DataError:
    return DataError(
        f"{where}: expected whole numbers from 0 on, or names, found {label!r} in row {plain.index(label)}; "
        "number or name the classes (a score is none: nothing here fits a regression)"
    )


def _plain(label: Any) -> Any:
    """None where there is none; texts without spaces around them; a yes or no as JSON writes it."""
    if isinstance(label, bool):
        return str(label).lower()
    if isinstance(label, str):
        return label.strip() or None
    return None if isinstance(label, float) and math.isnan(label) else label


def _whole(label: Any) -> int | None:
    """The whole number that a label is, or is written as."""
    if isinstance(label, str) and label.removeprefix("-").isdecimal() and len(label) < 20:
        number = int(label)
        return number if str(number) == label else None
    return label if isinstance(label, int) else None


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
