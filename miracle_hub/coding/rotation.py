"""The Hadamard rotation: groups of 2^r neighboring columns, a fixed order of float32 sums.

Rotated weights are close to Gaussian whatever they were before (Tseng et al. 2024, QuIP#,
section 3), which is the source that the candidates suit. FORMAT.md, "Weights", has the sums. The factor
1/√width is not applied here: the decoder finds it inside the scale, the encoder divides by it.
"""

import torch
from jaxtyping import Float32
from torch import Tensor

from miracle_hub.code import DEFAULT_WIDTH, MAX_WIDTH_LOG2
from miracle_hub.errors import OptionError


def hadamard(values: Float32[Tensor, "rows columns"], width: int) -> Float32[Tensor, "rows columns"]:
    """Multiply every group of `width` columns by the unnormalized Walsh–Hadamard matrix.

    Stage s = 1, 2, 4, … < width replaces each pair (a, b), s apart, by (a + b, a - b), in float32.
    """
    stride = 1
    while stride < width:
        pairs = values.reshape(-1, 2, stride)
        first, second = pairs[:, 0], pairs[:, 1]
        values = torch.stack((first + second, first - second), dim=1).reshape(values.shape)
        stride *= 2
    return values


def widest_rotation(columns: int, limit: int = DEFAULT_WIDTH) -> int:
    """The largest power of two that divides `columns`, at most `limit`; 1 means no rotation."""
    return min(columns & -columns, limit) if columns else 1


def check_width(width: int, columns: int, where: str) -> None:
    """Raise unless groups of `width` columns tile a row.

    Raises:
        OptionError: the width is no power of two or does not divide the columns.
    """
    power_of_two = 1 <= width <= 2**MAX_WIDTH_LOG2 and width & (width - 1) == 0
    if not power_of_two or columns % width:
        raise OptionError(
            f"{where}: the rotation width must be a power of two up to {2**MAX_WIDTH_LOG2} that divides "
            f"its {columns} columns, found {width}; use {widest_rotation(columns)} or 1 (none)"
        )
