"""Which code each stream gets, so that a budget is used up: two neighboring rates, by tensor and by row.

All streams get the highest rate that the budget pays for. What is left raises some of them to the next one:
whole streams, the smallest first, as a small layer's error matters nearly as much as a large one's
(codec/ladder.py), and then the first rows of one more. So no stream has less than it would have without.
Where this does not use up a budget, as of files so small that a second code's own bytes count, rates that are
nearly neighbors do.
"""

import logging
import math
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from miracle_hub.code import Code, SplitCode, StreamCode
from miracle_hub.training.config import VariationalConfig

_LOGGER = logging.getLogger("miracle_hub")
# A budget is used up if this share of it is; what is promised of whole files.
USED_UP = 0.99
# What is left of a budget that is not worth another segment: a choice.
_LEFT = 0.001
# Streams that rows of are raised after the one that whole streams end at: a choice; rows of most suffice.
_MOST_SPLIT = 4

Codes = Mapping[str, StreamCode]  # by the name of the stream
Cost = Callable[[Codes], float]


@dataclass(frozen=True)
class FilePlan:
    """What the file of a model will be, which is known before it is trained.

    Attributes:
        codes: of its streams.
        budget_bytes: that were asked for.
        n_bytes: that the file has.
        half: names of the vectors that it holds in 16 bits instead of 32, whatever training makes of them;
            None where their values decide.
        one_scale: names of tensors whose rows, few and long, share a scale, so that codes can share a row.
    """

    codes: Codes
    budget_bytes: int
    n_bytes: int
    half: frozenset[str] | None = None
    one_scale: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Unit:
    """What has a stream of its own.

    Attributes:
        name: of the tensor, or of all together.
        n_values: that are coded.
        row_values: of a row; two codes of a tensor share it between rows. 1 where values have no rows.
    """

    name: str
    n_values: int
    row_values: int = 1

    def fitted(self, code: Code) -> Code:
        """A code for this stream: blocks of the block code are as many, and of equal size."""
        return _fitted(code, self.n_values)

    def split(self, high: Code, low: Code, n_steps: int) -> StreamCode:
        """The higher code for so many rows, or steps, of the first values, the lower one for all others."""
        n_first = n_steps * math.lcm(self.row_values, 1 if self.row_values > 1 else high.step_weights)
        if n_first <= 0:
            return self.fitted(low)
        if n_first >= self.n_values:
            return self.fitted(high)
        return SplitCode(_fitted(high, n_first), n_first, _fitted(low, self.n_values - n_first))

    def most_steps(self, high: Code) -> int:
        """Of `split`, that leave something to the lower code."""
        width = self.row_values if self.row_values > 1 else high.step_weights
        return (self.n_values - 1) // width


def _fitted(code: Code, n_values: int) -> Code:
    if code.overlap_bits:
        return code
    return Code(code.window_bits, code.step_bits, -(-n_values // code.steps(n_values)), code.seed)


def codes_within(units: Sequence[Unit], codes: Sequence[Code], cost: Cost, budget: float) -> Codes | None:
    """Codes that use up a budget as nearly as steps and rows allow, and never exceed it.

    Args:
        codes: that may be used, from the highest rate on.
        cost: of all streams under some codes, in the budget's unit; a higher rate costs more.

    Returns:
        None if even the lowest rate exceeds it.
    """

    def uniform(number: int) -> Codes:
        return {unit.name: unit.fitted(codes[number]) for unit in units}

    first = bisect_left(range(len(codes)), True, key=lambda number: cost(uniform(number)) <= budget)
    if first == len(codes):
        return None
    best, bits = uniform(first), _long_bits(units)
    for low, high in _pairs(first):
        # Neighbors of the rate above have less than it for some streams, and files of them bytes more.
        is_enough = USED_UP if low > first or high < low - 1 else 1 - _LEFT
        if high < 0 or low >= len(codes) or (used := cost(best)) >= is_enough * budget:
            continue
        found = _raised(units, uniform(low), (codes[high], codes[low]), cost, budget)
        if cost(found) > used and (used < USED_UP * budget or bits(found) > bits(best)):
            best = found
    return best


def _pairs(first: int) -> list[tuple[int, int]]:
    """Rates to mix, the lower and the higher by their numbers: neighbors, or nearly, if those fail."""
    nearly = [(first + less, first + less - more) for less in range(4) for more in range(1, 4)]
    return sorted(nearly, key=lambda pair: pair[0] - pair[1])


def _raised(
    units: Sequence[Unit], start: Codes, pair: tuple[Code, Code], cost: Cost, budget: float
) -> dict[str, StreamCode]:
    """Streams raised to the higher of two codes while the budget lasts, the smallest first."""
    order, (high, _) = sorted(units, key=lambda unit: unit.n_values), pair

    def with_raised(number: int) -> dict[str, StreamCode]:
        return {**start, **{unit.name: unit.fitted(high) for unit in order[:number]}}

    most = bisect_left(range(1, len(order) + 1), True, key=lambda n: cost(with_raised(n)) > budget)
    found = with_raised(most)
    for unit in order[most : most + _MOST_SPLIT]:
        if budget - cost(found) <= _LEFT * budget:
            break
        found = _with_rows(found, unit, pair, cost, budget)
    return found


def _with_rows(
    codes: dict[str, StreamCode], unit: Unit, pair: tuple[Code, Code], cost: Cost, budget: float
) -> dict[str, StreamCode]:
    """The same with as many rows of one more stream raised as the budget pays for."""

    def with_steps(n: int) -> dict[str, StreamCode]:
        return {**codes, unit.name: unit.split(*pair, n)}

    steps = range(1, unit.most_steps(pair[0]) + 1)
    n_steps = bisect_left(steps, True, key=lambda n: cost(with_steps(n)) > budget)
    found = with_steps(n_steps)
    return found if n_steps and cost(found) > cost(codes) else codes


def codes_of(units: Sequence[Unit], config: VariationalConfig) -> Codes:
    """The codes for a rate, or for the bits of a message; what of it is not used is said.

    Raises:
        BudgetError: the budget is below what the code can use, or above it; or it is that of a whole file.
    """
    single = {unit.name: config.code_for(unit.n_values, unit.name) for unit in units}
    if config.message_bits is not None:
        what, budget, cost = "message_bits", config.message_bits, _message_bits(units)
    else:
        assert config.rate is not None
        what, budget, cost = "rate", config.rate * sum(u.n_values for u in units), _long_bits(units)
    if cost(single) >= USED_UP * budget:
        return single
    found = codes_within(units, list(config.codes()), cost, budget)
    best = single if found is None or cost(found) < cost(single) else found
    if cost(best) < USED_UP * budget:
        _LOGGER.warning(
            "%s: of %s bits for %s values %s are used: no two neighboring codes come nearer; other "
            "window_bits, or another budget, may be used up",
            what, f"{budget:,.0f}", f"{sum(u.n_values for u in units):,}", f"{cost(best):,.0f}",
        )  # fmt: skip
    return best


def _message_bits(units: Sequence[Unit]) -> Cost:
    return lambda codes: sum(codes[unit.name].message_bits(unit.n_values) for unit in units)


def _long_bits(units: Sequence[Unit]) -> Cost:
    """Bits of messages so long that the first window of a sliding code is of no account."""

    def bits(codes: Codes) -> float:
        parts = [part for unit in units for part in codes[unit.name].segments(unit.n_values)]
        return float(sum(_bits_of(code, n) for n, code in parts))

    return bits


def _bits_of(code: Code, n_values: int) -> Fraction:
    rate = Fraction(code.step_bits, code.step_weights)
    return rate * n_values if code.overlap_bits else Fraction(code.message_bits(n_values))
