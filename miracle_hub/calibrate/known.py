"""What calibration knows of a model, as a compression asks for it."""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from miracle_hub.calibrate.inputs import Inputs
from miracle_hub.calibrate.kept_knowledge import kept_of_jobs
from miracle_hub.calibrate.matrix import MatrixInMaking
from miracle_hub.calibrate.refits import RefitOptions, Refits
from miracle_hub.calibrate.sensitivity import Sensitivity
from miracle_hub.calibrate.teacher import Teacher, spread
from miracle_hub.calibrate.trials import with_damping
from miracle_hub.codec.curvature import Curvature
from miracle_hub.codec.dtypes import TORCH_DTYPES
from miracle_hub.codec.jobs import Job
from miracle_hub.codec.kept import Kept
from miracle_hub.codec.plan import Plain, Plan, Why
from miracle_hub.codec.source import SourceTensor
from miracle_hub.coding.backend import Backend

# Held-out tokens by which files and refits are judged, and those by which trials are; every judgment is
# beside another on the same tokens.
_JUDGED_TOKENS, _TRIED_TOKENS = 8192, 2048
# Large or excluded tensors that stay plain are as they were.
_TUNED = (Why.SHORT_VECTOR, Why.SMALL)


class Known:
    """See `codec.knowledge.Knowledge`.

    Attributes:
        states_tuned: whether readers can be told which plain tensors were tuned; else none is.
        held_out: the dense model's answers to rows that nothing is fitted to.
        losses: what was done, and the divergence on these rows after it.
    """

    def __init__(
        self,
        sensitivity: Sensitivity,
        model: nn.Module,
        inputs: Inputs,
        options: RefitOptions,
        *,
        states_tuned: bool = True,
        seed: int = 0,
        progress: bool = False,
        kept: Kept | None = None,
    ) -> None:
        self.sensitivity, self.model, self.inputs, self.options = sensitivity, model, inputs, options
        self.states_tuned, self.seed, self.progress = states_tuned, seed, progress
        self.kept = kept or Kept()
        self.held_out = Teacher(model, inputs.held_out[spread(inputs.held_out, _JUDGED_TOKENS)])
        self.tuned: dict[str, Tensor] = {}
        self.losses: list[tuple[str, float]] = []

    def curvature(self, source: SourceTensor) -> Curvature | None:
        """As the sensitivity of the model's answers has it."""
        return self.sensitivity.curvature(source.name, source.shape)

    def encode(self, plans: Mapping[str, Plan], jobs: Sequence[Job], backend: Backend) -> Mapping[str, bytes]:
        """Payloads of the model's matrices, refitted; none at an effort without refits."""
        if not self.options.all_steps:
            return {}
        self.model.requires_grad_(False)
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        teacher = Teacher(self.model, self.inputs.batches[: self.options.all_steps], self.progress)
        tried = self.held_out.some(_TRIED_TOKENS)
        known = [job for job in jobs if job.source.name in parameters]
        kept = kept_of_jobs(self.kept, known, backend)
        known = with_damping(known, self.model, parameters, tried, backend, self.progress, kept)
        matrices = [MatrixInMaking(job, parameters[job.source.name], backend) for job in known]
        vectors = _vectors(plans, parameters) if self.states_tuned else {}
        kept = kept.given(repr(self.options), *vectors)
        given = (self.options, self.progress, self.seed, kept)
        refits = Refits(self.model, teacher, self.held_out, matrices, list(vectors.values()), *given)
        refits.run()
        payloads = {matrix.job.source.name: matrix.payload() for matrix in matrices}
        for name, vector in vectors.items():
            self.tuned[name] = vector.detach().to(TORCH_DTYPES[plans[name].source.dtype], copy=True)
        self.losses = refits.losses
        return payloads

    def plain(self, source: SourceTensor) -> Tensor | None:
        """What refits made of it, if it is one of the model's vectors."""
        return self.tuned.get(source.name)


def _vectors(plans: Mapping[str, Plan], parameters: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """What stays plain and can be tuned: norms, biases and small matrices, unless the user excludes them."""
    plain = [name for name, plan in plans.items() if isinstance(plan, Plain) and plan.why in _TUNED]
    return {name: parameters[name] for name in plain if name in parameters}
