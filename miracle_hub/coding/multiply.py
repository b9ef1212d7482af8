"""x·Wᵀ on a CPU straight from a message: some candidates are looked up, multiplied and forgotten.

A rotation is its own transpose, so that x is rotated instead of every row of W. Weights are not rounded to
the dtype of their source on the way, as those of a dense load are.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numba import njit
from torch import Tensor

from miracle_hub.coding import cpu
from miracle_hub.coding.lookup import PIECE, decode_by_table
from miracle_hub.coding.matrix import CodedRows, MatrixLayout

# Rows of x: at 16 a product takes 0.2 to 0.6 of the time of one by decoded bands, at 32 0.6 to 1.1, at 64
# 0.6 to 1.8 (benchmarks/kept_on_cpu.py, four shapes, 2 bits).
_MOST_ROWS = 32
# Weights of a task: fewer take less time than a thread that is woken for them.
_FEWEST_WEIGHTS = 1 << 17

# Sums in any order; what is infinite or no number stays so.
_jit = njit(nogil=True, cache=True, error_model="numpy", fastmath={"reassoc", "contract", "nsz"})


def multiply(
    x: Float[Tensor, "batch columns"], part: CodedRows, layout: MatrixLayout
) -> Float[Tensor, "batch rows"] | None:
    """x·Wᵀ in x's dtype, added up in float32; None where decoding is faster, or must come first."""
    code, width = part.code, layout.band_columns if layout.is_banded else layout.columns
    is_whole = width % code.step_weights == 0 == layout.columns % code.step_weights
    if layout.permuted or not is_whole or not 1 <= len(x) <= _MOST_ROWS:
        return None
    padded = cpu.pad_message(part.message.numpy())
    if not cpu.has_table(padded, code):
        return None
    rotated = x.detach().float()
    if layout.rotation > 1:
        rotated = cpu.hadamard(rotated, layout.rotation)
    out = np.zeros((part.rows, len(x)), np.float32)
    given = padded, cpu.candidate_table(code), (code.window_bits, code.step_bits), part.rows
    _in_tasks(given, width, rotated.contiguous().numpy(), out)
    scales = part.scales.float()
    return (torch.from_numpy(out) * scales[:, None]).T.to(x.dtype)


def _in_tasks(given: tuple, width: int, x: np.ndarray, out: np.ndarray) -> None:
    """Rows in as many parts as there are processors, if each is large enough."""
    n_tasks = max(1, min(cpu.n_threads(), out.shape[0] * x.shape[1] // _FEWEST_WEIGHTS))
    step = -(-len(out) // n_tasks)
    tasks: list[Any] = [(*given, row, width, x, out[row : row + step]) for row in range(0, len(out), step)]
    others = [_pool(os.getpid()).submit(multiply_rows, *task) for task in tasks[1:]]
    multiply_rows(*tasks[0])
    for other in others:
        other.result()


@cache
def _pool(process: int) -> ThreadPoolExecutor:
    """Threads that wait for the next product: new ones for each of hundreds of layers took longer than it."""
    return ThreadPoolExecutor(max(1, cpu.n_threads() - 1), f"multiply-{process}")


@_jit
def multiply_rows(message, table, code, n_rows, first_row, width, x, out):
    """Add to out[row, batch] what rows first_row, … of n_rows times x, float32 [batch, columns], are.

    Args:
        message: padded.
        table: float32 [2^window_bits, V].
        code: (window_bits, step_bits).
        width: of bands, all columns where there are none.
    """
    columns = x.shape[1]
    together = max(1, PIECE // width)
    piece = np.empty(max(PIECE, together * min(width, columns)), np.float32)
    for start in range(0, columns, width):
        of_band = min(width, columns - start)
        step = min(of_band, PIECE)
        for row in range(0, out.shape[0], together):
            n_rows_here = min(together, out.shape[0] - row)
            first = n_rows * start + (first_row + row) * of_band
            for at in range(0, of_band, step):
                n = min(step, of_band - at)
                z = piece[: n_rows_here * n]
                decode_by_table(message, table, code[0], code[1], first + at, z)
                for i in range(x.shape[0]):
                    _add_dots(z, x[i, start + at : start + at + n], out[row : row + n_rows_here, i])


@_jit
def _add_dots(z, x, out):
    """Add to every entry of out the product of its part of z with x."""
    n = x.shape[0]
    for row in range(out.shape[0]):
        total = np.float32(0)
        for j in range(n):
            total += z[row * n + j] * x[j]
        out[row] += total
