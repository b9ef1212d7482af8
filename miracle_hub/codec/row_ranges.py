"""Where a tensor of many rows is cut, so that rows of different costs have rates of their own."""

from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor


def row_ranges(cost: Float[Tensor, " rows"], most: int, fewest: int, least: float) -> list[int]:
    """Rows of every range, from the top; their sum is all rows.

    At one slope of error by bytes n rows of mean cost c take ½ n log₂ c bits per column, and a constant, so
    that a cut saves ½ (n log₂ c - n₁ log₂ c₁ - n₂ log₂ c₂). The best cut is taken, again and again.

    Args:
        cost: of rows, above zero.
        most: ranges.
        fewest: rows of a range.
        least: that the next cut must save, in bits per column and row of the tensor.
    """
    sums = torch.cat((torch.zeros(1, dtype=torch.float64), cost.double().cumsum(0)))
    ends, best = [0, len(cost)], {(0, len(cost)): _best_cut(sums, 0, len(cost), fewest)}
    while len(ends) <= most:
        saved, at = max(best[part] for part in pairwise(ends))
        if saved <= least * len(cost):
            break
        ends = sorted([*ends, at])
        best |= {part: _best_cut(sums, *part, fewest) for part in pairwise(ends) if part not in best}
    return [stop - start for start, stop in pairwise(ends)]


def _best_cut(sums: Tensor, start: int, stop: int, fewest: int) -> tuple[float, int]:
    """What it saves, and the row before which it is."""
    if stop - start < 2 * fewest:
        return 0.0, start
    cuts = torch.arange(start + fewest, stop - fewest + 1)
    above, below = cuts - start, stop - cuts
    parts = _log(sums[cuts] - sums[start], above) + _log(sums[stop] - sums[cuts], below)
    whole = _log(sums[stop] - sums[start], torch.tensor(stop - start))
    saved, at = (0.5 * (whole - parts)).max(0)
    return float(saved), int(cuts[at])


def _log(total: Tensor, rows: Tensor) -> Tensor:
    """Rows times the logarithm of their mean cost."""
    return rows * (total / rows).clamp(min=torch.finfo(torch.float64).tiny).log2()
