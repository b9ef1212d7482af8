"""What a model is asked, in batches in which no row feels the others: texts of one length, images, arrays."""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer

from miracle_hub.errors import DataError, MiracleError, SourceError
from miracle_hub.evaluate.tables import read_table
from miracle_hub.names import offer

# Without any of them transformers makes some tokenizers up, which know no word.
_TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model")
_PROCESSOR = "preprocessor_config.json"
IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff")
_POSITIONS = ("position_embeddings", "position_embedding", "embed_positions", "wpe")
_MASKED_STRIDE = 7  # about as many tokens as BERT's training masks

# Inputs by name, and the positions whose answers count: None means all.
Batches: TypeAlias = Iterator[tuple[dict[str, Tensor], Tensor | None]]


def read_model_config(source: str | Path) -> Any:
    """
    Raises:
        SourceError: there is no config.json of a model of transformers.
    """
    try:
        return AutoConfig.from_pretrained(source)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        if isinstance(error, MiracleError):
            raise
        said = str(error).strip().partition("\n")[0]
        raise SourceError(
            f"{source}: expected a model of transformers, with its config.json, found none ({said}); give a "
            "folder written by save_pretrained, or a Hub id"
        ) from error


def read_tokenizer(folder: Path) -> Any:
    """
    Raises:
        SourceError: there is no tokenizer beside the model.
    """
    if not any(next(folder.glob(name), None) for name in _TOKENIZER_FILES):
        raise SourceError(
            f"{folder}: expected a tokenizer beside the model, found none of {', '.join(_TOKENIZER_FILES)}; "
            "save it there with tokenizer.save_pretrained"
        )
    return tokenizer_of(folder)


def tokenizer_of(source: str | Path) -> Any:
    """
    Raises:
        SourceError: a folder's or Hub repository's tokenizer cannot be read.
    """
    try:
        return AutoTokenizer.from_pretrained(source)
    except Exception as error:
        raise SourceError(
            f"{source}: expected a tokenizer that transformers reads, found {type(error).__name__}: "
            f"{str(error).partition(chr(10))[0]}; save it there with tokenizer.save_pretrained"
        ) from error


def tokenized(tokenizer: Any, texts: Sequence[list[str]], max_length: int) -> dict[str, list[list[int]]]:
    """What a model takes, by name, a list of numbers per row.

    Raises:
        DataError: a text has no token.
    """
    inputs = dict(tokenizer(*texts, truncation=True, max_length=max_length))
    if [] in inputs["input_ids"]:
        row = inputs["input_ids"].index([])
        raise DataError(
            f"data: row {row}: expected a text of at least one token, found none in "
            f"{' and '.join(repr(column[row][:40]) for column in texts)}; complete it"
        )
    return inputs


def check_fits(model: Any, inputs: Mapping[str, list[list[int]]]) -> None:
    """Refuse tokens that a model has no embedding for, and texts that are longer than its positions.

    Raises:
        SourceError: the tokenizer is of another model.
        DataError: a text is too long.
    """
    largest, longest = (max(map(of, inputs["input_ids"]), default=0) for of in (max, len))
    known = getattr(model.get_input_embeddings(), "num_embeddings", largest + 1)
    if largest >= known:
        raise SourceError(
            f"tokenizer: expected tokens below {known}, of which the model has embeddings, found {largest}; "
            "save the model's own tokenizer beside it"
        )
    if longest > (most := most_positions(model)):
        raise DataError(
            f"data: expected texts of at most {most} tokens, as the model has positions, found one of "
            f"{longest}; cut them with --max-length {most}"
        )


def most_positions(model: nn.Module) -> float:
    """How many tokens have embeddings by position, of which some begin later; rotary ones have no end."""
    found = [math.inf]
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in _POSITIONS and isinstance(module, nn.Embedding):
            first = 0 if module.padding_idx is None else module.padding_idx + 1
            found.append(module.num_embeddings - int(getattr(module, "offset", first)))
    return min(found)


def equal_lengths(
    inputs: Mapping[str, list[list[int]]], step: int
) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
    """Row numbers and tensors of up to `step` rows of one length, until every row was there once."""
    rows_of: dict[int, list[int]] = {}
    for row, tokens in enumerate(inputs["input_ids"]):
        rows_of.setdefault(len(tokens), []).append(row)
    for rows in rows_of.values():
        for some in (rows[start : start + step] for start in range(0, len(rows), step)):
            yield some, {name: torch.tensor([column[row] for row in some]) for name, column in inputs.items()}


def shared_tokenizer(folders: list[Path]) -> Any:
    """The tokenizer of the first folder that has one.

    Raises:
        SourceError: none has one, or two number words differently.
    """
    has_one = [folder for folder in folders if any(next(folder.glob(n), None) for n in _TOKENIZER_FILES)]
    found = [read_tokenizer(folder) for folder in has_one or folders[:1]]
    for folder, other in zip(has_one[1:], found[1:], strict=True):
        if other.get_vocab() != found[0].get_vocab():
            raise SourceError(
                f"{folder}: expected the vocabulary of {has_one[0]}, found another; compare models "
                "that read alike"
            )
    return found[0]


def masked(batch: dict[str, Tensor], tokenizer: Any) -> tuple[dict[str, Tensor], Tensor]:
    """Every seventh token hidden, but for special ones; and where.

    Raises:
        SourceError: the tokenizer has no token to hide others behind.
    """
    if tokenizer.mask_token_id is None:
        raise SourceError(
            "tokenizer: expected a mask token, found none; save the model with its own tokenizer"
        )
    tokens = batch["input_ids"]
    special = torch.isin(tokens, torch.tensor(tokenizer.all_special_ids))
    hidden = ~special & (torch.arange(tokens.shape[1]) % _MASKED_STRIDE == 1)
    return {**batch, "input_ids": tokens.masked_fill(hidden, tokenizer.mask_token_id)}, hidden


def array_batches(path: Path, known: set[str], step: int) -> tuple[int, Batches]:
    """Rows of an npz of the model's own inputs.

    Args:
        known: names of the model's inputs.

    Raises:
        DataError: it is no npz of such arrays with as many rows each.
    """
    arrays = checked_arrays(read_npz(path), known, str(path))
    n_rows = len(next(iter(arrays.values())))
    return n_rows, (({n: x[i : i + step] for n, x in arrays.items()}, None) for i in range(0, n_rows, step))


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """Arrays by name.

    Raises:
        DataError: it is no npz, or holds objects.
    """
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (OSError, ValueError, TypeError, AttributeError, EOFError, BadZipFile) as error:
        raise DataError(
            f"{path}: expected an npz of numbers, found {error}; save it with np.savez"
        ) from error


def checked_arrays(found: Mapping[str, np.ndarray], known: set[str], where: str) -> dict[str, Tensor]:
    """Inputs of a model by name, in float32 or int64.

    Args:
        known: names of the model's inputs.

    Raises:
        DataError: they are not of such names, no finite numbers, or not of as many rows each.
    """
    arrays = {name: _array(values, f"{where}: {name}") for name, values in found.items()}
    if unknown := sorted(set(arrays) - known):
        raise DataError(
            f"{where}: expected inputs of the model ({', '.join(sorted(known)[:4])}, …), found "
            f"{unknown[0]!r}; rename or remove it ({offer(unknown[0], sorted(known))})"
        )
    lengths = {len(values) if values.ndim else 0 for values in arrays.values()}
    if len(lengths) != 1 or not min(lengths):
        raise DataError(
            f"{where}: expected arrays of equally many rows, at least one, found {sorted(lengths)} rows; "
            "complete it"
        )
    if empty := [name for name, values in arrays.items() if not values.numel()]:
        raise DataError(
            f"{where}: {empty[0]}: expected rows with something in them, found {found[empty[0]].shape}; "
            "remove it"
        )
    return {n: x.float() if x.is_floating_point() else x.long() for n, x in arrays.items()}


def _array(values: np.ndarray, where: str) -> Tensor:
    """
    Raises:
        DataError: they are no real numbers, or not finite.
    """
    if values.dtype.kind not in "fiub":
        raise DataError(f"{where}: expected real numbers, found {values.dtype}; save them as numbers")
    if bad := int((~np.isfinite(values)).sum()):
        raise DataError(
            f"{where}: expected finite numbers, found {bad} of {values.size} that are NaN or infinite; "
            "repair them"
        )
    return torch.from_numpy(values.astype(values.dtype.newbyteorder("="), copy=False))


def read_processor(folders: list[Path]) -> Any:
    """The image processor of the first folder that has one.

    Raises:
        SourceError: none has one.
    """
    folder = next((folder for folder in folders if (folder / _PROCESSOR).is_file()), None)
    if folder is None:
        raise SourceError(
            f"{folders[0]}: expected an image processor beside the model, found no {_PROCESSOR}; save it "
            "there with processor.save_pretrained, or give an npz of pixel_values"
        )
    return AutoImageProcessor.from_pretrained(folder)


def image_batches(data: Path, processor: Any, step: int) -> tuple[int, Batches]:
    """Images of a folder, an image, or those that a txt names, prepared for the model.

    Raises:
        DataError: there is none; or, in the course of it, one cannot be read.
    """
    paths = image_paths(data)
    starts = range(0, len(paths), step)
    batches = (([read_image(path) for path in paths[start : start + step]]) for start in starts)
    return len(paths), ((prepared(images, processor), None) for images in batches)


def image_paths(data: Path) -> list[Path]:
    """Where the images of a folder are, in order of their names, an image, or those that a txt names.

    Raises:
        DataError: there is none.
    """
    if data.is_dir():
        paths = sorted(path for path in data.rglob("*") if path.suffix.lower() in IMAGE_ENDINGS)
    elif data.suffix == ".txt" and data.is_file():
        lines = read_table(data)["text"]
        paths = [data.parent / line.strip() for line in lines if line.strip()]
    else:
        paths = [data] if data.is_file() else []
    if not paths:
        raise DataError(
            f"{data}: expected a folder of images ({', '.join(IMAGE_ENDINGS)}), an image or a txt of paths, "
            "found no image; look there"
        )
    return paths


def prepared(images: list[Any], processor: Any) -> dict[str, Tensor]:
    """What a model takes of images, as its processor makes it."""
    return {"pixel_values": processor(images, return_tensors="pt")["pixel_values"]}


def read_image(path: Path) -> Any:
    """An image as transformers prepares it: turned as its camera was held, in red, green and blue.

    Raises:
        DataError: it cannot be read, has several frames, or grays finer than 8 bits, which would be cut off.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            frames, mode = getattr(image, "n_frames", 1), image.mode
            pixels = ImageOps.exif_transpose(image).convert("RGB")
    except Exception as error:  # PIL raises what its readers do: SyntaxError, struct.error, …
        raise DataError(f"{path}: expected an image, found {error}; remove or repair it") from error
    if frames > 1:
        raise DataError(f"{path}: expected one image, found {frames} frames; save the one that is meant")
    if mode.startswith(("I", "F")):
        raise DataError(
            f"{path}: expected 8 bits per color, found mode {mode!r}; scale it to 8 bits, or give an npz of "
            "pixel_values"
        )
    return pixels
