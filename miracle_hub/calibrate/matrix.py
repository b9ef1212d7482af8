"""A matrix in the making: some of its columns are coded, the others still free to make up for them."""

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn
from tqdm import tqdm

from miracle_hub.codec.body import body_of
from miracle_hub.codec.feedback import BandCoder
from miracle_hub.codec.handed_out import decoded_in_range, left_by, relative_error
from miracle_hub.codec.jobs import Job
from miracle_hub.codec.trellis import Recipe, layout_of, segments_of
from miracle_hub.coding.backend import Backend, rotated_matrix
from miracle_hub.coding.cpu import in_threads, torch_threads
from miracle_hub.format.payload import Header, encode_payload


class MatrixInMaking:
    """One parameter of a model, whose rotated columns are coded band after band.

    Attributes:
        parameter: what the model runs with; of its rotated columns the first `n_coded` are those of the file.
        gains: by which tuning multiplied the scales, float32 `[scales]`.
        is_first: whether all of it is coded before anything is refitted.
    """

    def __init__(self, job: Job, parameter: nn.Parameter, backend: Backend, is_first: bool = False) -> None:
        recipe: Recipe = job.choice.option.recipe
        self.job, self.parameter, self.backend, self.is_first = job, parameter, backend, is_first
        self.columns, self.rotation = recipe.columns, recipe.rotation
        self.base = None if job.based is None else job.based.load_base()
        self.segments = segments_of(job.choice)
        factor = None if job.curvature is None else job.curvature.factor(self.rotation, backend)
        self.coder = BandCoder(self.rotated(), self.segments, factor, backend, self.base is not None)
        n_scales = sum(segment.n_scales for segment in self.segments)
        self.n_coded, self.gains = 0, torch.ones(n_scales, device=parameter.device)

    def rotated(self) -> Tensor:
        """The rotated matrix, `[rows, columns]`; of a difference to a base, that difference."""
        return rotated_matrix(self.own(), self.columns, self.rotation, self.backend)

    def own(self) -> Tensor:
        """What the payload stands for: the parameter, or its difference to a base."""
        return left_by(self._earlier(), self.parameter.detach())

    def multiply(self, rows: Tensor) -> None:
        """Multiply that by a factor for every row of the matrix view."""
        own = self.own().view(-1, self.columns) * rows[:, None]
        self.parameter.data.copy_(sum(self._earlier(), start=own.view(self.parameter.shape)))

    def _earlier(self) -> list[Tensor]:
        """What the payload is added to."""
        return [] if self.base is None else [self.base.to(self.parameter)]

    def set_rotated(self, matrix: Tensor) -> None:
        """Make it what the model runs with."""
        weights = rotated_matrix(matrix, self.columns, self.rotation, self.backend).view(self.parameter.shape)
        self.parameter.data.copy_(sum(self._earlier(), start=weights))

    def tensors(self) -> dict[str, Tensor]:
        """All that coding, refits and tuning have made so far, for a file; see `go_on`."""
        found = {"parameter": self.parameter, "gains": self.gains, "n_coded": torch.tensor(self.n_coded)}
        found |= {f"scales.{i}": scales for i, scales in enumerate(self.coder.scales)}
        found |= {f"states.{i}": torch.cat(own) for i, own in enumerate(self.coder.states) if own}
        return found | {f"message.{i}": message for i, message in enumerate(self.coder.messages)}

    def go_on(self, found: Mapping[str, Tensor]) -> None:
        """Be where the matrix of `tensors` was."""
        self.parameter.data.copy_(found["parameter"])
        self.gains, self.n_coded = found["gains"].to(self.gains), int(found["n_coded"])
        for i, (scales, states) in enumerate(zip(self.coder.scales, self.coder.states, strict=True)):
            scales.copy_(found[f"scales.{i}"])
            states[:] = [found[name].to(scales.device)] if (name := f"states.{i}") in found else []
        n_messages = sum(name.startswith("message.") for name in found)
        self.coder.messages = [found[f"message.{i}"] for i in range(n_messages)]

    def columns_at(self, share: float) -> int:
        """Whole bands that hold a share of the columns."""
        bands = -(-self.columns // self.coder.width)
        return min(self.columns, round(share * bands) * self.coder.width)

    @torch.no_grad()
    def code(self, until: int) -> None:
        """Code the columns up to one; those after it are moved to make up for the errors."""
        if until <= self.n_coded:
            return
        matrix = self.rotated()
        self.coder.code(matrix, self.n_coded, until)
        self.set_rotated(matrix)
        self.n_coded = until

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

    @torch.no_grad()
    def keep(self, coded: Tensor) -> None:
        """Undo what a step did to the coded columns, which were `coded` before."""
        matrix = self.rotated()
        matrix[:, : self.n_coded] = coded
        self.set_rotated(matrix)

    @torch.no_grad()
    def payload(self) -> bytes:
        """The payload of a matrix whose columns are all coded, times its gains."""
        source, width = self.job.source, self.coder.width
        is_difference = self.base is not None
        header = Header(
            source.dtype, source.shape, self.columns, self.rotation, self.segments, width,
            is_difference=is_difference,
        )  # fmt: skip
        gains = self.gains.split([segment.n_scales for segment in self.segments])
        scales = [own * gain.to(own) for own, gain in zip(self.coder.scales, gains, strict=True)]
        parts, weights = self.coder.parts(scales, self.rotation), source.load().to(self.backend.device)
        layout, backend, earlier = layout_of(header), self.backend, self._earlier()
        handed_out, digest = decoded_in_range(parts, layout, earlier, weights.dtype, backend)
        error = relative_error(handed_out.view(weights.shape), earlier, weights)
        return encode_payload(replace(header, digest=digest, relative_error=error), body_of(parts))


def code_all(wanted: Iterable[tuple[MatrixInMaking, int]], desc: str = "", progress: bool = False) -> None:
    """Code matrices up to their columns; on the CPU several at once, as a band keeps one thread busy."""
    tasks = list(wanted)
    with tqdm(total=len(tasks), desc=desc, disable=not progress) as bar:

        def code(matrix: MatrixInMaking, until: int) -> None:
            matrix.code(until)
            bar.update()

        if all(matrix.backend.device.type == "cpu" for matrix, _ in tasks) and torch_threads() > 1:
            in_threads(code, tasks)
        else:
            for task in tasks:
                code(*task)
