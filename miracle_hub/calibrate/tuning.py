"""Tuning at the end: what codes leave free, scales and vectors, is fitted to the dense model's answers."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from torch.optim import Adam
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

from miracle_hub.calibrate.fitting import BETAS, asking, backward, group
from miracle_hub.calibrate.kept_steps import kept_steps
from miracle_hub.calibrate.matrix import MatrixInMaking
from miracle_hub.codec.kept import Kept


@dataclass
class Tuning:
    """Some steps of Adam on the gains of scales and on vectors.

    The gradient of a matrix becomes that of its gains, and goes, as soon as it is there: what it takes is the
    memory of one matrix beside the model.

    Attributes:
        rate: of scales, relative; of vectors half of it, over their root mean square.
        loss: of a batch, by its number.
        before: what vectors were before the run.
    """

    matrices: Sequence[MatrixInMaking]
    vectors: Sequence[nn.Parameter]
    rate: float
    loss: Callable[[int], Tensor]
    before: list[Tensor] = field(default_factory=list)

    def run(self, numbers: Sequence[int], kept: Kept, step: str, progress: bool = False) -> None:
        """One step for every number of a batch.

        Args:
            step: under which name steps are kept every few minutes.

        Raises:
            CalibrationError: a loss is not finite.
        """
        self.before = [p.detach().clone() for p in self.vectors]
        gains = [nn.Parameter(matrix.gains.clone()) for matrix in self.matrices]
        vectors = [group(p, self.rate / 2) for p in self.vectors]
        optimizer = Adam([{"params": gains, "lr": self.rate}, *vectors], betas=BETAS)
        schedule = LambdaLR(optimizer, lambda i: 1 - 0.9 * i / len(numbers))
        asked = [*(matrix.parameter for matrix in self.matrices), *self.vectors]
        with asking(asked), self._gradients(gains):
            # With matrices as they are, whose last bits depend on all gains that they had.
            fitted, then = [*gains, *asked], partial(self._have, gains)
            left = kept_steps(kept, step, numbers, optimizer, schedule, fitted, then)
            for number in tqdm(left, desc="tune", total=len(numbers), disable=not progress):
                backward(self.loss, number, asked[0].device)
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
                self.set_gains(self.matrices, gains)

    def _have(self, gains: Sequence[Tensor]) -> None:
        """State the gains by which matrices are multiplied already."""
        for matrix, gain in zip(self.matrices, gains, strict=True):
            matrix.gains = gain.detach().clone()

    def undo(self) -> None:
        """Make everything what it was before the run."""
        self.set_gains(self.matrices, [torch.ones_like(matrix.gains) for matrix in self.matrices])
        for parameter, values in zip(self.vectors, self.before, strict=True):
            parameter.data.copy_(values)

    @staticmethod
    @torch.no_grad()
    def set_gains(matrices: Sequence[MatrixInMaking], gains: Sequence[Tensor]) -> None:
        """Multiply coded matrices by other gains than they had."""
        for matrix, gain in zip(matrices, gains, strict=True):
            matrix.multiply(matrix.by_row(gain.detach() / matrix.gains))
            matrix.gains = gain.detach().clone()

    @contextmanager
    def _gradients(self, gains: Sequence[nn.Parameter]) -> Iterator[None]:
        """Within it gains have gradients as soon as weights do, which are the coded ones times the gains."""
        pairs = zip(self.matrices, gains, strict=True)
        handles = [m.parameter.register_post_accumulate_grad_hook(_taking(m, gain)) for m, gain in pairs]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _taking(matrix: MatrixInMaking, gain: nn.Parameter) -> Callable[[Tensor], None]:
    def take(weights: Tensor) -> None:
        assert weights.grad is not None
        of_rows = (weights.grad * matrix.own()).view(-1, matrix.columns).sum(1)
        gain.grad = matrix.by_scale(of_rows) / gain.detach()
        weights.grad = None

    return take
