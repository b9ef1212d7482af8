"""The encoder of the block code (k = L): every block picks one of 2^L candidates.

All log importance weights of many blocks are one matrix product, taken in tiles of a fixed size so
that memory stays bounded whatever L is (tiles never change the result of `best`).
"""

import numpy as np
import torch
from torch import Tensor

from miracle_hub.coding.cpu import candidate_range
from miracle_hub.coding.posterior import Cost
from miracle_hub.config import Code

# 2,048 × 4,096 float32 scores are 32 MB; larger tiles were not faster on two cores.
_TILE_BLOCKS = 2048
_TILE_CANDIDATES = 4096


def encode_block(cost: Cost, code: Code, selection: str, generator: torch.Generator | None) -> np.ndarray:
    """Indices of a stream, int64 [blocks]; see `encode.encode_stream`."""
    n_blocks, width = code.steps(cost.linear.numel()), code.step_weights
    indices = torch.zeros(n_blocks, dtype=torch.int64)
    for start in range(0, n_blocks, _TILE_BLOCKS):
        tile = slice(start * width, (start + _TILE_BLOCKS) * width)
        quadratic = _rows(cost.quadratic[tile], width)
        linear = _rows(cost.linear[tile], width)
        coefficients = torch.cat((-0.5 * quadratic, 0.5 * linear), dim=1)
        indices[start : start + _TILE_BLOCKS] = _select(coefficients, code, selection, generator)
    return indices.numpy()


def _rows(values: Tensor, width: int) -> Tensor:
    """[n] → [blocks, width]; the missing weights of the last block cost nothing."""
    return torch.nn.functional.pad(values, (0, -values.numel() % width)).view(-1, width)


def _select(coefficients: Tensor, code: Code, selection: str, generator: torch.Generator | None) -> Tensor:
    """The chosen index of each block; sampling adds Gumbel noise, whose argmax is an exact draw."""
    best = torch.full((coefficients.shape[0],), -torch.inf)
    index = torch.zeros(coefficients.shape[0], dtype=torch.int64)
    for first in range(0, 1 << code.window_bits, _TILE_CANDIDATES):
        count = min(_TILE_CANDIDATES, (1 << code.window_bits) - first)
        z = torch.from_numpy(candidate_range(code, first, count))
        log_importance_weights = coefficients @ torch.cat((z * z, z), dim=1).T
        if selection == "sample":
            exponential = torch.empty_like(log_importance_weights).exponential_(generator=generator)
            log_importance_weights -= exponential.log_()
        tile_best, tile_index = log_importance_weights.max(dim=1)
        better = tile_best > best
        best = torch.where(better, tile_best, best)
        index = torch.where(better, tile_index + first, index)
    return index
