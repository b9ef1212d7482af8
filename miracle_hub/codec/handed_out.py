"""What readers get of coded weights: the sum of the parts, rounded to the dtype of the source; its error."""

from collections.abc import Sequence

import torch
from torch import Tensor

from miracle_hub.codec.comparing import squared_distance
from miracle_hub.coding.backend import Backend
from miracle_hub.coding.matrix import CodedRows, MatrixLayout
from miracle_hub.coding.scales import rounded_scales
from miracle_hub.errors import NonFiniteWeightError

# By which scales are lowered at a time where weights leave the range of their dtype: a choice.
_LOWERED = 1 - 2.0**-5


def left_by(earlier: Sequence[Tensor], weights: Tensor) -> Tensor:
    """What earlier parts of a sum, float32, leave of a tensor; the tensor itself if there are none."""
    for part in earlier:
        weights = weights.float() - part
    return weights


def sum_of(parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Parts in order, as readers add and round them."""
    first, *others = parts
    return sum(others, start=first).to(dtype)


def relative_error(handed_out: Tensor, earlier: Sequence[Tensor], weights: Tensor) -> float:
    """Squared error of what readers get, over the weights' square; or, after earlier parts, over the error of
    what readers get of these, so that the product over all parts is the error of their sum.
    """
    if earlier:
        power = squared_distance(sum_of(earlier, weights.dtype), weights)
    else:
        power = float(weights.double().square().sum())
    return squared_distance(handed_out, weights) / power if power else 0.0


def decoded_in_range(
    parts: Sequence[CodedRows],
    layout: MatrixLayout,
    earlier: Sequence[Tensor],
    dtype: torch.dtype,
    backend: Backend,
) -> tuple[Tensor, int]:
    """What readers get of coded rows in the dtype of the source, and the digest of the rows.

    Scales of `parts` are lowered, in place, until the dtype rounds no weight to infinity.

    Args:
        earlier: float32 weights of the parts that come before in the sum, in the tensor's shape.
    """
    while True:
        decoded, digest = backend.decode_matrix(parts, layout, torch.float32 if earlier else dtype)
        total = sum_of([*earlier, decoded.view(earlier[0].shape)], dtype) if earlier else decoded
        bad = ~torch.isfinite(total.reshape(-1, layout.columns)).all(1).cpu()
        if not bool(bad.any()):
            return total, digest
        for part, rows in zip(parts, bad.split([part.rows for part in parts]), strict=True):
            rows = rows if part.scales.numel() > 1 else rows.any().view(1)
            lowered = rounded_scales(part.scales.float() * _LOWERED).to(part.scales.dtype)
            part.scales[rows.to(part.scales.device)] = lowered[rows.to(part.scales.device)]


def require_finite(weights: Tensor, where: str) -> None:
    """
    Raises:
        NonFiniteWeightError: some weight is not, as where a dtype cannot hold what was decoded.
    """
    finite = torch.isfinite(weights).flatten()
    if not bool(finite.all()):
        raise NonFiniteWeightError(
            f"{where}: expected weights that {str(weights.dtype).removeprefix('torch.')} can hold, found "
            f"{weights.flatten()[int(finite.int().argmin())].item()} at position {int(finite.int().argmin())}"
            " after decoding; keep the weights smaller, or use bfloat16 or float32"
        )
