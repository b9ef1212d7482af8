"""What calibration knows of a model, as a compression asks for it."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from miracle_hub.calibrate.inputs import Inputs
from miracle_hub.calibrate.matrix import MatrixInMaking
from miracle_hub.calibrate.norms import Norms
from miracle_hub.calibrate.refits import RefitOptions, Refits
from miracle_hub.calibrate.sensitivity import Sensitivity
from miracle_hub.calibrate.teacher import Teacher, spread
from miracle_hub.calibrate.trials import with_damping
from miracle_hub.codec.curvature import Curvature
from miracle_hub.codec.dtypes import TORCH_DTYPES
from miracle_hub.codec.jobs import Job
from miracle_hub.codec.plan import Plain, Plan, Why
from miracle_hub.codec.source import SourceTensor
from miracle_hub.coding.backend import Backend

# Held-out tokens by which files and refits are judged, and those by which trials are; every judgment is
# beside another on the same tokens.
_JUDGED_TOKENS, _TRIED_TOKENS = 8192, 2048
# A picture has one answer, and tokens by its size: of a CIFAR image 64. So there are more of these.
_OF_PICTURES = 4
# Large or excluded tensors that stay plain are as they were.
_TUNED = (Why.SHORT_VECTOR, Why.SMALL)


class Known:
    """See `codec.knowledge.Knowledge`.

    Attributes:
        states_tuned: whether readers can be told which plain tensors were tuned; else none is.
        norms: whose statistics are estimated anew; None if that is not to be.
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
    ) -> None:
        self.sensitivity, self.model, self.inputs, self.options = sensitivity, model, inputs, options
        self.states_tuned, self.seed, self.progress = states_tuned, seed, progress
        self.share = _OF_PICTURES if _are_pictures(inputs.held_out[0]) else 1
        self.held_out = Teacher(model, inputs.held_out[spread(inputs.held_out, self.share * _JUDGED_TOKENS)])
        self.parameters = dict(model.named_parameters(remove_duplicate=False))
        self.norms = Norms(model, inputs.batches) if states_tuned else None
        self.tuned: dict[str, Tensor] = {}
        self.losses: list[tuple[str, float]] = []

    def curvature(self, source: SourceTensor) -> Curvature | None:
        """As the sensitivity of the model's answers has it."""
        return self.sensitivity.curvature(source.name, source.shape)

    def is_estimated(self, name: str) -> bool:
        """Whether it is a statistic of a batch norm."""
        return self.norms is not None and name in self.norms.buffers

    def is_tuned(self, name: str) -> bool:
        """Whether it is a parameter that may be tuned."""
        return self.states_tuned and self.options.all_steps > 0 and name in self.parameters

    def encode(self, plans: Mapping[str, Plan], jobs: Sequence[Job], backend: Backend) -> Mapping[str, bytes]:
        """Payloads of the model's matrices, refitted; none where there is nothing to be done after coding."""
        norms = None if self.norms is None else self.norms.among(_statistics(plans))
        if not self.options.all_steps and not norms:
            return {}
        self.model.requires_grad_(False)
        parameters = self.parameters
        teacher = Teacher(self.model, self.inputs.batches[: self.options.all_steps], self.progress)
        known = [job for job in jobs if job.source.name in parameters]
        if self.options.all_steps:
            tried = self.held_out.some(self.share * _TRIED_TOKENS)
            known = with_damping(known, self.model, parameters, tried, backend, self.progress, norms)
        matrices = [MatrixInMaking(job, parameters[job.source.name], backend) for job in known]
        vectors = _vectors(plans, parameters) if self.states_tuned and self.options.all_steps else {}
        given = (self.options, norms, self.progress, self.seed)
        refits = Refits(self.model, teacher, self.held_out, matrices, list(vectors.values()), *given)
        refits.run()
        payloads = {matrix.job.source.name: matrix.payload() for matrix in matrices}
        self._keep(plans, {**vectors, **(norms.buffers if norms else {})})
        self.losses = refits.losses
        return payloads

    def _keep(self, plans: Mapping[str, Plan], found: Mapping[str, Tensor]) -> None:
        """What plain tensors became, as far as that is not what they were."""
        for name, values in found.items():
            plan = plans[name]
            own = values.detach().to(TORCH_DTYPES[plan.source.dtype], copy=True)
            if not torch.equal(own, plan.source.load()):
                self.tuned[name] = own

    def plain(self, source: SourceTensor) -> Tensor | None:
        """What refits made of it, if it is one of the model's vectors or statistics."""
        return self.tuned.get(source.name)


def _vectors(plans: Mapping[str, Plan], parameters: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """What stays plain and can be tuned: norms, biases and small matrices, unless the user excludes them."""
    plain = [name for name, plan in plans.items() if isinstance(plan, Plain) and plan.why in _TUNED]
    return {name: parameters[name] for name in plain if name in parameters}


def _statistics(plans: Mapping[str, Plan]) -> set[str]:
    return {name for name, plan in plans.items() if isinstance(plan, Plain) and plan.why is Why.STATISTICS}


def _are_pictures(batch: Mapping[str, Tensor]) -> bool:
    return next(iter(batch.values())).ndim == 4
