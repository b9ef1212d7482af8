"""The encoder with feedback: every band of columns makes up for the errors of those before it.

With U upper triangular and U·Uᵀ the moments of the columns, errors E cost ‖E·U‖². Column j of E·U is
U_jj·(E_j + Σ_{i<j} E_i U_ij/U_jj): coding w_j plus that sum leaves U_jj·(error of the search).

Source: Frantar et al. 2022 (GPTQ, arXiv:2210.17323); Chee et al. 2023 (LDLQ, arXiv:2307.13304), theorem 1;
    by bands as in QTIP (arXiv:2406.11235), section 3.3.
"""

import math

import torch
from jaxtyping import Float32
from torch import Tensor

from miracle_hub.coding.backend import Backend
from miracle_hub.coding.encode import pack_states
from miracle_hub.coding.matrix import CodedRows
from miracle_hub.coding.posterior import squared_error_cost
from miracle_hub.coding.scales import prior_scale, rounded_scales
from miracle_hub.format.payload import Segment

# Bands of 8 and 4 columns lower the cost of SmolLM2's matrices by another 3 and 5 %, at two and four times
# the time; narrow matrices, which take no time, have the narrowest: refits need many bands.
_BAND_COLUMNS, _NARROW_BAND_COLUMNS = 16, 4
_NARROW = 256


def band_columns(columns: int) -> int:
    """Columns of a band of a matrix; whole steps of every code of `ladder`."""
    return _BAND_COLUMNS if columns >= _NARROW else _NARROW_BAND_COLUMNS


def encode_with_feedback(
    rows: Float32[Tensor, "rows columns"], segment: Segment, rotation: int, factor: Tensor, backend: Backend
) -> CodedRows:
    """One segment in bands of columns, its scales as the file holds them.

    Args:
        rows: rotated.
        factor: U, float64 `[columns, columns]`; see above.
    """
    power = rows.square().mean(1) if segment.row_scales else rows.square().mean().view(1)
    scales = rounded_scales(power.sqrt() * prior_scale(segment.code))
    safe = torch.where(scales > 0, scales, 1.0)[:, None]
    z, states = torch.empty_like(rows), []
    errors, entry = torch.zeros_like(rows), None
    width = band_columns(rows.shape[1])
    for start in range(0, rows.shape[1], width):
        band = slice(start, min(start + width, rows.shape[1]))
        wanted = rows[:, band] + errors[:, :start] @ feedback(factor, band).to(rows)
        cost = squared_error_cost((wanted / safe).flatten())
        states.append(backend.encode_states(cost, segment.code, "best", None, entry))
        found = backend.candidates(states[-1], segment.code).flatten()[: wanted.numel()]
        z[:, band] = found.view(wanted.shape)
        errors[:, band] = rows[:, band] - z[:, band] * safe
        entry = int(states[-1][-1]) & ((1 << segment.code.overlap_bits) - 1)
    fitted = _fitted_scales(rows, z, factor.to(rows), segment.row_scales) / math.sqrt(rotation)
    message = pack_states(torch.cat(states).numpy(), segment.code)
    return CodedRows(segment.rows, segment.code, rounded_scales(fitted).bfloat16(), message)


def feedback(factor: Tensor, band: slice, first: int = 0) -> Tensor:
    """What errors of columns from the first to a band ask of it: U_{<b,b}·U_bb⁻¹, `[start - first, band]`.

    Of all columns that are left it is what makes up for the errors best.
    """
    own, above = factor[band, band], factor[first : band.start, band]
    return torch.linalg.solve_triangular(own, above, upper=True, left=False)


def _fitted_scales(rows: Tensor, z: Tensor, factor: Tensor, per_row: bool) -> Tensor:
    """The scales of least cost for the chosen candidates; never negative."""
    seen, wanted = z @ factor, rows @ factor
    product, power = seen * wanted, seen * seen
    top, bottom = (product.sum(1), power.sum(1)) if per_row else (product.sum(), power.sum())
    return (top / bottom.clamp(min=torch.finfo(torch.float32).tiny)).clamp(min=0).view(-1)
