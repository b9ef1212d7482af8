"""What somebody knows of a model beside its weights: what errors cost, and what tuning made of the file."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Protocol

from torch import Tensor

from miracle_hub.codec.curvature import Curvature
from miracle_hub.codec.jobs import Job
from miracle_hub.codec.ladder import SIZE_EXPONENT
from miracle_hub.codec.plan import Plan
from miracle_hub.codec.rates import Curve
from miracle_hub.codec.source import SourceTensor
from miracle_hub.coding.backend import Backend


class Knowledge(Protocol):
    """What a compression asks of whoever knows the model."""

    def curvature(self, source: SourceTensor) -> Curvature | None:
        """What errors of a tensor cost; None if that is not known."""
        ...

    def encode(self, plans: Mapping[str, Plan], jobs: Sequence[Job], backend: Backend) -> Mapping[str, bytes]:
        """Payloads of some of the jobs, each as long as its job's own, by name of the tensor."""
        ...

    def plain(self, source: SourceTensor) -> Tensor | None:
        """What a plain tensor became, in its dtype and shape; None if it is as it was."""
        ...


# How far measured costs are trusted, beside the rule that needs no data: a power. At low rates errors are
# beyond what squares can tell.
_TRUST = 0.5
# Below this many rows a range would have few.
_FEWEST_ROWS = 4096
# Ranges of rows that have rates of their own, as of words: the format has 64 segments, of which every range
# may need two. BERT's ids are nearly sorted by frequency, those of BPE by the order of merges.
_RANGES = 16
# Rows that no input had cost this share of the mean: rare words keep a floor.
_FLOOR = 0.1
# Ranges are worth their scales and segments where they differ by this factor: a choice.
_SPREAD = 2.0


def weighed(curve: Curve, cost: Tensor, n_weights: int) -> list[Curve]:
    """A curve with errors of a model that somebody ran, instead of the rule of `ladder`; several curves, of
    ranges of its rows, where these differ.

    Args:
        cost: in nats per token, of a relative squared error of 1, float32 `[rows]` or `[1]`.
    """
    smooth = (cost + _FLOOR * cost.mean()) / (1 + _FLOOR)
    parts = [part.sum() for part in smooth.chunk(_RANGES)]
    trusted = (float(cost.sum()) / n_weights**SIZE_EXPONENT) ** _TRUST
    if len(parts) < _RANGES or max(parts) < _SPREAD * min(parts) or len(cost) < _FEWEST_ROWS:
        return [_scaled(curve, curve.rows, 1.0, trusted)]
    shares = [float(part / smooth.sum()) for part in parts]
    rows = [len(part) for part in smooth.chunk(_RANGES)]
    return [_scaled(curve, n, share, trusted) for n, share in zip(rows, shares, strict=True)]


def _scaled(curve: Curve, rows: int, share_of_cost: float, factor: float) -> Curve:
    """Some rows of a curve."""
    factor, share = factor * share_of_cost, rows / curve.rows
    options = [
        replace(o, error=o.error * factor, n_bytes=max(1, round(o.n_bytes * share))) for o in curve.options
    ]
    return replace(curve, rows=rows, options=tuple(options))
