"""Which float32 vectors a repository holds in 16 bits: weights and biases that float16 holds to 11 bits."""

from collections.abc import Sequence

import torch
from torch import Tensor

# Relative squared error of rounding to 11 bits, with room for a few subnormal elements.
_ERROR = 2.0**-22


def is_narrowable(name: str, shape: Sequence[int]) -> bool:
    """Whether a float32 tensor is a vector of weights or biases, by its name.

    Other vectors (running statistics, rotary frequencies) keep their 32 bits: models can be sensitive to
    their last digits.
    """
    return name.endswith((".weight", ".bias")) and len(shape) == 1 and shape[0] > 0


def half_holds(values: Tensor) -> bool:
    """Whether float16 holds values to about 11 bits."""
    exact = values.detach().double()
    error = (exact.half().double() - exact).square().sum()
    return bool(error <= _ERROR * exact.square().sum())


def is_held_in_half(name: str, values: Tensor) -> bool:
    """Whether a repository holds a tensor in 16 bits, where its values decide."""
    is_vector = values.dtype == torch.float32 and is_narrowable(name, values.shape)
    return is_vector and half_holds(values)
