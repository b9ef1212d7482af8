"""Arrays by name, or batches of a loader → rows of a model's inputs; labels and padding are taken off."""

import logging
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from miracle_hub.calibrate.modality import inputs_by_name, main_input, positions_of
from miracle_hub.calibrate.rows import Found, Row, rows_of_batch, some_of, tokens_of
from miracle_hub.errors import DataError
from miracle_hub.evaluate.batches import checked_arrays

_LOGGER = logging.getLogger("miracle_hub")
_LABELS = frozenset({"labels", "label", "label_ids", "start_positions", "end_positions"})


def rows_of_arrays(
    model: nn.Module, arrays: Mapping[str, np.ndarray], where: str, wanted: int, seed: int
) -> Found:
    """Rows drawn at random from arrays.

    Raises:
        DataError: they are not the model's inputs, not finite, or token ids that it has not.
    """
    rows, labels = _rows(model, arrays, where)
    found = some_of(rows, wanted, seed)
    return Found(found, where, f"{len(found):,} of {len(rows):,} rows{labels}")


def rows_of_batches(model: nn.Module, batches: Iterable[Any], wanted: int) -> Found:
    """The first rows of batches, which may have no end.

    Args:
        batches: inputs by name, tensors, or pairs of one and labels.

    Raises:
        DataError: there is none, or one is no batch of the model's inputs.
    """
    rows: list[Row] = []
    total, said = 0, ""
    for number, batch in enumerate(batches):
        if total >= wanted:
            break
        named, where = _named(model, batch, number), f"data: batch {number}"
        some, said = _rows(model, named, where)
        rows += some
        total += sum(map(tokens_of, some))
    if not rows:
        raise DataError("data: expected batches of the model's inputs, found none; give some")
    return Found(rows, "data", f"the first {len(rows):,} rows{said}")


def _named(model: nn.Module, batch: Any, number: int) -> Mapping[str, np.ndarray]:
    """Arrays by name, of a batch in any of its forms.

    Raises:
        DataError: it has another form.
    """
    first: Any = next(iter(batch), None) if isinstance(batch, tuple | list) else None
    if isinstance(first, Tensor | np.ndarray):
        if len(batch) > 1:
            _LOGGER.info("data: of batches of %d, the first is the input; others are not used", len(batch))
        batch = {main_input(model): first}
    elif isinstance(batch, Tensor | np.ndarray):
        batch = {main_input(model): batch}
    if not isinstance(batch, Mapping):
        raise DataError(
            f"data: batch {number}: expected inputs of the model by name, a tensor, or a pair of one and "
            f"labels, found {type(batch).__name__}; give one of these"
        )
    return {str(name): as_numpy(values) for name, values in batch.items()}


def as_numpy(values: Any) -> np.ndarray:
    """An array on the CPU, bfloat16 as float32."""
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        return (values.float() if values.dtype == torch.bfloat16 else values).numpy()
    return np.asarray(values)


def _rows(model: nn.Module, arrays: Mapping[str, np.ndarray], where: str) -> tuple[list[Row], str]:
    """Rows without labels and padding, and words for what was left out.

    Raises:
        DataError: they are not the model's inputs, not finite, or token ids that it has not.
    """
    labels = sorted(set(arrays) & _LABELS)
    kept = {name: values for name, values in arrays.items() if name not in _LABELS}
    found = checked_arrays(kept, set(inputs_by_name(model)) - _LABELS, where)
    if main_input(model) in found:  # which says how long a row is
        found = {main_input(model): found[main_input(model)], **found}
    _require_tokens(model, found, where)
    return [_unpadded(row) for row in rows_of_batch(found)], f" (not used: {', '.join(labels)})" * bool(
        labels
    )


def _require_tokens(model: Any, arrays: Mapping[str, Tensor], where: str) -> None:
    """
    Raises:
        DataError: there are token ids out of range.
    """
    get = getattr(model, "get_input_embeddings", None)
    if "input_ids" not in arrays or get is None:
        return
    ids, known = arrays["input_ids"], getattr(get(), "num_embeddings", None)
    if ids.is_floating_point():
        raise DataError(f"{where}: input_ids: expected whole numbers, found {ids.dtype}; save them as such")
    if (most := positions_of(model)) and ids.shape[1] > most:
        raise DataError(
            f"{where}: input_ids: expected rows of at most {most} tokens, which {type(model).__name__} has "
            f"positions for, found {ids.shape[1]}; cut them"
        )
    if known is not None and not 0 <= int(ids.min()) <= int(ids.max()) < known:
        raise DataError(
            f"{where}: input_ids: expected tokens from 0 to {known - 1}, of which the model has embeddings, "
            f"found {int(ids.min())} to {int(ids.max())}; give those of its own tokenizer"
        )


def _unpadded(row: Row) -> Row:
    """A row of token ids without what its mask hides at either end."""
    mask = row.get("attention_mask")
    if mask is None or "input_ids" not in row or mask.shape != row["input_ids"].shape or mask.ndim != 1:
        return row
    shown = mask.nonzero().flatten()
    if not len(shown) or int(shown[-1] - shown[0]) + 1 != len(shown):
        return row
    cut = slice(int(shown[0]), int(shown[-1]) + 1)
    return {name: x[cut] if x.shape == mask.shape else x for name, x in row.items()}
