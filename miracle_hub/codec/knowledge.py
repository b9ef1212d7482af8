"""What somebody knows of a model beside its weights: what errors cost, and what tuning made of the file."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import median
from typing import Protocol

from torch import Tensor

from miracle_hub.codec.curvature import Curvature
from miracle_hub.codec.jobs import Job
from miracle_hub.codec.ladder import SIZE_EXPONENT
from miracle_hub.codec.plan import Plan
from miracle_hub.codec.rates import LEFT_OUT, Curve
from miracle_hub.codec.row_ranges import row_ranges
from miracle_hub.codec.source import SourceTensor
from miracle_hub.coding.backend import Backend


class Knowledge(Protocol):
    """What a compression asks of whoever knows the model."""

    def curvature(self, source: SourceTensor) -> Curvature | None:
        """What errors of a tensor cost; None if that is not known."""
        ...

    def without(self, name: str, base: Tensor) -> float | None:
        """How far answers are, in nats, where a tensor is its base's; None if that is not known."""
        ...

    def is_estimated(self, name: str) -> bool:
        """Whether a tensor is a statistic of the model's inputs, which may change with what is coded."""
        ...

    def is_tuned(self, name: str) -> bool:
        """Whether a tensor may change with what is coded if it is plain."""
        ...

    def encode(self, plans: Mapping[str, Plan], jobs: Sequence[Job], backend: Backend) -> Mapping[str, bytes]:
        """Payloads of some of the jobs, each as long as its job's own, by name of the tensor."""
        ...

    def plain(self, source: SourceTensor) -> Tensor | None:
        """What a plain tensor became, in its dtype and shape; None if it is as it was."""
        ...


# How far measured costs are trusted, beside the rule that needs no data: a power. At low rates errors are
# beyond what squares can tell. Chosen on MiniLM at 1 bit (divergence 5.18, and 5.50 with 1.0); stories260K at
# 2 bits, after refits, had 0.68, and 0.62 with 0.75 and with 1.0; no other model was tried side by side.
_TRUST = 0.5
# Below this many rows a range would have few.
_FEWEST_ROWS = 4096
# Ranges of rows that have rates of their own, as of words: the format has 64 segments, of which every range
# may need two. BERT's ids are nearly sorted by frequency, those of BPE by the order of merges. MiniLM's words
# at 0.6 bits, all else dense, give embeddings a distance of 0.130 flat and 0.097 in 16 equal ranges; with
# feedback 0.083 in equal ranges and 0.080 in these.
_RANGES = 16
# Rows of a range, of all: costs of fewer are not known that well.
_SHARE = 1 / 128
# Bits per weight that a cut must save: a choice.
_LEAST_SAVED = 0.001
# Rows that no input had cost this share of the mean: rare words keep a floor. As above it is 0.080, 0.073,
# 0.072 and 0.081 with shares of 0.1, 0.3, 0.6 and 1.
_FLOOR = 0.3


def weighed(
    curves: Sequence[Curve],
    costs: Mapping[str, Tensor],
    sizes: Mapping[str, int],
    worth: Mapping[str, float] | None = None,
) -> list[Curve]:
    """Curves with errors of a model that somebody ran, instead of the rule of `ladder` and `worth`; several
    curves for a tensor of whose rows ranges differ.

    What no answer depends on, as a layer that no input reached, is worth the median of all others.

    Args:
        costs: in nats per token, of a relative squared error of 1, float32 `[rows]`, of the tensors that are
            known.
        sizes: weights of all tensors.
        worth: by which the curves' errors are multiplied already, beside the sizes.
    """
    ruled = {name: sizes[name] ** SIZE_EXPONENT * (worth or {}).get(name, 1.0) for name in costs}
    trusted = {name: (float(cost.sum()) / ruled[name]) ** _TRUST for name, cost in costs.items()}
    known = [factor for factor in trusted.values() if factor > 0]
    if not known:
        return list(curves)
    usual, found = median(known), list[Curve]()
    for curve in curves:
        if factor := trusted.get(curve.name, 0.0):
            found += _in_ranges(curve, costs[curve.name], factor)
        else:
            found.append(_scaled(curve, curve.rows, 1.0, usual))
    return found


def _in_ranges(curve: Curve, cost: Tensor, trusted: float) -> list[Curve]:
    is_difference = any(option.codec == LEFT_OUT for option in curve.options)
    if is_difference or not len(cost) == curve.rows >= _FEWEST_ROWS:
        return [_scaled(curve, curve.rows, 1.0, trusted)]
    smooth = (cost + _FLOOR * cost.mean()) / (1 + _FLOOR)
    rows = row_ranges(smooth, _RANGES, round(_SHARE * len(cost)), _LEAST_SAVED)
    shares = [float(part.sum() / smooth.sum()) for part in smooth.split(rows)]
    return [_scaled(curve, n, share, trusted) for n, share in zip(rows, shares, strict=True)]


def _scaled(curve: Curve, rows: int, share_of_cost: float, factor: float) -> Curve:
    """Some rows of a curve."""
    factor, share = factor * share_of_cost, rows / curve.rows
    options = [
        replace(o, error=o.error * factor, n_bytes=max(1, round(o.n_bytes * share))) for o in curve.options
    ]
    return replace(curve, rows=rows, options=tuple(options))


def curvatures(
    knowledge: Knowledge, plans: Mapping[str, Plan], curves: Sequence[Curve]
) -> dict[str, Curvature]:
    """What errors of tensors cost, of those where that is known."""
    found = {curve.name: knowledge.curvature(plans[curve.name].source) for curve in curves}
    return {name: curvature for name, curvature in found.items() if curvature is not None}
