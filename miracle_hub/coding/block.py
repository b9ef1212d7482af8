"""The encoder of the block code (k = L): every block picks one of 2^L candidates.

All log importance weights of many blocks are one matrix product, taken in tiles of a fixed size so
that memory stays bounded whatever L is (tiles never change the result of `best`).
"""

import numpy as np
import torch
from torch import Tensor

from miracle_hub.code import Code
from miracle_hub.coding.cpu import candidate_range
from miracle_hub.coding.posterior import Cost

# 1,024 × 4,096 float32 scores are 16 MB, in one buffer: touching fresh memory for every tile is slow.
_TILE_BLOCKS = 1024
_TILE_CANDIDATES = 4096


def encode_block(cost: Cost, code: Code, selection: str, generator: torch.Generator | None) -> np.ndarray:
    """Indices of a stream, int64 [blocks]; see `encode.encode_stream`.

    "sample" adds Gumbel noise to the log importance weights: its argmax is an exact draw.
    """
    quadratic, linear = (_rows(values, code.step_weights) for values in (cost.quadratic, cost.linear))
    coefficients = torch.cat((-0.5 * quadratic, 0.5 * linear), dim=1)
    best = torch.full((coefficients.shape[0],), -torch.inf)
    index = torch.zeros(coefficients.shape[0], dtype=torch.int64)
    buffer = torch.empty(min(_TILE_BLOCKS, best.numel()) * min(_TILE_CANDIDATES, 1 << code.window_bits))
    for first in range(0, 1 << code.window_bits, _TILE_CANDIDATES):
        count = min(_TILE_CANDIDATES, (1 << code.window_bits) - first)
        z = torch.from_numpy(candidate_range(code, first, count))
        features = torch.cat((z * z, z), dim=1).T
        for start in range(0, best.numel(), _TILE_BLOCKS):
            tile = slice(start, min(start + _TILE_BLOCKS, best.numel()))
            scores = buffer[: (tile.stop - start) * count].view(-1, count)
            torch.mm(coefficients[tile], features, out=scores)
            if selection == "sample":
                scores -= torch.empty_like(scores).exponential_(generator=generator).log_()
            tile_best, tile_index = scores.max(dim=1)
            better = tile_best > best[tile]
            best[tile] = torch.where(better, tile_best, best[tile])
            index[tile] = torch.where(better, tile_index + first, index[tile])
    return index.numpy()


def _rows(values: Tensor, width: int) -> Tensor:
    """[n] → [blocks, width]; the missing weights of the last block cost nothing."""
    return torch.nn.functional.pad(values, (0, -values.numel() % width)).view(-1, width)
