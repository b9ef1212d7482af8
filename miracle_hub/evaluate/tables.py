"""A file of data → its columns, every value as it was written: none is taken for a missing value, a date or
a number.

Readers that guess types make None of "NA", "null" and "nan", numbers of "007", and dates of others.
"""

import csv
import io
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from miracle_hub.errors import DataError

_ENCODING = "utf-8-sig"  # with or without a byte-order mark
_LONGEST_FIELD = 2**31 - 1
Numbered = list[tuple[int, list[str]]]  # rows with the lines that they end in


@dataclass(frozen=True)
class Table:
    """Columns by name, all of one length.

    Attributes:
        nothing: the text that stands for no value too, as an empty field does in csv; None where none does.
    """

    columns: dict[str, list[Any]]
    nothing: str | None = None

    @property
    def column_names(self) -> list[str]:
        """In the file's order."""
        return list(self.columns)

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), []))

    def __getitem__(self, name: str) -> list[Any]:
        return self.columns[name]


def read_table(path: Path, ending: str = "") -> Table:
    """The rows of a file.

    Args:
        ending: one of `READERS`; by default the file's own.

    Raises:
        DataError: it is not what its ending says; the message has the line.
    """
    try:
        text = path.read_bytes().decode(_ENCODING)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: expected text in UTF-8, found byte {error.object[error.start]:#04x} at position "
            f"{error.start}; save the file as UTF-8"
        ) from error
    except OSError as error:
        raise DataError(f"{path}: expected a file that can be read, found {error}; look there") from error
    kind = ending or path.suffix.lower()
    if not text or (kind != ".txt" and not text.strip()):
        raise DataError(
            f"{path}: expected a file ({', '.join(READERS)}) with rows, found an empty one; look at the file"
        )
    table = READERS[kind](text, path)
    if not len(table):
        raise DataError(
            f"{path}: expected a file ({', '.join(READERS)}) with rows, found names of columns alone "
            f"({table.column_names}); look at the file"
        )
    return table


def joined(tables: list[Table], where: str) -> Table:
    """The rows of several files, one after the other.

    Raises:
        DataError: they have different columns.
    """
    first = tables[0].column_names
    for table in tables[1:]:
        if set(table.column_names) != set(first):
            raise DataError(
                f"{where}: expected files of the same columns, found {first} and {table.column_names}; give "
                "them equal ones, or name one file"
            )
    columns = {name: [value for table in tables for value in table[name]] for name in first}
    return Table(columns, tables[0].nothing)


def _csv(text: str, path: Path) -> Table:
    try:
        return _table(_quoted(text, ","), path)
    except csv.Error as error:
        raise DataError(
            f"{path}: expected rows of csv with quotes in pairs, found {error}; put texts with quotes, "
            "commas or line breaks between quotes, and double the quotes in them"
        ) from error


def _tsv(text: str, path: Path) -> Table:
    """Without quoting, as GLUE has it: a quote is a character of a text.

    Raises:
        DataError: as for `_table`; or the quotes may as well be those of csv, and texts would be others.
    """
    lines = text.removesuffix("\n").split("\n")
    if lines[0].endswith("\r"):
        lines = [line.removesuffix("\r") for line in lines]
    rows = [(number, line.split("\t")) for number, line in enumerate(lines, 1)]
    if at := _line_of_quoting(text, rows):
        raise DataError(
            f"{path}: expected texts in which a quote is a character like others, found what may be quoting "
            f"in line {at}; save the file as csv or jsonl, which tell the two apart"
        )
    return _table(rows, path)


def _line_of_quoting(text: str, plain: Numbered) -> int | None:
    """Where a writer of csv seems to have put a text between quotes, because it held a tab, a line break or
    a quote, or puts all of them there; None where the quotes are of texts, or there are none."""
    if not any(field.startswith('"') for _, row in plain for field in row):
        return None
    try:
        quoted = _quoted(text, "\t")
    except csv.Error:
        return None
    header = quoted[0][1]
    if any(len(row) not in (0, len(header)) for _, row in quoted):
        return None
    if header != plain[0][1]:
        return 1
    fields = {field for _, row in plain for field in row}
    for number, row in quoted:
        if any(field not in fields and any(mark in field for mark in '\t\n\r"') for field in row):
            return number
    return None


def _quoted(text: str, separator: str) -> Numbered:
    """
    Raises:
        csv.Error: quotes are not in pairs.
    """
    with _long_fields():
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
        return [(reader.line_num, row) for row in reader]


@contextmanager
def _long_fields() -> Iterator[None]:
    """Lift the limit of a field's length, which is one of the whole process."""
    before = csv.field_size_limit(_LONGEST_FIELD)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _table(rows: Numbered, path: Path) -> Table:
    """Columns under the names of the first row; of several columns a blank line is no row.

    Raises:
        DataError: a name is there twice, or a row is longer or shorter than the first one.
    """
    start = next((at for at, (_, row) in enumerate(rows) if row not in ([], [""])), 0)
    (_, header), *others = rows[start:]
    if twice := [name for name, count in Counter(header).items() if count > 1]:
        raise DataError(
            f"{path}: expected a name for every column, found {twice[0]!r} twice in line 1; rename one"
        )
    if len(header) > 1:
        others = [(number, row) for number, row in others if row not in ([], [""])]
    rows = _of_width(others, len(header), path)
    columns = {name: [row[i] if row else "" for _, row in rows] for i, name in enumerate(header)}
    return Table(columns, nothing="")


def _of_width(rows: Numbered, width: int, path: Path) -> Numbered:
    """
    Raises:
        DataError: a row has more or fewer values than there are names.
    """
    for number, row in rows:
        if len(row) != width and (width > 1 or row):
            raise DataError(
                f"{path}: line {number}: expected {width} values, as line 1 has names, found {len(row)}; "
                "complete the line, or, where a text holds separators or line breaks, save the file as jsonl"
            )
    return rows


def _txt(text: str, path: Path) -> Table:
    """A text per line."""
    lines = text.replace("\r\n", "\n").replace("\r", "\n").removesuffix("\n").split("\n")
    return Table({"text": lines})


def _jsonl(text: str, path: Path) -> Table:
    lines = enumerate(text.split("\n"), 1)
    return _records(
        (_parsed(line, f"{path}: line {n}"), f"{path}: line {n}") for n, line in lines if line.strip()
    )


def _json(text: str, path: Path) -> Table:
    """A list of rows, an object of columns, or rows line by line.

    Raises:
        DataError: it is none of these.
    """
    try:
        found = _parsed(text, str(path))
    except DataError:
        if "\n" not in text.strip():
            raise
        return _jsonl(text, path)
    if isinstance(found, list):
        return _records((row, f"{path}: row {i}") for i, row in enumerate(found))
    are_lists = isinstance(found, dict) and all(isinstance(column, list) for column in found.values())
    if are_lists and len({len(column) for column in found.values()}) == 1:
        return Table(found)
    return _records([(found, str(path))])


def _records(rows: Iterable[tuple[Any, str]]) -> Table:
    """
    Args:
        rows: values of JSON, with where they are.

    Raises:
        DataError: one is neither an object nor a text.
    """
    found: list[dict[str, Any]] = []
    for row, where in rows:
        if not isinstance(row, dict | str):
            raise DataError(
                f"{where}: expected an object of JSON per row, found {str(row)[:80]!r}; correct it"
            )
        found.append({"text": row} if isinstance(row, str) else row)
    names = dict.fromkeys(name for row in found for name in row)
    return Table({name: [row.get(name) for row in found] for name in names})


def _parsed(text: str, where: str) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        if twice := [name for name, count in Counter(names).items() if count > 1]:
            raise DataError(f"{where}: expected each name once, found {twice[0]!r} twice; rename one")
        return dict(pairs)

    try:
        return json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{where}: expected JSON, found {error}; correct it") from error


READERS: dict[str, Callable[[str, Path], Table]] = {
    ".csv": _csv,
    ".tsv": _tsv,
    ".json": _json,
    ".jsonl": _jsonl,
    ".txt": _txt,
}
