"""Which columns of data are texts: those that are named, or those that can be no others; and their texts."""

import logging
from typing import Any, Protocol

from miracle_hub.errors import DataError
from miracle_hub.names import offer

_LOGGER = logging.getLogger("miracle_hub")
_MOST_COLUMNS = 2  # that a tokenizer takes
_USUAL = "text"  # the name that the Hub's data sets have for one
# Of texts, the share that has a blank in it: a choice that ids and names of classes stay far below.
_SHARE_WITH_BLANKS = 0.5
_NO_TEXTS = ("", "true", "false", "na", "n/a", "none", "null")


class Rows(Protocol):
    """Columns by name: a `Table`, or a data set of `datasets`."""

    @property
    def column_names(self) -> list[str]:
        """In their order."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, name: str, /) -> Any: ...


def check_column(rows: Rows, name: str, where: str, option: str) -> None:
    """Refuse a name that no column has.

    Raises:
        DataError: there is none.
    """
    if name not in rows.column_names:
        raise DataError(
            f"{where}: expected a column {name!r}, found {rows.column_names}; name it with {option} "
            f"({offer(name, rows.column_names)})"
        )


def text_columns(
    rows: Rows, where: str, wanted: list[str] | None, label_column: str, task: str
) -> tuple[str, ...]:
    """One column of texts, or, unless the task is "causal-lm", two.

    Args:
        wanted: by the user; None means those that can be no others.

    Raises:
        DataError: they are not there, are labels, or it is not clear which they are.
    """
    if wanted is not None:
        return _named(rows, where, wanted, label_column, task)
    others = [name for name in rows.column_names if name != label_column]
    found = [name for name in others if _has_texts(rows, name)]
    if not found and len(others) == 1:
        found = others
    if task == "causal-lm" and len(found) > 1 and _USUAL in found:
        _LOGGER.warning("%s: texts are those of column %r, of %s", where, _USUAL, found)
        found = [_USUAL]
    if len(found) == 1:
        return tuple(found)
    if len(found) == _MOST_COLUMNS and task != "causal-lm" and all(_are_sentences(rows, n) for n in found):
        _LOGGER.warning(
            "%s: texts are pairs of columns %r and %r (--text-columns names others)", where, *found
        )
        return tuple(found)
    what = (
        f"{len(found)} that may be ({', '.join(map(repr, found))})" if found else "none that is one for sure"
    )
    raise DataError(
        f"{where}: expected one or two columns of text, found {what} in {rows.column_names}; name them with "
        "--text-columns, once for each"
    )


def sentence_columns(rows: Rows, where: str) -> tuple[str, ...]:
    """All columns of sentences; or the one that may be of texts, if there is one alone.

    Raises:
        DataError: there is none, or it is not clear which.
    """
    found = [name for name in rows.column_names if _has_texts(rows, name)]
    sentences = found if len(found) <= 1 else [name for name in found if _are_sentences(rows, name)]
    if not sentences:
        raise DataError(
            f"{where}: expected columns of texts, found {len(found)} that may be in {rows.column_names}, "
            "none of them of sentences; give a txt of the texts alone, or a list of them"
        )
    return tuple(sentences)


def _named(rows: Rows, where: str, wanted: list[str], label_column: str, task: str) -> tuple[str, ...]:
    most = 1 if task == "causal-lm" else _MOST_COLUMNS
    if absent := [name for name in wanted if name not in rows.column_names]:
        raise DataError(
            f"{where}: expected one or two columns of text, found {wanted} in {rows.column_names}; "
            f"name them with --text-columns ({offer(absent[0], rows.column_names)})"
        )
    if not 1 <= len(wanted) <= most or len(set(wanted)) < len(wanted) or label_column in wanted:
        count = "one column of text" if most == 1 else "one or two columns of text"
        raise DataError(
            f"{where}: expected {count}, none twice and none the labels ({label_column!r}), found {wanted}; "
            "name them with --text-columns"
        )
    return tuple(wanted)


def texts_of(rows: Rows, name: str, where: str, *, blanks: bool = True) -> list[str]:
    """The texts of a column.

    Args:
        blanks: take a field of csv without anything in it for an empty text, not for a missing one.

    Raises:
        DataError: a row has none, a number, or what is no text in Unicode.
    """
    texts, nothing = list(rows[name]), None if blanks else getattr(rows, "nothing", None)
    for row, text in enumerate(texts):
        at = f"{where}: column {name!r}: row {row}"
        if not isinstance(text, str) or text == nothing:
            found = (
                "none" if text is None or text == nothing else f"{str(text)[:40]!r} ({type(text).__name__})"
            )
            raise DataError(f"{at}: expected a text, found {found}; complete it, or name another column")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DataError(f"{at}: expected a text in Unicode, found {error.reason}; correct it") from error
    return texts


def _has_texts(rows: Rows, name: str) -> bool:
    """Whether a column may be one of texts: not of numbers, of yes and no, or of nothing."""
    types: Any = getattr(rows, "features", None)
    if types is not None and getattr(types[name], "dtype", "") not in ("string", "large_string"):
        return False
    return any(_is_text(value) for value in rows[name])


def _is_text(value: Any) -> bool:
    """Not so by itself: a number, a yes or no, and what stands for nothing."""
    if not isinstance(value, str) or value.strip().casefold() in _NO_TEXTS:
        return False
    try:
        float(value)
    except ValueError:
        return True
    return False


def _are_sentences(rows: Rows, name: str) -> bool:
    values = list(rows[name])
    return sum(isinstance(v, str) and " " in v.strip() for v in values) >= _SHARE_WITH_BLANKS * len(values)
