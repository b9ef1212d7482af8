"""The encoder with feedback: every band of columns makes up for the errors of those before it.

With U upper triangular and U·Uᵀ the moments of the columns, errors E cost ‖E·U‖². Column j of E·U is
U_jj·(E_j + Σ_{i<j} E_i U_ij/U_jj): coding w_j plus that sum leaves U_jj·(error of the search).

Source: Frantar et al. 2022 (GPTQ, arXiv:2210.17323); Chee et al. 2023 (LDLQ, arXiv:2307.13304), theorem 1;
    by bands as in QTIP (arXiv:2406.11235), section 3.3.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float32
from torch import Tensor

from miracle_hub.codec.aligned import gain
from miracle_hub.coding.backend import Backend
from miracle_hub.coding.encode import pack_states
from miracle_hub.coding.matrix import CodedRows
from miracle_hub.coding.posterior import squared_error_cost
from miracle_hub.coding.scales import prior_scale, rounded_scales
from miracle_hub.format.payload import Segment

# Of one layer of SmolLM2, bands of 8 columns lowered the cost of the matrices by 1 to 9 %, of 4 by 2 to 12 %,
# at about two and four times the time. Narrow matrices, which take no time, have the narrowest: refits need
# many.
_BAND_COLUMNS, _NARROW_BAND_COLUMNS = 16, 4
_NARROW = 256


def band_columns(columns: int) -> int:
    """Columns of a band of a matrix; whole steps of every code of `ladder`."""
    return _BAND_COLUMNS if columns >= _NARROW else _NARROW_BAND_COLUMNS


class BandCoder:
    """Rows of a rotated matrix that are coded band after band.

    Attributes:
        scales: of the candidates, one tensor for every segment, before the rotation's factor.
        gains: of these over the prior's, for every segment; 1 but for differences, see `aligned`.
        states: windows of the message so far, int32, for every segment by band; none when all is coded.
        messages: one for every segment, when all is coded.
    """

    def __init__(
        self, matrix: Float32[Tensor, "rows columns"], segments: Sequence[Segment], factor: Tensor | None,
        backend: Backend, is_difference: bool = False,
    ) -> None:  # fmt: skip
        """
        Args:
            matrix: as it is before anything is coded; scales are its own.
            factor: U, float64 `[columns, columns]`; see above. None means no feedback.
            is_difference: of some tensor to that of a base.
        """
        self.segments, self.backend = segments, backend
        self.factor = None if factor is None else factor.to(matrix.device)
        self.width = band_columns(matrix.shape[1])
        shares = [max(0.0, 1 - prior_scale(segment.code) ** 2) for segment in segments]  # that coding leaves
        self.gains = [gain(share) if is_difference else 1.0 for share in shares]
        own = zip(self._by_segment(matrix), self.gains, strict=True)
        self.scales = [_prior_scales(rows, segment) * raised for (rows, segment), raised in own]
        self.states: list[list[Tensor]] = [[] for _ in segments]
        self.messages: list[Tensor] = []

    def code(self, matrix: Float32[Tensor, "rows columns"], first: int, until: int) -> None:
        """Code columns [first, until) of a matrix in place; those after them make up for the errors.

        Args:
            first: where the last call stopped.
        """
        errors = torch.zeros_like(matrix[:, first:until])
        for start in range(first, until, self.width):
            band = slice(start, min(start + self.width, until))
            wanted = matrix[:, band] + self._asked(errors[:, : start - first], band, first)
            found = self._coded(wanted)
            errors[:, start - first : band.stop - first] = matrix[:, band] - found
            matrix[:, band] = found
        rest = slice(until, matrix.shape[1])
        matrix[:, rest] += self._asked(errors, rest, first)
        if until == matrix.shape[1]:
            self._finish()

    def _finish(self) -> None:
        """Pack the messages; windows, and the factor, take more memory than the matrix."""
        windows = [torch.cat(own).long().cpu().numpy() for own in self.states]
        pairs = zip(windows, self.segments, strict=True)
        self.messages = [pack_states(own, segment.code) for own, segment in pairs]
        self.states, self.factor = [[] for _ in self.segments], None

    def _asked(self, errors: Tensor, band: slice, first: int) -> Tensor | float:
        """What errors of the columns from the first to a band ask of it: times U_{<b,b}·U_bb⁻¹.

        Of all columns that are left it is what makes up for the errors best.
        """
        if self.factor is None or band.start == band.stop or not errors.shape[1]:
            return 0.0
        own, above = self.factor[band, band], self.factor[first : band.start, band]
        return errors @ torch.linalg.solve_triangular(own, above, upper=True, left=False).to(errors)

    def _coded(self, wanted: Tensor) -> Tensor:
        """What the next steps of every segment's message stand for, and these steps."""
        parts = []
        for (rows, segment), scales, raised, states in zip(
            self._by_segment(wanted), self.scales, self.gains, self.states, strict=True
        ):
            safe = torch.where(scales > 0, scales / raised, 1.0)[:, None]
            entry = int(states[-1][-1]) & ((1 << segment.code.overlap_bits) - 1) if states else None
            cost = squared_error_cost((rows / safe).flatten())
            found = self.backend.encode_states(cost, segment.code, "best", None, entry)
            states.append(found.int())
            z = self.backend.candidates(found, segment.code).flatten()[: rows.numel()]
            parts.append(z.view(rows.shape) * scales[:, None])
        return torch.cat(parts)

    def parts(self, scales: Sequence[Tensor], rotation: int) -> list[CodedRows]:
        """What is coded, when that is all columns, with other scales for the same candidates."""
        words = [rounded_scales(own / math.sqrt(rotation)).bfloat16() for own in scales]
        parts = zip(self.segments, words, self.messages, strict=True)
        return [CodedRows(segment.rows, segment.code, own, message) for segment, own, message in parts]

    def _by_segment(self, matrix: Tensor) -> list[tuple[Tensor, Segment]]:
        rows = matrix.split([segment.rows for segment in self.segments])
        return list(zip(rows, self.segments, strict=True))


def encode_with_feedback(
    matrix: Float32[Tensor, "rows columns"],
    segments: Sequence[Segment],
    rotation: int,
    factor: Tensor,
    backend: Backend,
    is_difference: bool = False,
) -> list[CodedRows]:
    """All columns of a rotated matrix, with the scales of least cost for the candidates."""
    coder, coded = BandCoder(matrix, segments, factor, backend, is_difference), matrix.clone()
    coder.code(coded, 0, matrix.shape[1])
    seen, wanted = coded @ factor.to(coded), matrix @ factor.to(matrix)
    rows = [segment.rows for segment in segments]
    parts = zip(coder.scales, seen.split(rows), wanted.split(rows), strict=True)
    return coder.parts([_fitted(*part) for part in parts], rotation)


def _prior_scales(rows: Tensor, segment: Segment) -> Tensor:
    power = rows.square().mean(1) if segment.row_scales else rows.square().mean().view(1)
    return rounded_scales(power.sqrt() * prior_scale(segment.code))


def _fitted(scales: Tensor, seen: Tensor, wanted: Tensor) -> Tensor:
    """The scales of least cost for the chosen candidates; never negative."""
    product, power = (seen * wanted).sum(1), (seen * seen).sum(1)
    top, bottom = (product, power) if len(scales) == len(seen) else (product.sum(), power.sum())
    return scales * (top / bottom.clamp(min=torch.finfo(torch.float32).tiny)).clamp(min=0).view(-1)
