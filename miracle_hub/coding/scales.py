"""The prior's scales as files hold them."""

import torch
from torch import Tensor

# Within these bounds scale · z is exact in float32 and never subnormal (FORMAT.md, "Exactness").
SMALLEST_SCALE, LARGEST_SCALE = 2.0**-64, 2.0**64


def rounded_scales(scales: Tensor) -> Tensor:
    """Scales as the format allows them: bfloat16, 0 or within [2⁻⁶⁴, 2⁶⁴]; held as float32."""
    rounded = scales.clamp(max=LARGEST_SCALE).bfloat16().float()
    return torch.where(rounded >= SMALLEST_SCALE, rounded, 0.0)
