"""A matrix in the making: some of its columns are coded, the others still free to make up for them."""

import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from miracle_hub.codec.body import body_of
from miracle_hub.codec.curvature import Curvature
from miracle_hub.codec.dtypes import TORCH_DTYPES
from miracle_hub.codec.feedback import band_columns, feedback
from miracle_hub.codec.handed_out import decoded_in_range, relative_error
from miracle_hub.codec.jobs import Job
from miracle_hub.codec.trellis import Recipe, layout_of, segments_of
from miracle_hub.coding.backend import Backend, rotated_matrix
from miracle_hub.coding.encode import pack_states
from miracle_hub.coding.matrix import CodedRows
from miracle_hub.coding.posterior import squared_error_cost
from miracle_hub.coding.scales import prior_scale, rounded_scales
from miracle_hub.format.payload import Header, Segment, encode_payload


class MatrixInMaking:
    """One parameter of a model, whose rotated columns are coded band after band.

    Attributes:
        parameter: what the model runs with; of its rotated columns the first `n_coded` are those of the file.
        gains: by which tuning multiplied the scales, float32 `[scales]`.
    """

    def __init__(self, job: Job, parameter: nn.Parameter, backend: Backend) -> None:
        recipe: Recipe = job.choice.option.recipe
        self.job, self.parameter, self.backend = job, parameter, backend
        self.columns, self.rotation = recipe.columns, recipe.rotation
        curvature = job.curvature or Curvature(torch.ones(1), None)
        self.factor = curvature.factor(self.rotation, backend)
        self.segments, self.width = segments_of(job.choice), band_columns(self.columns)
        self.states: list[list[Tensor]] = [[] for _ in self.segments]
        self.scales = [_prior_scales(r, s) for r, s in self._by_segment(self.rotated())]
        self.n_coded, self.gains = 0, torch.ones(sum(segment.n_scales for segment in self.segments))

    def rotated(self) -> Tensor:
        """The rotated matrix, `[rows, columns]`."""
        return rotated_matrix(self.parameter.detach(), self.columns, self.rotation, self.backend)

    def set_rotated(self, matrix: Tensor) -> None:
        """Make it what the model runs with."""
        weights = rotated_matrix(matrix, self.columns, self.rotation, self.backend)
        self.parameter.data.copy_(weights.view(self.parameter.shape))

    def columns_at(self, share: float) -> int:
        """Whole bands that hold a share of the columns."""
        bands = -(-self.columns // self.width)
        return min(self.columns, round(share * bands) * self.width)

    @torch.no_grad()
    def code(self, until: int) -> None:
        """Code the columns up to one; those after it are moved to make up for the errors."""
        first, matrix = self.n_coded, self.rotated()
        if until <= first:
            return
        errors = torch.zeros_like(matrix[:, first:until])
        for start in range(first, until, self.width):
            band = slice(start, min(start + self.width, until))
            wanted = matrix[:, band].clone()
            if self.factor is not None:
                wanted += errors[:, : start - first] @ feedback(self.factor, band, first).to(wanted)
            found = self._coded(wanted)
            errors[:, start - first : band.stop - first] = matrix[:, band] - found
            matrix[:, band] = found
        if self.factor is not None and until < self.columns:
            rest = slice(until, self.columns)
            matrix[:, rest] += errors @ feedback(self.factor, rest, first).to(matrix)
        self.set_rotated(matrix)
        self.n_coded = until

    def _coded(self, wanted: Tensor) -> Tensor:
        """What the next steps of every segment's message stand for, and these steps."""
        parts = []
        for (rows, segment), scales, states in zip(
            self._by_segment(wanted), self.scales, self.states, strict=True
        ):
            safe = torch.where(scales > 0, scales, 1.0)[:, None]
            mask = (1 << segment.code.overlap_bits) - 1
            entry = int(states[-1][-1]) & mask if states else None
            cost = squared_error_cost((rows / safe).flatten())
            states.append(self.backend.encode_states(cost, segment.code, "best", None, entry).int())
            z = self.backend.candidates(states[-1].long(), segment.code).flatten()[: rows.numel()]
            parts.append(z.view(rows.shape) * scales[:, None])
        return torch.cat(parts)

    def by_row(self, of_scales: Tensor) -> Tensor:
        """A value of every scale, for every row of the matrix view."""
        parts = of_scales.split([segment.n_scales for segment in self.segments])
        return torch.cat([p.expand(s.rows) for p, s in zip(parts, self.segments, strict=True)])

    def by_scale(self, of_rows: Tensor) -> Tensor:
        """Values of rows, added up over those that share a scale."""
        parts = of_rows.split([segment.rows for segment in self.segments])
        return torch.cat(
            [p if s.row_scales else p.sum().view(1) for p, s in zip(parts, self.segments, strict=True)]
        )

    def _by_segment(self, matrix: Tensor) -> list[tuple[Tensor, Segment]]:
        rows = matrix.split([segment.rows for segment in self.segments])
        return list(zip(rows, self.segments, strict=True))

    @torch.no_grad()
    def keep(self, coded: Tensor) -> None:
        """Undo what a step did to the coded columns, which were `coded` before."""
        matrix = self.rotated()
        matrix[:, : self.n_coded] = coded
        self.set_rotated(matrix)

    @torch.no_grad()
    def payload(self) -> bytes:
        """The payload of a matrix whose columns are all coded, times its gains.

        The model runs with its weights afterwards.
        """
        source = self.job.source
        header = Header(source.dtype, source.shape, self.columns, self.rotation, self.segments, self.width)
        parts, gains = [], self.gains.split([segment.n_scales for segment in self.segments])
        for segment, scales, states, own in zip(self.segments, self.scales, self.states, gains, strict=True):
            words = rounded_scales(scales * own / math.sqrt(self.rotation)).bfloat16()
            message = pack_states(torch.cat(states).long().numpy(), segment.code)
            parts.append(CodedRows(segment.rows, segment.code, words, message))
        dtype = TORCH_DTYPES[source.dtype]
        handed_out, digest = decoded_in_range(parts, layout_of(header), (), dtype, self.backend)
        self.parameter.data.copy_(handed_out.view(self.parameter.shape))
        weights = source.load()
        error = relative_error(handed_out.view(weights.shape), (), weights)
        return encode_payload(replace(header, digest=digest, relative_error=error), body_of(parts))


def _prior_scales(rows: Tensor, segment: Segment) -> Tensor:
    power = rows.square().mean(1) if segment.row_scales else rows.square().mean().view(1)
    return rounded_scales(power.sqrt() * prior_scale(segment.code))
