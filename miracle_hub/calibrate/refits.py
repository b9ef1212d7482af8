"""Refits of a whole model: what is not coded yet is fitted to the dense model's answers."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial

from torch import nn

from miracle_hub.calibrate.block_refits import BlockOptions
from miracle_hub.calibrate.fitting import Fit, coded_share, order
from miracle_hub.calibrate.journal import Journal
from miracle_hub.calibrate.kept_refits import KeptMaking, steps_of
from miracle_hub.calibrate.matrix import MatrixInMaking, code_all
from miracle_hub.calibrate.norms import Norms
from miracle_hub.calibrate.teacher import Teacher
from miracle_hub.codec.kept import Kept

# The fewer columns are left, the more each makes up for, and the faster it may change: the rate is over the
# share that is left. stories260K at 2 bits is 0.98, 0.81 and 0.69 nats away with 0.005, 0.01 and 0.025 all
# along, though 0.005 gains most after the first group, and 0.73 with 0.005 over that share, 0.80 over its
# root; at 3 bits 0.19 with 0.01 all along, 0.176 over the share and 0.178 over its root; before tuning. At 4
# bits 0.001 over the share is as good as 0.005 all along. ResNet-20 at 2 bits is 0.298 away all along and
# 0.270 over the share, MiniLM at 1 bit 0.234 all along and 0.222 over the root; of dev, tuned. This is the
# most that was tried: 0.005 over the last sixty-fourth.
_MOST_RATE = 0.32


@dataclass(frozen=True)
class RefitOptions:
    """How long and how fast.

    Attributes:
        groups: parts in which every matrix is coded.
        steps: of refits between two groups.
        end_steps: of tuning when everything is coded.
        rates: of weights, over their root mean square, from small to large, where all columns are free; the
            first refit tries them until one gains less than the one before it.
        end_rate: of scales, relative; of vectors half of it, over their root mean square.
        blocks: refits block by block instead, where the model has blocks.
    """

    groups: int = 1
    steps: int = 0
    end_steps: int = 0
    # stories260K at 2 bits gains most with 0.005, MiniLM at 1 bit with 0.001, ResNet-20 at 2 bits with 0.005.
    rates: tuple[float, ...] = (0.001, 0.0025, 0.005, 0.01, 0.025)
    end_rate: float = 1e-3
    blocks: BlockOptions | None = None

    @property
    def all_steps(self) -> int:
        """Of optimizers, through the whole model."""
        return (self.groups - 1) * self.steps + self.end_steps

    @property
    def n_batches(self) -> int:
        """That all of this can use."""
        return max(self.all_steps, self.blocks.batches if self.blocks else 0)

    @property
    def is_any(self) -> bool:
        """Whether anything is to be fitted."""
        return bool(self.all_steps or self.blocks)

    def share(self, group: int) -> float:
        """Of the columns, that are coded after a group."""
        return coded_share(group, self.groups)


def first_peak(gains: Iterable[float]) -> int:
    """The place of the first gain that the next one is below; no gain is asked for after that."""
    best, place = -math.inf, 0
    for i, gain in enumerate(gains):
        if gain < best:
            break
        best, place = gain, i
    return place


@dataclass
class Refits:
    """One making of all matrices of a model."""

    teacher: Teacher
    journal: Journal
    matrices: Sequence[MatrixInMaking]
    vectors: Sequence[nn.Parameter]
    options: RefitOptions
    progress: bool = False
    seed: int = 0
    kept: Kept = field(default_factory=Kept)
    norms: Norms | None = None

    def run(self) -> None:
        """Code everything, with refits between groups."""
        plain = [*self.vectors, *(self.norms.buffers.values() if self.norms else ())]
        kept = KeptMaking(self.kept, "refits", self.matrices, plain, self.journal.losses)
        done = kept.go_on()
        for number, phase in enumerate(self._phases(), 1):
            if number > done:
                phase()
                kept.keep(number)

    def _phases(self) -> Iterator[Callable[[], None]]:
        options = self.options
        for group in range(1, options.groups + 1):
            yield partial(self._code, group)
            if group < options.groups and options.steps:
                yield partial(self._fit, group)

    def _code(self, group: int) -> None:
        share, desc = self.options.share(group), f"code {group}/{self.options.groups}"
        until = (m.columns if m.is_first else m.columns_at(share) for m in self.matrices)
        code_all(zip(self.matrices, until, strict=True), desc, self.progress)
        self.journal.report(f"coded {share:.0%}")
        if self.norms:
            self.norms.estimate_or_undo(self.journal)

    def _fit(self, group: int) -> None:
        """Fit the columns that are not coded, and vectors; what does not help on held-out rows is undone."""
        fit = self._fit_with(self.rate, group)
        fit.run(self._numbers(group), self.kept, steps_of(group), self.progress)
        what = f"refitted after {self.options.share(group):.0%} at a rate of {fit.rate:.2g}"
        self.journal.report_or_undo(what, fit.undo)

    def _fit_with(self, rate: float, group: int) -> Fit:
        free = [m for m in self.matrices if m.n_coded < m.columns]
        grown = min(rate / (1 - self.options.share(group)), _MOST_RATE)
        return Fit(free, self.vectors, grown, rate, partial(self.teacher.divergence, self.journal.model))

    def _numbers(self, group: int) -> list[int]:
        return order(len(self.teacher), self.options.steps, self.seed, group)

    @cached_property
    def rate(self) -> float:
        """That gains most after the first group, in half of the steps."""
        rates = self.options.rates
        if len(rates) == 1:
            return rates[0]
        if (found := self.kept.load("rate")) is not None:
            return found.facts["rate"]
        at_start = self.journal.losses[-1][1]
        chosen = rates[first_peak(at_start - self._tried(rate) for rate in rates)]
        self.kept.save("rate", rate=chosen)
        return chosen

    def _tried(self, rate: float) -> float:
        """The divergence after some steps, which are undone."""
        fit = self._fit_with(rate, 1)
        fit.run(self._numbers(0)[: -(-self.options.steps // 2)], Kept(), "", self.progress)
        found = self.journal.held_out.mean_divergence(self.journal.model)
        fit.undo()
        return found
