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


def weighed(curve: Curve, cost: float, n_weights: int) -> Curve:
    """A curve whose errors are in nats per token instead of the unit of `ladder`.

    Args:
        cost: in nats per token, of a relative squared error of 1.
    """
    factor = cost / n_weights**SIZE_EXPONENT
    return replace(curve, options=tuple(replace(o, error=o.error * factor) for o in curve.options))
