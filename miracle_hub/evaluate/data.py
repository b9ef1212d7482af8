"""Data for `miracle fit`, `certify` and `compare`: files, folders and Hub data sets, through `datasets`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from miracle_hub.errors import DataError

# What each ending means to `datasets`.
_FORMATS = {
    ".csv": ("csv", {}),
    ".tsv": ("csv", {"sep": "\t", "quoting": 3}),
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".parquet": ("parquet", {}),
    ".txt": ("text", {}),
}
_EVALUATION_SHARE = 0.05  # of data without a split for it: a choice, told in `read_split`
_EVALUATION_NAMES = ("validation", "dev", "test")


@dataclass(frozen=True)
class Split:
    """Rows to train on and rows to evaluate on; labels are whole numbers in the column "labels"."""

    train: Any
    evaluation: Any
    text_columns: tuple[str, ...]
    class_names: tuple[str, ...]


def read_split(
    data: str | Path, task: str, text_columns: list[str] | None, label_column: str, seed: int
) -> Split:
    """Rows of a data set. Without a split for evaluation a twentieth is held back.

    Raises:
        DataError: it cannot be read, is empty, or lacks a column or labels; the message lists what there is.
    """
    sets = _load(data)
    train = sets.get("train", next(iter(sets.values())))
    if len(train) < 2:
        raise DataError(f"{data}: expected at least two rows, found {len(train)}; look at the file")
    texts = _text_columns(train, data, text_columns, label_column, task)
    names: tuple[str, ...] = ()
    evaluation = next((sets[name] for name in _EVALUATION_NAMES if name in sets), None)
    if evaluation is None:
        both = train.train_test_split(test_size=max(1, round(len(train) * _EVALUATION_SHARE)), seed=seed)
        train, evaluation = both["train"], both["test"]
    if task == "text-classification":
        names = _class_names(train, data, label_column)
        train, evaluation = (_numbered(rows, data, label_column, names) for rows in (train, evaluation))
    return Split(train, evaluation, texts, names)


def read_examples(
    data: str | Path,
    split: str | None,
    text_columns: list[str] | None,
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
            f"{rows.column_names}; look at the file, or name the column with --label-column"
        )
    labels = [_class_number(label, data, label_column, names) for label in rows[label_column]]
    columns = _text_columns(rows, data, text_columns, label_column, "text-classification")
    texts = [list(rows[column]) for column in columns]
    for column, found in zip(columns, texts, strict=True):
        if None in found:
            raise DataError(
                f"{data}: column {column!r}: row {found.index(None)}: expected a text, found none; "
                "complete it"
            )
    return texts, labels


def read_texts(
    data: str | Path, split: str | None, text_columns: list[str] | None, task: str
) -> list[list[str]]:
    """One or two columns of the texts of one split; rows without any text are left out.

    Raises:
        DataError: it cannot be read, has several splits of which none is named, or no text.
    """
    rows = _one_split(data, split)
    columns = _text_columns(rows, data, text_columns, "label", task)
    texts = list(zip(*([text or "" for text in rows[column]] for column in columns), strict=True))
    kept = [row for row in texts if any(text.strip() for text in row)]
    if not kept:
        raise DataError(f"{data}: expected texts, found {len(rows)} rows without any; look at the file")
    return [list(column) for column in zip(*kept, strict=True)]


def _one_split(data: str | Path, split: str | None) -> Any:
    """
    Raises:
        DataError: the data cannot be read, or have several splits of which none is named.
    """
    sets = _load(data)
    if split is None and len(sets) == 1:
        split = next(iter(sets))
    if split not in sets:
        raise DataError(
            f"{data}: expected the name of a split among {', '.join(map(str, sets))}, found {split!r}; name "
            "it with --split"
        )
    return sets[split]


def _load(data: str | Path) -> Any:
    """Splits by name.

    Raises:
        DataError: the library is missing, or it cannot read the data.
    """
    try:
        from datasets import load_dataset, load_from_disk
    except ImportError as error:
        raise DataError(
            "data: expected the package datasets, found none; pip install 'miracle-hub[fit]'"
        ) from error
    path = Path(data)
    try:
        if path.suffix in _FORMATS and not path.exists():  # rather than ask the Hub for it
            raise FileNotFoundError("no such file")
        if path.is_file() and path.suffix in _FORMATS:
            kind, options = _FORMATS[path.suffix]
            return dict(load_dataset(kind, data_files=str(path), **options))
        if path.is_dir() and any((path / name).exists() for name in ("state.json", "dataset_dict.json")):
            loaded = load_from_disk(str(path))
            return dict(loaded) if isinstance(loaded, dict) else {"train": loaded}
        return dict(load_dataset(str(data)))
    except Exception as error:
        raise DataError(
            f"{data}: expected a file ({', '.join(_FORMATS)}), a folder of datasets or a Hub id, found "
            f"{type(error).__name__}: {str(error).partition(chr(10))[0]}; check the name and the contents"
        ) from error


def _text_columns(
    rows: Any, data: str | Path, wanted: list[str] | None, label_column: str, task: str
) -> tuple[str, ...]:
    strings = [
        name
        for name, feature in rows.features.items()
        if getattr(feature, "dtype", "") in ("string", "large_string") and name != label_column
    ]
    chosen = wanted if wanted is not None else strings[: 1 if task == "causal-lm" else 2]
    if not chosen or len(chosen) > 2 or any(name not in rows.column_names for name in chosen):
        raise DataError(
            f"{data}: expected one or two columns of text, found {chosen} in {rows.column_names}; "
            "name them with --text-columns"
        )
    return tuple(chosen)


def _class_names(rows: Any, data: str | Path, label_column: str) -> tuple[str, ...]:
    if label_column not in rows.column_names:
        raise DataError(
            f"{data}: expected labels in a column {label_column!r}, found {rows.column_names}; name the "
            "column with --label-column, or take --task causal-lm"
        )
    feature = rows.features[label_column]
    if hasattr(feature, "names"):
        return tuple(feature.names)
    found = rows.unique(label_column)
    if any(label is None or isinstance(label, float) for label in found) or len(found) < 2:
        raise DataError(
            f"{data}: column {label_column!r}: expected a class for every row, of two classes or more, found "
            f"{sorted(map(str, found))[:4]}; complete the labels"
        )
    if all(isinstance(label, int) for label in found):
        if min(found) < 0 or max(found) >= 2**16:
            raise DataError(
                f"{data}: column {label_column!r}: expected whole numbers from 0 on, found {min(found)} to "
                f"{max(found)}; number the classes"
            )
        return tuple(str(i) for i in range(max(found) + 1))
    return tuple(sorted(map(str, found)))


def _numbered(rows: Any, data: str | Path, label_column: str, names: tuple[str, ...]) -> Any:
    """Rows with their class as a number in "labels"."""

    def one(row: dict[str, Any]) -> dict[str, int]:
        return {"labels": _class_number(row[label_column], data, label_column, names)}

    return rows.map(one)


def _class_number(label: Any, data: str | Path, label_column: str, names: tuple[str, ...]) -> int:
    number = label if isinstance(label, int) else names.index(str(label)) if str(label) in names else -1
    if not 0 <= number < len(names):
        raise DataError(
            f"{data}: column {label_column!r}: expected one of {names[:8]}, found {label!r}; complete "
            "the labels"
        )
    return int(number)
