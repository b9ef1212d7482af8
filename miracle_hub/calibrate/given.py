"""The user's own data → rows of what a model takes: files, folders, data sets, tensors; without labels."""

import logging
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from miracle_hub.calibrate.arrays import as_numpy, rows_of_arrays, rows_of_batches
from miracle_hub.calibrate.asked import NONE, SELF
from miracle_hub.calibrate.modality import Modality, main_input, modality_of, takes_texts
from miracle_hub.calibrate.rows import Found, order_of, rows_of_batch, tokens_of
from miracle_hub.calibrate.sounds import Sound, read_sound, sound_paths, sound_rows
from miracle_hub.calibrate.texts import Texts, text_rows
from miracle_hub.calibrate.written import answered
from miracle_hub.errors import DataError
from miracle_hub.evaluate.batches import (
    IMAGE_ENDINGS,
    image_paths,
    prepared,
    read_image,
    read_npz,
    read_processor,
    read_tokenizer,
)
from miracle_hub.evaluate.columns import Rows, sentence_columns, text_columns, texts_of
from miracle_hub.evaluate.data import ENDINGS, read_sets
from miracle_hub.evaluate.tables import Table

_LOGGER = logging.getLogger("miracle_hub")
_ARRAYS = (".npz", ".npy")
_ANSWER = 64  # tokens of an answer that a dense model writes, at most
_MOST_TEXTS = 1_000_000  # that are taken of an iterable, which may have no end


def rows_of(
    model: nn.Module, folder: Path, data: Any, *, wanted: int, max_length: int | None, seed: int
) -> Found:
    """Rows that have `wanted` tokens together, or all that there are, drawn at random from data.

    Raises:
        DataError: they cannot be read, or are none that the model takes. SourceError: there is no tokenizer,
            processor or feature extractor beside the model.
    """
    modality = modality_of(model)
    found = _kind(data)
    if isinstance(found, Path) and found.suffix.lower() in _ARRAYS:
        return _arrays(model, _named_arrays(model, found), str(found), wanted, seed)
    if isinstance(found, Mapping) and not _is_table(found):
        return _arrays(model, {n: as_numpy(x) for n, x in found.items()}, "arrays", wanted, seed)
    if modality is Modality.ARRAY or _is_of_batches(found):
        if isinstance(found, Iterable) and not isinstance(found, str | Path):
            return rows_of_batches(model, found, wanted)
        raise _refusal(data, modality, "a file of no arrays; save an npz of its inputs")
    if takes_texts(modality):
        return _texts(model, folder, found, modality, wanted, max_length, seed)
    if modality is Modality.IMAGE:
        return _images(folder, found, wanted, seed)
    return _sounds(model, folder, found, modality, wanted, seed)


def _kind(data: Any) -> Any:
    """A path of what is there, else an id on the Hub; a tensor as the main input; the split to learn from."""
    if isinstance(data, str | Path):
        path = Path(data)
        if str(data).lower() in (SELF, NONE) and not _exists(path):
            raise DataError(
                f"calibrate: expected {SELF} or {NONE} in small letters, found {data!r}; write it so"
            )
        is_file = _exists(path) or path.suffix.lower() in (*ENDINGS, *_ARRAYS, *IMAGE_ENDINGS, ".wav")
        if is_file and not _exists(path):
            read_sets(path)  # says what is there of a like name
            raise DataError(f"{path}: expected a file or folder, found none; check the name")
        return path if is_file else str(data)
    if isinstance(data, Tensor | np.ndarray):
        return {"": data}
    if isinstance(data, Mapping) and data and all(_is_table(rows) for rows in data.values()):
        return data["train"] if "train" in data else next(iter(data.values()))
    if isinstance(data, list | tuple | Mapping) or _is_table(data):
        return data
    if not isinstance(data, Iterable):
        raise DataError(
            "data: expected a file, a folder, an id on the Hub, texts, a data set, or a model's inputs, "
            f"found {type(data).__name__}; give one of these"
        )
    rest = iter(data)
    first = list(islice(rest, 1))
    return [*first, *islice(rest, _MOST_TEXTS)] if first and isinstance(first[0], str) else chain(first, rest)


def _exists(path: Path) -> bool:
    """
    Raises:
        DataError: no file can have such a name.
    """
    try:
        return path.exists()
    except (OSError, ValueError) as error:
        raise DataError(
            f"{str(path)[:40]!r}…: expected a file, a folder or an id on the Hub, found what no file "
            f"can be called ({type(error).__name__}); give texts themselves as a list of them"
        ) from error


def _is_table(data: Any) -> bool:
    return hasattr(data, "column_names")


def _is_of_batches(data: Any) -> bool:
    """Whether it gives what a model takes, and not texts or images to be made that of."""
    if isinstance(data, list | tuple):
        first = data[0] if data else None
        is_sound = (
            isinstance(first, dict)
            and "array" in first
            or isinstance(first, tuple)
            and isinstance(first[-1], int)
        )
        return not is_sound and isinstance(first, Mapping | Tensor | tuple | list | np.ndarray)
    return isinstance(data, Iterable) and not isinstance(data, str | Path | Mapping) and not _is_table(data)


def _named_arrays(model: nn.Module, path: Path) -> Mapping[str, np.ndarray]:
    """
    Raises:
        DataError: it cannot be read.
    """
    if path.suffix.lower() == ".npz":
        return read_npz(path)
    try:
        return {main_input(model): np.load(path, allow_pickle=False)}
    except (OSError, ValueError, EOFError) as error:
        raise DataError(
            f"{path}: expected an array of numbers, found {error}; save it with np.save"
        ) from error


def _arrays(model: nn.Module, arrays: Mapping[str, np.ndarray], where: str, wanted: int, seed: int) -> Found:
    named = {name or main_input(model): values for name, values in arrays.items()}
    return rows_of_arrays(model, named, where, wanted, seed)


def _texts(
    model: Any, folder: Path, data: Any, modality: Modality, wanted: int, max_length: int | None, seed: int
) -> Found:
    """
    Raises:
        DataError: they are no texts, or too few. SourceError: there is no tokenizer.
    """
    texts = _read_texts(data, modality, type(model).__name__)
    rows = text_rows(model, read_tokenizer(folder), texts, modality, wanted, max_length, seed)
    if modality is Modality.TRANSLATION:
        rows = answered(model, rows, _ANSWER, None)
    return Found(rows, texts.where, texts.said)


def _read_texts(data: Any, modality: Modality, model: str) -> Texts:
    """
    Raises:
        DataError: they are no texts.
    """
    if isinstance(data, list | tuple):
        data = Table({"text": list(data)})
    if isinstance(data, Path) and not _may_be_texts(data):
        raise _refusal(data, modality, f"{_what(data)}; {model} takes texts")
    where = str(data) if isinstance(data, str | Path) else "data"
    rows: Rows = _train(read_sets(data), where) if isinstance(data, str | Path) else data
    are_lines = isinstance(data, Path) and data.suffix.lower() == ".txt"
    names = _names(rows, where, is_of_pairs="ForSequenceClassification" in model, are_lines=are_lines)
    columns = [texts_of(rows, name, where) for name in names]
    if "ForSequenceClassification" not in model:
        columns = [list(chain.from_iterable(columns))]
    kept = [row for row in zip(*columns, strict=True) if are_lines or any(text.strip() for text in row)]
    if not any(text.strip() for row in kept for text in row):
        raise DataError(f"{where}: expected texts, found {len(rows)} rows without any; look at the data")
    others = [name for name in rows.column_names if name not in names]
    aside = f" (not used: {', '.join(map(repr, others))})" if others else ""
    said = f"{len(kept):,} {'lines' if are_lines else 'texts'}{aside}"
    return Texts([list(column) for column in zip(*kept, strict=True)], _short(data), said, are_lines)


def _names(rows: Rows, where: str, *, is_of_pairs: bool, are_lines: bool) -> tuple[str, ...]:
    """Columns of texts.

    Raises:
        DataError: there is none, or it is not clear which.
    """
    if are_lines or len(rows.column_names) == 1:
        return tuple(rows.column_names)
    if is_of_pairs:
        return text_columns(rows, where, None, "label", "text-classification")
    return sentence_columns(rows, where)


def _may_be_texts(path: Path) -> bool:
    if path.is_file():
        return path.suffix.lower() in ENDINGS
    return not any(p.suffix.lower() in (*IMAGE_ENDINGS, ".wav") for p in path.rglob("*"))


def _train(sets: Mapping[str, Rows], where: str) -> Rows:
    """The rows to learn from, of several splits; which is logged."""
    name = "train" if "train" in sets else next(iter(sets))
    if len(sets) > 1:
        _LOGGER.info("%s: calibrated on split %r of %s", where, name, list(sets))
    return sets[name]


def _images(folder: Path, data: Any, wanted: int, seed: int) -> Found:
    """
    Raises:
        DataError: they are no images. SourceError: there is no processor.
    """
    is_path = isinstance(data, Path)
    if is_path and data.is_file() and data.suffix.lower() not in (*IMAGE_ENDINGS, ".txt"):
        raise _refusal(data, Modality.IMAGE, _what(data))
    sources: Any = image_paths(data) if is_path else _column_of(data, Modality.IMAGE)
    processor, rows, total = read_processor([folder]), [], 0
    for i in order_of(len(sources), seed):
        image = read_image(sources[i]) if is_path else _rgb(sources[i])
        rows += rows_of_batch(prepared([image], processor))
        total += tokens_of(rows[-1])
        if total >= wanted:
            break
    return Found(rows, _short(data), f"{len(rows):,} of {len(sources):,} images")


def _rgb(image: Any) -> Any:
    """
    Raises:
        DataError: it is no image.
    """
    if not hasattr(image, "convert"):
        raise DataError(
            f"data: expected images of PIL, found {type(image).__name__}; give an npz of pixel_values"
        )
    return image.convert("RGB")


def _sounds(model: Any, folder: Path, data: Any, modality: Modality, wanted: int, seed: int) -> Found:
    """
    Raises:
        DataError: they are no sounds.
    """
    if isinstance(data, Path):
        paths = sound_paths(data)
        sounds: Iterator[Sound] = (read_sound(paths[i]) for i in order_of(len(paths), seed))
        said = f"{len(paths):,} sounds"
    else:
        column = _column_of(data, modality)
        sounds = (Sound.of(column[i], f"data: row {i}") for i in order_of(len(column), seed))
        said = f"{len(column):,} sounds"
    rows = sound_rows(model, folder, sounds, wanted)
    if modality is Modality.SPEECH:
        rows = answered(model, rows, _ANSWER, None)
        said += ", what is said written by the model"
    return Found(rows, _short(data), said)


def _column_of(data: Any, modality: Modality) -> Any:
    """The column of a data set, or of a list, that has images or sounds.

    Raises:
        DataError: there is none.
    """
    if isinstance(data, list | tuple):
        return data
    rows: Any = _train(read_sets(data), data) if isinstance(data, str) else data
    wanted = "Image" if modality is Modality.IMAGE else "Audio"
    features = getattr(rows, "features", None) or {}
    found = [name for name, feature in features.items() if type(feature).__name__ == wanted]
    if len(found) != 1:
        raise _refusal(_short(data), modality, f"{len(found)} columns of type {wanted}")
    return rows[found[0]]


def _what(path: Path) -> str:
    """What a path is, in words."""
    if path.is_dir():
        return "a folder of images or sounds" if not _may_be_texts(path) else "a folder without any"
    return f"a file that ends in {path.suffix!r}" if path.suffix else "a file without an ending"


def _refusal(data: Any, modality: Modality, found: str) -> DataError:
    return DataError(
        f"{data}: expected data of a model that takes {modality.value}, found {found}; give others, an npz "
        "of its inputs, or leave them to the model (--calibrate self)"
    )


def _short(data: Any) -> str:
    if isinstance(data, Path):
        return data.name
    return data if isinstance(data, str) else "data"
