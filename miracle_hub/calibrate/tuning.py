"""Tuning at the end: what codes leave free, scales and vectors, is fitted to the dense model's answers."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from tqdm import tqdm

from miracle_hub.calibrate.fitting import BETAS, asking, group
from miracle_hub.calibrate.matrix import MatrixInMaking


@dataclass
class Tuning:
    """Some steps of Adam on the gains of scales and on vectors.

    The gradient of a matrix becomes that of its gains, and goes, as soon as it is there: the memory is that of
    one matrix beside the model.

    Attributes:
        rate: of scales, relative; of vectors half of it, over their root mean square.
        loss: of a batch, by its number; it runs backward.
    """

    matrices: Sequence[MatrixInMaking]
    vectors: Sequence[nn.Parameter]
    rate: float
    loss: Callable[[int], Tensor]
    before: list[Tensor] = field(default_factory=list)

    def run(self, numbers: Sequence[int], progress: bool = False) -> None:
        """One step for every number of a batch."""
        self.before = [p.detach().clone() for p in self.vectors]
        gains = [nn.Parameter(matrix.gains.clone()) for matrix in self.matrices]
        vectors = [group(p, self.rate / 2) for p in self.vectors]
        optimizer = torch.optim.Adam([{"params": gains, "lr": self.rate}, *vectors], betas=BETAS)
        falling = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 1 - 0.9 * i / len(numbers))
        with asking([*(m.parameter for m in self.matrices), *self.vectors]), self._gradients(gains):
            for number in tqdm(numbers, desc="tune", disable=not progress):
                with torch.enable_grad():
                    self.loss(number).backward()
                optimizer.step()
                optimizer.zero_grad()
                falling.step()
                self._set(gains)

    def undo(self) -> None:
        """Make everything what it was before the run."""
        self._set([torch.ones_like(matrix.gains) for matrix in self.matrices])
        for parameter, values in zip(self.vectors, self.before, strict=True):
            parameter.data.copy_(values)

    @torch.no_grad()
    def _set(self, gains: Sequence[Tensor]) -> None:
        for matrix, gain in zip(self.matrices, gains, strict=True):
            rows = matrix.parameter.data.view(-1, matrix.columns)
            rows.mul_(matrix.by_row(gain.detach() / matrix.gains)[:, None])
            matrix.gains = gain.detach().clone()

    @contextmanager
    def _gradients(self, gains: Sequence[nn.Parameter]) -> Iterator[None]:
        """Within it gains get the gradients of the weights, which are the coded ones times the gains."""

        def taken(matrix: MatrixInMaking, gain: nn.Parameter) -> Callable[[Tensor], None]:
            def take(weights: Tensor) -> None:
                assert weights.grad is not None
                found = (weights.grad * weights.detach()).view(-1, matrix.columns).sum(1)
                gain.grad = matrix.by_scale(found) / gain.detach()
                weights.grad = None

            return take

        pairs = zip(self.matrices, gains, strict=True)
        handles = [m.parameter.register_post_accumulate_grad_hook(taken(m, g)) for m, g in pairs]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
