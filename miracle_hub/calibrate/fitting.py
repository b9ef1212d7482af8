"""Fits of free weights to a loss of numbered batches, by Adam; what does not help can be undone."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.optim import Adam
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

from miracle_hub.calibrate.kept_steps import kept_steps
from miracle_hub.calibrate.matrix import MatrixInMaking
from miracle_hub.calibrate.precision import fast_products
from miracle_hub.codec.kept import Kept
from miracle_hub.errors import CalibrationError

BETAS = (0.9, 0.98)
_SALTS = 1009  # of one seed: a prime above the number of fits that most models need


@dataclass
class Fit:
    """Some steps of Adam.

    Attributes:
        free: matrices, whose coded columns stay.
        vectors: what stays plain.
        rate: of weights, over their root mean square.
        vector_rate: of vectors.
        loss: of a batch, by its number.
        before: what everything was before the run.
    """

    free: Sequence[MatrixInMaking]
    vectors: Sequence[nn.Parameter]
    rate: float
    vector_rate: float
    loss: Callable[[int], Tensor]
    before: list[Tensor] = field(default_factory=list)

    @property
    def fitted(self) -> list[nn.Parameter]:
        """Parameters of matrices and vectors."""
        return [*(matrix.parameter for matrix in self.free), *self.vectors]

    def run(self, numbers: Sequence[int], kept: Kept, step: str, progress: bool = False) -> None:
        """One step for every number of a batch.

        Args:
            step: under which name steps are kept every few minutes.

        Raises:
            CalibrationError: a loss is not finite.
        """
        fitted = self.fitted
        self.before = [p.detach().clone() for p in fitted]
        rates = [self.rate] * len(self.free) + [self.vector_rate] * len(self.vectors)
        optimizer = Adam([group(p, rate) for p, rate in zip(fitted, rates, strict=True)], betas=BETAS)
        schedule = LambdaLR(optimizer, lambda i: risen_and_fallen(i / len(numbers)))
        coded = [m.rotated()[:, : m.n_coded].clone() for m in self.free]
        with asking(fitted):
            left = kept_steps(kept, step, numbers, optimizer, schedule, fitted)
            for number in tqdm(left, desc="refit", total=len(numbers), disable=not progress, leave=False):
                backward(self.loss, number, fitted[0].device)
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
                for matrix, values in zip(self.free, coded, strict=True):
                    matrix.keep(values)

    def undo(self) -> None:
        """Make everything what it was before the run."""
        for parameter, values in zip(self.fitted, self.before, strict=True):
            parameter.data.copy_(values)


def coded_share(group: int, groups: int) -> float:
    """Of the columns of a matrix, that are coded after a group: the last groups are small."""
    return 1 - (1 - group / groups) ** 2


def order(n: int, steps: int, seed: int, salt: int) -> list[int]:
    """Numbers of batches below n, one for each step; every batch comes once before any comes again."""
    generator = torch.Generator().manual_seed(seed * _SALTS + salt)
    found: list[int] = []
    while len(found) < steps:
        found += torch.randperm(n, generator=generator).tolist()
    return found[:steps]


def backward(loss: Callable[[int], Tensor], number: int, device: torch.device) -> None:
    """Gradients of the loss of a batch.

    Raises:
        CalibrationError: the loss is not finite.
    """
    with torch.enable_grad(), fast_products(device):
        found = loss(number)
    if not math.isfinite(value := found.item()):
        raise CalibrationError(
            f"batch {number}: expected a finite divergence from the dense model, found {value}; "
            "look at the data, or compress without refits (--effort 0)"
        )
    found.backward()


def risen_and_fallen(share: float) -> float:
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
