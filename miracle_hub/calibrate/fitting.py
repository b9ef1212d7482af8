"""Fits of free weights to a loss of numbered batches, by Adam; what does not help can be undone."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from tqdm import tqdm

from miracle_hub.calibrate.matrix import MatrixInMaking

BETAS = (0.9, 0.98)
# Batches are the mirror of those seeds that others use: no meaning beyond that.
_SEEDS = 1009


def order(n: int, steps: int, seed: int, salt: int) -> list[int]:
    """Numbers of batches below n, every batch once before any comes again."""
    generator = torch.Generator().manual_seed(seed * _SEEDS + salt)
    found: list[int] = []
    while len(found) < steps:
        found += torch.randperm(n, generator=generator).tolist()
    return found[:steps]


@dataclass
class Fit:
    """Some steps of Adam.

    Attributes:
        free: matrices whose columns are not all coded; those that are stay.
        vectors: what stays plain.
        rate: of weights, over their root mean square.
        vector_rate: of vectors.
        loss: of a batch, by its number; it runs backward.
    """

    free: Sequence[MatrixInMaking]
    vectors: Sequence[nn.Parameter]
    rate: float
    vector_rate: float
    loss: Callable[[int], Tensor]
    before: list[Tensor] = field(default_factory=list)

    @property
    def fitted(self) -> list[nn.Parameter]:
        """Of matrices and vectors."""
        return [*(matrix.parameter for matrix in self.free), *self.vectors]

    def run(self, numbers: Sequence[int], progress: bool = False) -> None:
        """One step for every number of a batch."""
        self.before = [p.detach().clone() for p in self.fitted]
        rates = [self.rate] * len(self.free) + [self.vector_rate] * len(self.vectors)
        groups = [group(p, rate) for p, rate in zip(self.fitted, rates, strict=True)]
        optimizer = torch.optim.Adam(groups, betas=BETAS)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: _risen_and_fallen(i / len(numbers)))
        coded = [m.rotated()[:, : m.n_coded].clone() for m in self.free]
        with asking(self.fitted):
            for number in tqdm(numbers, desc="refit", disable=not progress, leave=False):
                with torch.enable_grad():
                    self.loss(number).backward()
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
                for matrix, kept in zip(self.free, coded, strict=True):
                    matrix.keep(kept)

    def undo(self) -> None:
        """Make everything what it was before the run."""
        for parameter, values in zip(self.fitted, self.before, strict=True):
            parameter.data.copy_(values)


def _risen_and_fallen(share: float) -> float:
    """Of a rate, after a share of the steps: it rises over an eighth of them and falls to a tenth."""
    return min(1.0, 8 * share + 0.1, 1 - 0.9 * (share - 0.125) / 0.875)


def group(parameter: nn.Parameter, rate: float) -> dict:
    """Of an optimizer, with a rate over the root mean square."""
    rms = float(parameter.detach().square().mean().sqrt())
    return {"params": [parameter], "lr": rate * (rms or 1.0)}


@contextmanager
def asking(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Within it some parameters ask for gradients, and no others."""
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)
            parameter.grad = None
