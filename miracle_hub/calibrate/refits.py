"""Refits: what is not coded yet is fitted to the dense model's answers; at the end scales and vectors are."""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from tqdm import tqdm

from miracle_hub.calibrate.matrix import MatrixInMaking
from miracle_hub.calibrate.teacher import Teacher
from miracle_hub.codec.report import CALIBRATION_LOGGER
from miracle_hub.errors import CalibrationError

_LOGGER = logging.getLogger(CALIBRATION_LOGGER)
_BETAS = (0.9, 0.98)
_STEPS_OF_RATE = 1000


@dataclass(frozen=True)
class RefitOptions:
    """How long and how fast.

    Attributes:
        groups: parts in which every matrix is coded.
        steps: of refits between two groups.
        end_steps: of tuning when everything is coded.
        rate: of weights, over their root mean square, where there are 1,000 steps or more.
        end_rate: of scales, relative; of vectors half of it, over their root mean square.
    """

    groups: int = 1
    steps: int = 0
    end_steps: int = 0
    rate: float = 0.03
    end_rate: float = 1e-3

    @property
    def refit_rate(self) -> float:
        """Of weights: few steps are small ones. 48 steps at 0.01 took SmolLM2 from 0.12 to 0.41 nats."""
        return self.rate * min(1.0, (self.groups - 1) * self.steps / _STEPS_OF_RATE)

    @property
    def all_steps(self) -> int:
        """Of the optimizers."""
        return (self.groups - 1) * self.steps + self.end_steps

    def share(self, group: int) -> float:
        """Of the columns, that are coded after a group: the last groups are small."""
        return 1 - (1 - group / self.groups) ** 2


@dataclass
class Refits:
    """One making of all matrices of a model."""

    model: nn.Module
    teacher: Teacher
    held_out: Teacher
    matrices: Sequence[MatrixInMaking]
    vectors: Sequence[nn.Parameter]
    options: RefitOptions
    progress: bool = False
    seed: int = 0
    losses: list[tuple[str, float]] = field(default_factory=list)

    def run(self) -> None:
        """Code everything, with refits between groups, and tune what codes leave free."""
        options = self.options
        for group in range(1, options.groups + 1):
            for matrix in tqdm(
                self.matrices, desc=f"code {group}/{options.groups}", disable=not self.progress
            ):
                matrix.code(matrix.columns if matrix.is_first else matrix.columns_at(options.share(group)))
            self._report(f"coded {options.share(group):.0%}")
            if group < options.groups and options.steps:
                self._fit(group)
        if options.end_steps:
            self._tune()

    def _report(self, what: str) -> None:
        self.losses.append((what, self.held_out.mean_divergence(self.model)))
        _LOGGER.info("%s: %.4f on held-out rows", *self.losses[-1])

    def _order(self, salt: int, steps: int) -> list[int]:
        """Numbers of batches, every batch once before any comes again."""
        generator = torch.Generator().manual_seed(self.seed * 1009 + salt)
        found: list[int] = []
        while len(found) < steps:
            found += torch.randperm(len(self.teacher), generator=generator).tolist()
        return found[:steps]

    def _fit(self, group: int) -> None:
        """Fit the columns that are not coded, and vectors; what does not help on held-out rows is undone."""
        free = [m for m in self.matrices if m.n_coded < m.columns]
        fitted = [*(m.parameter for m in free), *self.vectors]
        rate = self.options.refit_rate
        optimizer = torch.optim.Adam([_group(p, rate) for p in fitted], betas=_BETAS)
        coded = [m.rotated()[:, : m.n_coded].clone() for m in free]
        before = [p.detach().clone() for p in fitted]
        steps = self.options.steps
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _risen_and_fallen(step / steps))
        with _asking(fitted):
            for number in tqdm(self._order(group, steps), desc="refit", disable=not self.progress):
                self._backward(number)
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
                for matrix, kept in zip(free, coded, strict=True):
                    matrix.keep(kept)
        self._report_or_undo(f"refitted after {self.options.share(group):.0%}", fitted, before)

    def _report_or_undo(self, what: str, fitted: Sequence[nn.Parameter], before: Sequence[Tensor]) -> bool:
        """Whether it is undone, as what does not help on held-out rows."""
        at_start = self.losses[-1][1]
        self._report(what)
        if self.losses[-1][1] < at_start:
            return False
        for parameter, values in zip(fitted, before, strict=True):
            parameter.data.copy_(values)
        self.losses[-1] = (f"{what}: undone", at_start)
        _LOGGER.info("%s: %.4f again", *self.losses[-1])
        return True

    def _tune(self) -> None:
        """Tune scales and vectors; a tuning that does not help on held-out rows is undone."""
        at_start = [p.detach().clone() for p in self.vectors]
        gains = [nn.Parameter(m.gains.clone()) for m in self.matrices]
        weights = [m.parameter.detach().clone() for m in self.matrices]
        rate, steps = self.options.end_rate, self.options.end_steps
        optimizer = torch.optim.Adam(
            [{"params": gains, "lr": rate}, *[_group(p, rate / 2) for p in self.vectors]], betas=_BETAS
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - 0.9 * step / steps)
        with _asking([m.parameter for m in self.matrices] + list(self.vectors)):
            for number in tqdm(self._order(0, steps), desc="tune", disable=not self.progress):
                self._backward(number)
                for matrix, gain, weight in zip(self.matrices, gains, weights, strict=True):
                    gain.grad = _gradient(matrix, weight)
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
                for matrix, gain, weight in zip(self.matrices, gains, weights, strict=True):
                    _set_gains(matrix, gain.detach(), weight)
        fitted = [*(m.parameter for m in self.matrices), *self.vectors]
        if self._report_or_undo("tuned", fitted, [*weights, *at_start]):
            for matrix in self.matrices:
                matrix.gains = torch.ones_like(matrix.gains)

    def _backward(self, number: int) -> None:
        """
        Raises:
            CalibrationError: the loss is not finite.
        """
        with torch.enable_grad():
            loss = self.teacher.divergence(self.model, number)
        if not math.isfinite(value := loss.item()):
            raise CalibrationError(
                f"batch {number}: expected a finite divergence from the dense model, found {value}; "
                "look at the data, or compress without refits (--effort 0)"
            )
        loss.backward()


def _risen_and_fallen(share: float) -> float:
    """Of a rate, after a share of the steps: it rises over an eighth of them and falls to a tenth."""
    return min(1.0, 8 * share + 0.1, 1 - 0.9 * (share - 0.125) / 0.875)


def _group(parameter: nn.Parameter, rate: float) -> dict:
    rms = float(parameter.detach().square().mean().sqrt())
    return {"params": [parameter], "lr": rate * (rms or 1.0)}


def _gradient(matrix: MatrixInMaking, weight: Tensor) -> Tensor:
    """Of the gains, from that of the weights, which are `weight` times the gains."""
    gradient = matrix.parameter.grad
    if gradient is None:
        return torch.zeros_like(matrix.gains)
    found = matrix.by_scale((gradient * weight).view(-1, matrix.columns).sum(1))
    matrix.parameter.grad = None
    return found


def _set_gains(matrix: MatrixInMaking, gains: Tensor, weight: Tensor) -> None:
    matrix.gains = gains.clone()
    rows = matrix.by_row(gains)[:, None]
    matrix.parameter.data.copy_((weight.view(-1, matrix.columns) * rows).view(weight.shape))


class _asking:
    """Within it some parameters ask for gradients, and no others."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = parameters

    def __enter__(self) -> None:
        for parameter in self.parameters:
            parameter.requires_grad_(True)

    def __exit__(self, *_: object) -> None:
        for parameter in self.parameters:
            parameter.requires_grad_(False)
            parameter.grad = None
