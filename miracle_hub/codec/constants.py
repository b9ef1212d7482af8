"""What is no weight, by its values alone: masks, index tables, position tables, windows, filter banks.

Each rule is one that a fitted tensor cannot obey by accident; how unlikely that is decides the limits. Where
a model's class is known it says which tensors are buffers, and these rules are for the rest.
"""

import math
from collections.abc import Callable, Iterator
from enum import Enum

import torch
from torch import Tensor

# Two values are a mask; weights quantized to so few levels for a whole tensor are rare, and short when exact.
_FEW_VALUES, _WEIGHTS_PER_VALUE = 16, 64
_SMALLEST_MASK = 16
# How unlikely a rule must be for values in random order, in bits.
_EVIDENCE_BITS = 64
_FEWEST_OF_A_LINE = 5
# A rule leaves less of a table in bfloat16 (2^-9 of relative error), and of weights a hundred times as much:
# a recurrence leaves 1.41 of the deviation of random numbers.
_TOLERANCE = 2.0**-6
_SHORTEST_RECURRENCE = 16
_TINY = torch.finfo(torch.float64).tiny
_FIRST_LINES = 32  # a tensor of weights is known as such by these


class Kind(Enum):
    """Of constants; `plan.Why` has the same names, with texts for people."""

    WHOLE, FEW, TABLE = range(3)


def constant_kind(values: Tensor, *, may_be_fitted: bool = False) -> Kind | None:
    """What kind of constant a floating tensor is; None if it may be weights, or has a NaN.

    Args:
        may_be_fitted: it is known for a parameter, for which only a table of sines is no accident.
    """
    values = values.detach()
    if values.numel() == 0 or bool(torch.isnan(values.float()).any()):
        return None
    if may_be_fitted:
        return Kind.TABLE if is_table_of_sines(values) else None
    few = _spread(values.flatten(), 4096)
    if _are_few(few.double(), values) and _are_few(values.double().flatten(), values):
        return Kind.WHOLE if _are_whole(values) else Kind.FEW
    if _are_whole(few) and _are_whole(values):
        return Kind.WHOLE
    return Kind.TABLE if is_table(values) else None


def _are_few(values: Tensor, whole: Tensor) -> bool:
    """Whether values are so few for the tensor that they cannot be all fitted; a mask may have two of any
    size.
    """
    n_values = len(torch.unique(values))
    if whole.numel() < _SMALLEST_MASK:
        return False
    return n_values <= max(2, min(_FEW_VALUES, whole.numel() // _WEIGHTS_PER_VALUE))


def _are_whole(values: Tensor) -> bool:
    """Whether all are whole, and enough of them are so small that their dtype has fractions there."""
    size = values.double().abs()
    if not bool((torch.isfinite(size) & (size == size.round())).all()):
        return False
    return int(((size > 0) & (size < 1 / torch.finfo(values.dtype).eps)).sum()) >= _EVIDENCE_BITS


def is_table(values: Tensor) -> bool:
    """Whether every line of a tensor along one of its dimensions rises and falls once at most, is symmetric,
    or obeys a recurrence; or pairs of its numbers are sines and cosines.
    """
    for lines in _lines(values):
        for rule in (_rise_and_fall, _are_symmetric, _recur):
            if _obeys(rule, lines):
                return True
    return is_table_of_sines(values)


def is_table_of_sines(values: Tensor) -> bool:
    """Whether every line along one dimension obeys x[t+1] + x[t-1] = c·x[t], and some with such a c that they
    swing, as fitted lines that are only smooth or straight do not; or all numbers come in pairs whose squares
    add up to 1.
    """
    return any(_obeys(_recur, lines) and _swing(lines) for lines in _lines(values)) or _are_paired(values)


def _lines(values: Tensor) -> Iterator[Tensor]:
    """The tensor as `[…, length]`, for each of its dimensions that is long enough."""
    for dimension in reversed(range(values.ndim)):
        if values.shape[dimension] >= _FEWEST_OF_A_LINE:
            yield values.movedim(dimension, -1)


def _obeys(rule: Callable[[Tensor], bool], lines: Tensor) -> bool:
    """Whether all lines do, `[…, length]`; where the first ones do not the others are not looked at."""
    n_lines = math.prod(lines.shape[:-1])
    some = torch.arange(min(n_lines, _FIRST_LINES)) * n_lines // min(n_lines, _FIRST_LINES)
    first = lines[torch.unravel_index(some, lines.shape[:-1])] if lines.ndim > 1 else lines.view(1, -1)
    return rule(first) and (len(first) == n_lines or rule(lines.reshape(n_lines, -1)))


def _spread(items: Tensor, n: int) -> Tensor:
    """At most so many items, evenly spaced."""
    if len(items) <= n:
        return items
    return items[torch.arange(n, device=items.device) * len(items) // n]


def _rise_and_fall(lines: Tensor) -> bool:
    rises, falls = lines[:, 1:] > lines[:, :-1], lines[:, 1:] < lines[:, :-1]
    peaks = ~(rises & (falls.cumsum(1) > 0)).any(1)
    valleys = ~(falls & (rises.cumsum(1) > 0)).any(1)
    if not bool((peaks | valleys).all()):
        return False
    n_changes = (rises | falls).sum(1)
    # Of (n + 1)! orders of n + 1 different numbers, 2^(n+1) - 2 rise and fall once at most.
    n_orders = torch.lgamma(n_changes + 2.0) / math.log(2)
    return float((n_orders - n_changes - 1).clamp(min=0).sum()) >= _EVIDENCE_BITS


def _are_symmetric(lines: Tensor) -> bool:
    """About the middle, or, as a window of one period, about half of its length; mirrored signs count."""
    lines = lines.double()
    for whole in (lines, lines[:, 1:]):
        mirrored, spread = whole.flip(1), whole.std(1, keepdim=True)
        off = _TOLERANCE * (spread + _TOLERANCE * spread.max())
        even = ((whole - mirrored).abs() <= off).all(1)
        odd = ((whole + mirrored).abs() <= off).all(1)
        half = whole[:, : whole.shape[1] // 2]
        n_pairs = int(((half - whole.mean(1, keepdim=True)).abs() > 8 * off).sum())
        if bool(torch.isfinite(lines).all() & (even | odd).all()) and n_pairs >= _EVIDENCE_BITS:
            return True
    return False


def _recur(lines: Tensor) -> bool:
    if lines.shape[1] < _SHORTEST_RECURRENCE or not bool(torch.isfinite(lines).all()):
        return False
    own_steps = 2 * torch.finfo(lines.dtype).eps
    lines = lines.double()
    middle, sides, factor = _recurrence(lines)
    left = (sides - factor * middle).square().mean(1).sqrt()
    # Against what varies: weights near 1 would obey as nearly as they are equal.
    spread, size = lines.std(1), lines.square().mean(1).sqrt()
    n_varying = int((spread > 8 * own_steps * size).sum())
    return bool((left <= _TOLERANCE * spread + own_steps * size).all()) and 4 * n_varying >= len(lines)


def _recurrence(lines: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x[t], x[t+1] + x[t-1] and the c of every line that fits them best."""
    middle, sides = lines[:, 1:-1], lines[:, 2:] + lines[:, :-2]
    power = middle.square().sum(1, keepdim=True)
    return middle, sides, (middle * sides).sum(1, keepdim=True) / power.clamp(min=_TINY)


def _swing(lines: Tensor) -> bool:
    """Whether some line is a sine of fewer than 20 places: tables of sines begin with one of about 6."""
    lines = lines.reshape(-1, lines.shape[-1]).double()
    swings = _recurrence(lines)[2].abs() < 2 * math.cos(2 * math.pi / 20)
    return bool((swings & (lines != 0).any(1, keepdim=True)).any())


def _are_paired(values: Tensor) -> bool:
    """Sines beside their cosines: neighbors, halves of a line, or halves of its halves (two coordinates)."""
    width = values.shape[-1] if values.ndim else 0
    lines = values.reshape(-1, max(1, width))
    for n_parts in (1, 2):
        if width and width % (2 * n_parts) == 0 and _obeys(_halves_pair(n_parts), lines):
            return True
    return width > 1 and width % 2 == 0 and _obeys(_neighbors_pair, lines)


def _halves_pair(n_parts: int) -> Callable[[Tensor], bool]:
    def pair(lines: Tensor) -> bool:
        halves = lines.view(len(lines), n_parts, 2, -1)
        return _are_on_circle(halves[:, :, 0], halves[:, :, 1])

    return pair


def _neighbors_pair(lines: Tensor) -> bool:
    return _are_on_circle(lines[:, 0::2], lines[:, 1::2])


def _are_on_circle(a: Tensor, b: Tensor) -> bool:
    """Whether a² + b² is 1; lines of zeros, as for padding, do not count."""
    kept = (a != 0).flatten(1).any(1) | (b != 0).flatten(1).any(1)
    off = (a.double().square() + b.double().square() - 1).abs()[kept]
    return off.numel() >= _EVIDENCE_BITS and bool((off <= 2 * _TOLERANCE).all())
