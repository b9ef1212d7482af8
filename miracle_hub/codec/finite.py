"""Which NaN and infinities a repository may hold: one rule for compress, verify and push.

In weights there are none: a diverged training leaves such. What is no weight may have them, as masks of -inf
do: compress takes infinities in constants, and both in buffers of the model's class and in what the user
excludes. It lists these tensors in config.json (FORMAT.md, "Repository"), and whoever verifies takes them.
"""

from collections.abc import Collection

import torch
from torch import Tensor

from miracle_hub.codec.constants import constant_kind

NON_FINITE = "non_finite"  # in the quantization_config
# Two numbers in a byte, without NaN or infinity; torch, which may not know it, converts it to nothing.
_FLOAT4 = getattr(torch, "float4_e2m1fn_x2", None)


def first_non_finite(values: Tensor) -> int | None:
    """The position of the first NaN or infinity; None if there is none."""
    if values.dtype is _FLOAT4 or not (values.is_floating_point() or values.is_complex()):
        return None
    few_bits = values.is_floating_point() and values.element_size() == 1  # float8, of which torch knows less
    finite = torch.isfinite(values.float() if few_bits else values).flatten()
    return None if bool(finite.all()) else int(finite.int().argmin())


def is_taken(name: str, values: Tensor, listed: Collection[str]) -> bool:
    """Whether a tensor with NaN or infinity may have it.

    Args:
        listed: names of tensors that were taken before, or are no weights.
    """
    return name in listed or (values.is_floating_point() and constant_kind(values) is not None)
