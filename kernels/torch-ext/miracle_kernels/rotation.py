"""The Hadamard rotation inside a kernel, and the same in torch: a fixed order of float32 sums."""

# What Triton's language means by these operators is not what its stubs say.
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false

import torch
from torch import Tensor

from ._triton import tl, triton


@triton.jit
def _butterfly(x, STRIDE: tl.constexpr):
    """Replace each pair (a, b), STRIDE apart in the flat tensor, by (a + b, a - b)."""
    PAIRS: tl.constexpr = x.shape[0] // (2 * STRIDE)
    pairs = tl.permute(tl.reshape(x, [PAIRS, 2, STRIDE]), [0, 2, 1])
    first, second = tl.split(pairs)
    pairs = tl.permute(tl.join(first + second, first - second), [0, 2, 1])
    return tl.reshape(pairs, [x.shape[0]])


@triton.jit
def _exchanged_butterfly(x, STRIDE: tl.constexpr):
    """The same where a and b lie in two threads of a warp: each fetches the other's and adds its own, or
    subtracts it. One shuffle and one multiply-add by ±1, which is exact, and nothing to select."""
    pairs = tl.reshape(x, [x.shape[0] // (2 * STRIDE), 2, STRIDE])
    words = pairs.to(tl.int32, bitcast=True)
    # The sum of both less one's own is the other: integer sums wrap, and the compiler drops them.
    other = tl.sum(words, axis=1, keep_dims=True) - words
    sign = (1 - 2 * tl.arange(0, 2)).to(tl.float32)[None, :, None]
    return tl.reshape(
        tl.fma(pairs, tl.broadcast_to(sign, pairs.shape), other.to(tl.float32, bitcast=True)), [x.shape[0]]
    )


@triton.jit
def rotate(x, WIDTH: tl.constexpr, IN_THREAD: tl.constexpr):
    """Every WIDTH neighbors of a row of `[rows, columns]` by their Walsh-Hadamard transform.

    Args:
        IN_THREAD: neighbors that lie in one thread, with the next ones in the warp's next thread; 0 where
            nobody knows. It says how pairs meet, and changes no sum.
    """
    ROWS: tl.constexpr = x.shape[0]
    COLUMNS: tl.constexpr = x.shape[1]
    flat = tl.reshape(x, [ROWS * COLUMNS])
    for stage in tl.static_range(15):
        if (1 << stage) < WIDTH:
            if (1 << stage) >= IN_THREAD and (1 << stage) < 32 * IN_THREAD:
                flat = _exchanged_butterfly(flat, 1 << stage)
            else:
                flat = _butterfly(flat, 1 << stage)
    return tl.reshape(flat, [ROWS, COLUMNS])


def hadamard_torch(values: Tensor, width: int) -> Tensor:
    """The reference of `rotate`: stages 1, 2, 4, … < width over `[…, columns]`, in float32."""
    stride = 1
    while stride < width:
        pairs = values.reshape(-1, 2, stride)
        first, second = pairs[:, 0], pairs[:, 1]
        values = torch.stack((first + second, first - second), dim=1).reshape(values.shape)
        stride *= 2
    return values
