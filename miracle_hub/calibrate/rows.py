"""A row: what a model takes at once, without the dimension of a batch; and how much of it there is."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

Row: TypeAlias = dict[str, Tensor]

# An image counts as a token per patch of 16 × 16, as in a ViT, and as 64 at least: a choice.
_PATCH = 16 * 16
_LEAST_OF_IMAGE = 64
_SAMPLES_PER_FRAME = 320  # of a waveform, as wav2vec 2 has it: 20 ms
# Of a spectrogram: an encoder halves them, and has about a third of all weights. When each counted as a
# token, whisper-base saw seven clips at effort 1.
_FRAMES_PER_TOKEN = 6
# Lengths of rows that are batched by length: all short ones, and longer ones in steps, so that they meet.
_SHORT = 32
_STEP = 8
LEAST_ROWS = 8  # that differ, so that one of them is held out


@dataclass(frozen=True)
class Found:
    """Rows, as they were found or made.

    Attributes:
        where: of what they were made: a file's name, an id, "self".
        said: what they are, as "3,021 texts".
    """

    rows: list[Row]
    where: str
    said: str


def tokens_of(row: Row) -> int:
    """How many tokens of a text, of a sound or patches of an image a row has; 1 of a vector."""
    if "input_ids" in row:
        return row["input_ids"].numel()
    name, values = next(iter(row.items()))
    if name == "input_values":
        return max(1, values.numel() // _SAMPLES_PER_FRAME)
    if name == "input_features":
        return max(1, max(values.shape) // _FRAMES_PER_TOKEN)
    if values.ndim == 1 and not values.is_floating_point():
        return len(values)
    if values.ndim >= 3:
        return max(_LEAST_OF_IMAGE, math.prod(values.shape[-2:]) // _PATCH)
    return values.shape[0] if values.ndim == 2 else 1


def met_length(length: int) -> int:
    """The longest length that is not above this one and that rows are cut to."""
    return length if length <= _SHORT else length // _STEP * _STEP


def rows_of_batch(batch: Row) -> list[Row]:
    """A batch row by row."""
    n_rows = len(next(iter(batch.values())))
    return [{name: values[i] for name, values in batch.items()} for i in range(n_rows)]


def some_of(rows: Sequence[Row], wanted: int, seed: int) -> list[Row]:
    """So many rows, drawn at random and in their order, that there are `wanted` tokens; or all."""
    chosen, total = [], 0
    for i in order_of(len(rows), seed):
        if total >= wanted:
            break
        chosen.append(i)
        total += tokens_of(rows[i])
    return [rows[i] for i in sorted(chosen)]


def order_of(n: int, seed: int) -> list[int]:
    """The numbers below n in an order drawn at random."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed)).tolist()
