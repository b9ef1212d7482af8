"""The prior's scales: the best ones for a rate, and as files hold them."""

import math

import torch
from torch import Tensor

from miracle_hub.code import Code

# Within these bounds scale · z is exact in float32 and never subnormal (FORMAT.md, "Exactness").
SMALLEST_SCALE, LARGEST_SCALE = 2.0**-64, 2.0**64


def carried_share(kl_nats: float) -> float:
    """1 - D, the share of a Gaussian value's variance that a code carries with so many nats per value.

    The best prior of candidates that are drawn from it has this share of the source's variance.

    Source: Cover and Thomas 2006, theorem 10.3.2: D = e^(-2·nats).
    """
    return -math.expm1(-2 * kl_nats)


def prior_scale(code: Code) -> float:
    """The best prior scale for a unit Gaussian source under squared error.

    The root of the share that the code carries, raised where short windows miss the tails. The factors are
    rounded from a grid over the ladder for L = 8 … 16; benchmarks/rate_distortion.py searches near them.
    """
    rate = code.rate
    ideal = math.sqrt(carried_share(rate * math.log(2)))
    if rate <= 1:
        return ideal
    if rate <= 2:
        return 1.05 * ideal
    return (1.1 if code.overlap_bits >= 9 else 1.2) * ideal


def rounded_scales(scales: Tensor) -> Tensor:
    """Scales as the format allows them: bfloat16, 0 or within [2⁻⁶⁴, 2⁶⁴]; held as float32."""
    rounded = scales.clamp(max=LARGEST_SCALE).bfloat16().float()
    return torch.where(rounded >= SMALLEST_SCALE, rounded, 0.0)
