"""What calibration knows of a model, as a compression asks for it."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from miracle_hub.calibrate.sensitivity import Sensitivity
from miracle_hub.codec.curvature import Curvature
from miracle_hub.codec.jobs import Job
from miracle_hub.codec.plan import Plan
from miracle_hub.codec.source import SourceTensor
from miracle_hub.coding.backend import Backend


class Known:
    """See `codec.knowledge.Knowledge`."""

    def __init__(self, sensitivity: Sensitivity) -> None:
        self.sensitivity = sensitivity

    def curvature(self, source: SourceTensor) -> Curvature | None:
        return self.sensitivity.curvature(source.name, source.shape)

    def encode(self, plans: Mapping[str, Plan], jobs: Sequence[Job], backend: Backend) -> Mapping[str, bytes]:
        return {}

    def plain(self, source: SourceTensor) -> Tensor | None:
        return None
