"""The Hadamard rotation inside a kernel, and the same in torch: a fixed order of float32 sums."""

# What Triton's language means by these operators is not what its stubs say.
# pyright: reportGeneralTypeIssues=false

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
def rotate(x, WIDTH: tl.constexpr):
    """Every WIDTH neighbors of a row of `[rows, columns]` by their Walsh-Hadamard transform."""
    ROWS: tl.constexpr = x.shape[0]
    COLUMNS: tl.constexpr = x.shape[1]
    flat = tl.reshape(x, [ROWS * COLUMNS])
    for stage in tl.static_range(15):
        if (1 << stage) < WIDTH:
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
