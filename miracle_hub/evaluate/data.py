"""Data for `miracle fit`, `certify` and `compare`: files, folders and Hub data sets, through `datasets`."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from miracle_hub.errors import DataError
from miracle_hub.evaluate.columns import Rows, check_column, text_columns, texts_of
from miracle_hub.evaluate.labels import class_names, class_numbers
from miracle_hub.evaluate.tables import READERS, joined, read_table
from miracle_hub.names import near, offer

_LOGGER = logging.getLogger("miracle_hub")
_PARQUET = ".parquet"
ENDINGS = (*READERS, _PARQUET)
_EVALUATION_SHARE = 0.05  # of data without a split for it: a choice, told in `read_split`
_EVALUATION_NAMES = ("validation", "dev", "test")
# Of rows that are read: what a tokenizer calls its texts.
TEXTS = ("text", "text_pair")


@dataclass(frozen=True)
class Split:
    """Rows to train on and rows to evaluate on.

    Attributes:
        train, evaluation: data sets with the columns `text_columns` and, of a classification, "labels".
        text_columns: one or both of `TEXTS`.
        class_names: by number; none of a language model.
    """

    train: Any
    evaluation: Any
    text_columns: tuple[str, ...]
    class_names: tuple[str, ...]


def read_split(data: str | Path, task: str, wanted: list[str] | None, label_column: str, seed: int) -> Split:
    """Rows of a data set. Without a split for evaluation a twentieth is held back.

    Args:
        wanted: columns of texts.

    Raises:
        DataError: it cannot be read, is empty, or lacks a column or labels; the message lists what there is.
    """
    _require_library()
    sets = read_sets(data)
    first = sets.get("train", next(iter(sets.values())))
    if len(first) < 2:
        raise DataError(f"{data}: expected at least two rows, found {len(first)}; look at the file")
    columns = text_columns(first, str(data), wanted, label_column, task)
    names: tuple[str, ...] = ()
    if task == "text-classification":
        names = _names(first, data, label_column)
    train = _data_set(first, str(data), columns, label_column, names)
    found = next(((name, sets[name]) for name in _EVALUATION_NAMES if name in sets), None)
    if found is None:
        both = train.train_test_split(test_size=max(1, round(len(train) * _EVALUATION_SHARE)), seed=seed)
        return Split(both["train"], both["test"], TEXTS[: len(columns)], names)
    evaluation = _data_set(found[1], f"{data}: {found[0]}", columns, label_column, names)
    return Split(train, evaluation, TEXTS[: len(columns)], names)


def _names(rows: Rows, data: str | Path, label_column: str) -> tuple[str, ...]:
    """
    Raises:
        DataError: there is no such column, or what it has are no classes.
    """
    if label_column not in rows.column_names:
        raise DataError(
            f"{data}: expected labels in a column {label_column!r}, found {rows.column_names}; name the "
            f"column with --label-column ({offer(label_column, rows.column_names)}), or take --task causal-lm"
        )
    feature: Any = getattr(rows, "features", {}).get(label_column)
    if hasattr(feature, "names"):
        return tuple(feature.names)
    return class_names(list(rows[label_column]), f"{data}: column {label_column!r}")


def _data_set(
    rows: Rows, where: str, columns: tuple[str, ...], label_column: str, names: tuple[str, ...]
) -> Any:
    """A data set of the texts and of the numbers of their classes."""
    from datasets import Dataset

    for name in columns:
        check_column(rows, name, where, "--text-columns")
    found: dict[str, list] = dict(
        zip(TEXTS, (texts_of(rows, name, where, blanks=not names) for name in columns), strict=False)
    )
    if names:
        check_column(rows, label_column, where, "--label-column")
        found["labels"] = class_numbers(list(rows[label_column]), names, f"{where}: column {label_column!r}")
    return Dataset.from_dict(found)


def read_examples(
    data: str | Path,
    split: str | None,
    wanted: list[str] | None,
    label_column: str,
    names: tuple[str, ...],
) -> tuple[list[list[str]], list[int]]:
    """All rows of one split: one or two columns of texts, and classes by their number in `names`.

    Raises:
        DataError: it cannot be read, has several splits of which none is named, is empty, or a row lacks a
            text or one of the classes.
    """
    rows = _one_split(data, split)
    if not len(rows) or label_column not in rows.column_names:
        raise DataError(
            f"{data}: expected rows with labels in a column {label_column!r}, found {len(rows)} rows of "
            f"{rows.column_names}; look at the file, or name the column with --label-column "
            f"({offer(label_column, rows.column_names)})"
        )
    labels = class_numbers(list(rows[label_column]), names, f"{data}: column {label_column!r}")
    columns = text_columns(rows, str(data), wanted, label_column, "text-classification")
    return [texts_of(rows, name, str(data), blanks=False) for name in columns], labels


def read_texts(data: str | Path, split: str | None, wanted: list[str] | None, task: str) -> list[list[str]]:
    """One or two columns of the texts of one split; rows without any text are left out, which is logged.

    Raises:
        DataError: it cannot be read, has several splits of which none is named, or no text.
    """
    rows = _one_split(data, split)
    columns = text_columns(rows, str(data), wanted, "label", task)
    texts = list(zip(*(texts_of(rows, name, str(data)) for name in columns), strict=True))
    kept = [row for row in texts if any(text.strip() for text in row)]
    if not kept:
        raise DataError(f"{data}: expected texts, found {len(rows)} rows without any; look at the file")
    if len(kept) < len(texts):
        _LOGGER.warning("%s: %d rows without any text are left out", data, len(texts) - len(kept))
    return [list(column) for column in zip(*kept, strict=True)]


def _one_split(data: str | Path, split: str | None) -> Rows:
    """
    Raises:
        DataError: the data cannot be read, or have several splits of which none is named.
    """
    sets = read_sets(data)
    if split is None and len(sets) == 1:
        split = next(iter(sets))
    if split is None or split not in sets:
        close = f" ({offer(split, sets)})" if near(split, sets) else ""
        raise DataError(
            f"{data}: expected the name of a split among {', '.join(map(str, sets))}, found {split!r}; name "
            f"it with --split{close}"
        )
    return sets[split]


def read_sets(data: str | Path) -> Mapping[str, Rows]:
    """Splits by name.

    Raises:
        DataError: the library is missing, or it cannot read the data.
    """
    path = Path(data)
    ending = path.suffix.lower()
    if ending in READERS and path.is_file():
        return {"train": read_table(path)}
    _require_library()
    try:
        if ending in ENDINGS and not path.exists():  # rather than ask the Hub for it
            raise FileNotFoundError("no such file")
        with _quiet("datasets"):  # what it says of a file is in our error
            return _by_library(data, path)
    except DataError:
        raise
    except Exception as error:
        is_misspelled = not path.exists() and path.parent.is_dir()
        close = near(path.name, (other.name for other in path.parent.iterdir())) if is_misspelled else []
        raise DataError(
            f"{data}: expected a file ({', '.join(ENDINGS)}), a folder of datasets or a Hub id, found "
            f"{type(error).__name__}: {str(error).partition(chr(10))[0]}; check the name"
            f"{f' ({offer(path.name, close)})' if close else ''} and the contents"
        ) from error


def _require_library() -> None:
    """
    Raises:
        DataError: it is missing.
    """
    try:
        import datasets  # noqa: F401
    except ImportError as error:
        raise DataError(
            "data: expected the package datasets, found none; pip install 'miracle-hub[fit]'"
        ) from error


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)


def _by_library(data: str | Path, path: Path) -> Mapping[str, Rows]:
    from datasets import load_dataset, load_dataset_builder, load_from_disk

    loaded: Any
    if path.is_file():
        if path.suffix.lower() != _PARQUET:
            raise ValueError(f"a file that ends in {path.suffix!r}")
        loaded = load_dataset("parquet", data_files=str(path))
        return {str(name): rows for name, rows in loaded.items()}
    if path.is_dir() and any((path / name).exists() for name in ("state.json", "dataset_dict.json")):
        loaded = load_from_disk(str(path))
        sets = loaded if isinstance(loaded, dict) else {"train": loaded}
        return {str(name): rows for name, rows in sets.items()}
    builder = load_dataset_builder(str(data))
    files: Mapping[Any, list[str]] = builder.config.data_files or {}
    described = path / "README.md"  # which may say how its files are to be read
    ours = all(Path(file).suffix.lower() in READERS for split in files.values() for file in split)
    if path.is_dir() and files and ours and not described.exists():
        return {
            str(split): joined([read_table(Path(file)) for file in names], str(data))
            for split, names in files.items()
        }
    options: dict[str, Any] = {"keep_default_na": False, "na_filter": False} if builder.name == "csv" else {}
    loaded = load_dataset(str(data), **options)
    return {str(name): rows for name, rows in loaded.items()}
