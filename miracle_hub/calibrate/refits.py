"""Refits of a whole model: what is not coded yet is fitted to the dense model's answers."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial

from torch import nn
from tqdm import tqdm

from miracle_hub.calibrate.block_refits import BlockOptions
from miracle_hub.calibrate.fitting import Fit, coded_share, order
from miracle_hub.calibrate.journal import Journal
from miracle_hub.calibrate.kept_refits import KeptMaking, steps_of
from miracle_hub.calibrate.matrix import MatrixInMaking
from miracle_hub.calibrate.norms import Norms
from miracle_hub.calibrate.teacher import Teacher
from miracle_hub.codec.kept import Kept

# Of the best gain of a rate: larger ones with such a part of it are better when more is coded. stories260K at
# 2 bits gains 0.170, 0.167 and 0.084 nats after one of 8 groups with 0.005, 0.01 and 0.025, and is 0.98 and
# 0.69 away at the end with the first and the last. MiniLM at 1 bit gains 0.39, 0.28 and 0.05 with 0.001,
# 0.002 and 0.005, ResNet-20 at 2 bits 0.049, 0.076 and less than nothing with 0.001, 0.005 and 0.025: of
# these two only the trial was run, so that the part was chosen on stories260K alone.
_PART = 0.4


@dataclass(frozen=True)
class RefitOptions:
    """How long and how fast.

    Attributes:
        groups: parts in which every matrix is coded.
        steps: of refits between two groups.
        end_steps: of tuning when everything is coded.
        rates: of weights, over their root mean square, from small to large, of which the first refit tries
            some: as long as they gain a good part of what the best does.
        end_rate: of scales, relative; of vectors half of it, over their root mean square.
        blocks: refits block by block instead, where the model has blocks.
    """

    groups: int = 1
    steps: int = 0
    end_steps: int = 0
    # Where models differ by a factor of 25: see above.
    rates: tuple[float, ...] = (0.001, 0.005, 0.025)
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


def last_gaining(gains: Iterable[float]) -> int:
    """The place of the last gain that is a good part of the best so far; none is asked for after one that is
    not. The first, if none is a gain.
    """
    best, place = 0.0, 0
    for i, gain in enumerate(gains):
        if gain < _PART * best or gain <= 0:
            break
        best, place = max(best, gain), i
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
        for matrix in tqdm(self.matrices, desc=desc, disable=not self.progress):
            matrix.code(matrix.columns if matrix.is_first else matrix.columns_at(share))
        self.journal.report(f"coded {share:.0%}")
        if self.norms:
            self.norms.estimate_or_undo(self.journal)

    def _fit(self, group: int) -> None:
        """Fit the columns that are not coded, and vectors; what does not help on held-out rows is undone."""
        fit = self._fit_with(self.rate)
        fit.run(self._numbers(group), self.kept, steps_of(group), self.progress)
        what = f"refitted after {self.options.share(group):.0%} at a rate of {self.rate:g}"
        self.journal.report_or_undo(what, fit.undo)

    def _fit_with(self, rate: float) -> Fit:
        free = [m for m in self.matrices if m.n_coded < m.columns]
        return Fit(free, self.vectors, rate, rate, partial(self.teacher.divergence, self.journal.model))

    def _numbers(self, group: int) -> list[int]:
        return order(len(self.teacher), self.options.steps, self.seed, group)

    @cached_property
    def rate(self) -> float:
        """The largest that suits what is there first, in half of the steps."""
        rates = self.options.rates
        if len(rates) == 1:
            return rates[0]
        if (found := self.kept.load("rate")) is not None:
            return found.facts["rate"]
        at_start = self.journal.losses[-1][1]
        chosen = rates[last_gaining(at_start - self._tried(rate) for rate in rates)]
        self.kept.save("rate", rate=chosen)
        return chosen

    def _tried(self, rate: float) -> float:
        """The divergence after some steps, which are undone."""
        fit = self._fit_with(rate)
        fit.run(self._numbers(0)[: -(-self.options.steps // 2)], Kept(), "", self.progress)
        found = self.journal.held_out.mean_divergence(self.journal.model)
        fit.undo()
        return found
