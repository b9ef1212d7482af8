"""What calibration knows of a model, as a compression asks for it."""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from miracle_hub.calibrate.inputs import Inputs
from miracle_hub.calibrate.matrix import MatrixInMaking
from miracle_hub.calibrate.refits import RefitOptions, Refits
from miracle_hub.calibrate.sensitivity import Sensitivity
from miracle_hub.calibrate.teacher import Teacher
from miracle_hub.calibrate.trials import kind_of, with_damping
from miracle_hub.codec.curvature import Curvature
from miracle_hub.codec.jobs import Job
from miracle_hub.codec.plan import Plain, Plan
from miracle_hub.codec.source import SourceTensor
from miracle_hub.coding.backend import Backend


class Known:
    """See `codec.knowledge.Knowledge`."""

    def __init__(
        self,
        sensitivity: Sensitivity,
        model: nn.Module,
        inputs: Inputs,
        options: RefitOptions,
        *,
        seed: int = 0,
        progress: bool = False,
    ) -> None:
        self.sensitivity, self.model, self.inputs, self.options = sensitivity, model, inputs, options
        self.seed, self.progress = seed, progress
        self.tuned: dict[str, Tensor] = {}
        self.losses: list[tuple[str, float]] = []

    def curvature(self, source: SourceTensor) -> Curvature | None:
        return self.sensitivity.curvature(source.name, source.shape)

    def encode(self, plans: Mapping[str, Plan], jobs: Sequence[Job], backend: Backend) -> Mapping[str, bytes]:
        if not self.options.all_steps and not getattr(self, "force", False):
            return {}
        self.model.requires_grad_(False)
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        teacher, held_out = (
            Teacher(self.model, self.inputs.batches),
            Teacher(self.model, self.inputs.held_out),
        )
        known = [job for job in jobs if job.source.name in parameters]
        known = with_damping(known, self.model, parameters, held_out, backend, self.progress)
        self.dampings = {
            kind_of(j.source.name): j.curvature and j.curvature.columns is not None and j.curvature.damping
            for j in known
        }
        matrices = [MatrixInMaking(job, parameters[job.source.name], backend) for job in known]
        vectors = {
            name: parameters[name]
            for name, plan in plans.items()
            if isinstance(plan, Plain) and name in parameters and parameters[name].is_floating_point()
        }
        tuned = list(vectors.values())
        refits = Refits(
            self.model, teacher, held_out, matrices, tuned, self.options, self.progress, self.seed
        )
        refits.run()
        payloads = {m.job.source.name: m.payload() for m in matrices}
        refits._report("as written")
        self.losses = refits.losses
        for name, parameter in vectors.items():
            plan = plans[name]
            self.tuned[name] = parameter.detach().to(plan.source.load().dtype)
        return payloads

    def plain(self, source: SourceTensor) -> Tensor | None:
        return self.tuned.get(source.name)
