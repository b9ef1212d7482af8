"""What calibration knows of a model, as a compression asks for it."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from miracle_hub.calibrate.blocks import chains_of
from miracle_hub.calibrate.by_blocks import ByBlocks
from miracle_hub.calibrate.factors import FactorFits, Factors
from miracle_hub.calibrate.fitting import order
from miracle_hub.calibrate.inputs import Inputs
from miracle_hub.calibrate.journal import Journal
from miracle_hub.calibrate.kept_knowledge import kept_of_jobs
from miracle_hub.calibrate.kept_refits import KeptMaking, steps_of
from miracle_hub.calibrate.matrix import MatrixInMaking
from miracle_hub.calibrate.norms import Norms
from miracle_hub.calibrate.refits import RefitOptions, Refits
from miracle_hub.calibrate.sensitivity import Sensitivity
from miracle_hub.calibrate.teacher import Teacher, spread
from miracle_hub.calibrate.trials import with_damping
from miracle_hub.calibrate.tuning import Tuning
from miracle_hub.codec.curvature import Curvature
from miracle_hub.codec.dtypes import TORCH_DTYPES, as_bytes
from miracle_hub.codec.jobs import Job
from miracle_hub.codec.kept import Kept
from miracle_hub.codec.plan import Plain, Plan, Same, Why
from miracle_hub.codec.source import SourceTensor
from miracle_hub.codec.stored import decode_sum
from miracle_hub.codec.thin import THIN
from miracle_hub.codec.trellis import TRELLIS
from miracle_hub.coding.backend import Backend

# Held-out tokens by which files and refits are judged, and those by which trials are; every judgment is
# beside another on the same tokens.
_JUDGED_TOKENS, _TRIED_TOKENS = 8192, 1024
# Refits make up for errors of layers and not for those of words, which later layers cannot tell apart when
# they are coded to the same: these cost so many times as much. With all else dense MiniLM's words at 0.6 and
# 0.8 bits cost a distance of 0.081 and 0.042; so many times have them 0.7 of 1.0 bit.
_TABLE_COST = 9.0
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
        tables: names of weights that are looked up and nothing else, coded before anything is refitted.
        lacks_blocks: there was time for refits of blocks alone, and the model has none.
        journal: what was done, and the divergence on these rows after it.
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
        self.parameters = dict(model.named_parameters(remove_duplicate=False))
        self.norms = Norms(model, inputs.batches) if states_tuned else None
        self.share = _OF_PICTURES if _are_pictures(inputs.held_out[0]) else 1
        self.held_out = Teacher(model, inputs.held_out[spread(inputs.held_out, self.share * _JUDGED_TOKENS)])
        self.tables, self.tuned = tables_of(model), dict[str, Tensor]()
        self.journal, self.lacks_blocks = Journal(model, self.held_out), False

    @property
    def losses(self) -> list[tuple[str, float]]:
        """What was done, and the divergence on held-out rows after it."""
        return self.journal.losses

    def curvature(self, source: SourceTensor) -> Curvature | None:
        """As the sensitivity of the model's answers has it; tables, beside refits, cost more."""
        found = self.sensitivity.curvature(source.name, source.shape)
        is_refitted = self.options.groups > 1 or self.options.blocks is not None
        if found is None or not is_refitted or source.name not in self.tables:
            return found
        return replace(found, rows=_TABLE_COST * found.rows)

    @torch.no_grad()
    def without(self, name: str, base: Tensor) -> float | None:
        """How far answers to some held-out rows are where a tensor is its base's."""
        if (parameter := self.parameters.get(name)) is None:
            return None
        own = parameter.detach().clone()
        parameter.copy_(base)
        found = self._tried().mean_divergence(self.model)
        parameter.copy_(own)
        return found

    def _tried(self) -> Teacher:
        """Answers to the held-out rows by which trials are judged."""
        return self.held_out.some(self.share * _TRIED_TOKENS)

    def call(self, names: Mapping[str, str]) -> None:
        """Know parameters by the names that files have for them too.

        Args:
            names: of the model, by those of files.
        """
        own = {theirs: name for theirs, name in names.items() if name in self.parameters}
        self.parameters |= {theirs: self.parameters[name] for theirs, name in own.items()}
        self.tables |= {theirs for theirs, name in own.items() if name in self.tables}
        aliases = self.sensitivity.aliases
        self.sensitivity.aliases = {**aliases, **{theirs: aliases.get(n, n) for theirs, n in own.items()}}

    def is_estimated(self, name: str) -> bool:
        """Whether it is a statistic of a batch norm."""
        return self.norms is not None and name in self.norms.buffers

    def is_tuned(self, name: str) -> bool:
        """Whether it is a parameter that may be tuned."""
        return self.states_tuned and self.options.is_any and name in self.parameters

    def encode(self, plans: Mapping[str, Plan], jobs: Sequence[Job], backend: Backend) -> Mapping[str, bytes]:
        """Payloads of the model's matrices, refitted; none where nothing is to be done after coding."""
        norms = None if self.norms is None else self.norms.among(_statistics(plans))
        if not self.options.is_any and not norms:
            return {}
        self.model.requires_grad_(False)
        parameters, statistics = self.parameters, norms.buffers if norms else {}
        vectors = _vectors(plans, parameters) if self.states_tuned and self.options.is_any else {}
        teacher = Teacher(
            self.model, self.inputs.batches[: self.options.all_steps], self.progress, judges=False
        )
        fixed = self._fixed(plans, jobs, backend)
        known = [job for job in jobs if job.source.name in parameters and job.source.name not in fixed]
        kept = kept_of_jobs(self.kept, known, backend).given(*statistics)
        thin = [job for job in known if _is_of_low_rank(job)] if self.options.is_any else []
        fixed |= self._fitted_factors(thin, teacher, vectors, backend, kept)
        known = [job for job in known if job.source.name not in fixed]
        if self.options.is_any and known:
            given = (parameters, self._tried(), backend, self.progress, kept, norms)
            known = with_damping(known, self.model, *given)
        kept = kept.given(repr(self.options), *vectors)
        made = self._made(known, teacher, vectors, backend, kept, norms) if known else []
        self._tune(teacher, made, list(vectors.values()), kept)
        self._keep(plans, {**vectors, **statistics})
        return {**fixed, **{matrix.job.source.name: matrix.payload() for matrix in made}}

    @torch.no_grad()
    def _fixed(self, plans: Mapping[str, Plan], jobs: Sequence[Job], backend: Backend) -> dict[str, bytes]:
        """Payloads of what refits leave as it is: differences to a base in some rows. The model has them, and
        the base's tensors where differences are left out, as its readers will.
        """
        for name, plan in plans.items():
            if isinstance(plan, Same) and plan.based is not None and name in self.parameters:
                self.parameters[name].copy_(plan.based.load())
        fixed = dict[str, bytes]()
        for job in jobs:
            is_left = job.choice.option.codec == TRELLIS.name or (
                self.options.is_any and _is_of_low_rank(job)
            )
            if not is_left and job.based and job.source.name in self.parameters:
                name, fixed[job.source.name] = job.source.name, (payload := job.run([], backend))
                entry = as_bytes(payload)
                base = job.based.load_base()
                self.parameters[name].copy_(decode_sum([entry], name, backend=backend, base=base))
        return fixed

    def _fitted_factors(
        self, jobs: Sequence[Job], teacher: Teacher, vectors: Mapping[str, nn.Parameter],
        backend: Backend, kept: Kept,
    ) -> dict[str, bytes]:  # fmt: skip
        """Payloads of differences of low rank, whose factors are fitted to the dense model's answers."""
        if not jobs:
            return {}
        factors = [Factors(job, self.parameters[job.source.name], backend) for job in jobs]
        steps = max(self.options.all_steps // 2, 1)
        given = (list(vectors.values()), steps, self.seed, kept, self.progress)
        FactorFits(teacher, self.journal, factors, *given).run()
        return {one.job.source.name: one.payload() for one in factors}

    def _made(
        self, jobs: Sequence[Job], teacher: Teacher, vectors: Mapping[str, nn.Parameter],
        backend: Backend, kept: Kept, norms: Norms | None,
    ) -> list[MatrixInMaking]:  # fmt: skip
        """Matrices, all coded: block by block, or all at once."""
        given, blocks, parameters = (self.progress, self.seed, kept), self.options.blocks, self.parameters
        if blocks and (chains := chains_of(self.model, self.inputs.batches[0])):
            batches = self.inputs.batches[: blocks.batches]
            making = ByBlocks(self.journal, chains, batches, parameters, vectors, blocks, backend, *given)
            made = making.run(jobs)
            if norms:
                norms.estimate_or_undo(self.journal)
            return made
        self.lacks_blocks = blocks is not None
        made = [
            MatrixInMaking(job, parameters[name], backend, is_first=name in self.tables)
            for job, name in ((job, job.source.name) for job in jobs)
        ]
        Refits(teacher, self.journal, made, list(vectors.values()), self.options, *given, norms).run()
        return made

    def _tune(
        self, teacher: Teacher, made: Sequence[MatrixInMaking], vectors: Sequence[nn.Parameter], kept: Kept
    ) -> None:
        """At the end; what does not help on held-out rows is undone."""
        making = KeptMaking(kept, "tuned", made, vectors, self.losses)
        if not (self.options.end_steps and (made or vectors)) or making.go_on_tuned():
            return
        loss = partial(teacher.divergence, self.model)
        tuning = Tuning(made, vectors, self.options.end_rate, loss)
        numbers = order(len(teacher), self.options.end_steps, self.seed, 0)
        tuning.run(numbers, kept, steps_of(0), self.progress)
        self.journal.report_or_undo("tuned", tuning.undo)
        making.keep_tuned()

    def _keep(self, plans: Mapping[str, Plan], found: Mapping[str, Tensor]) -> None:
        """What plain tensors became, as far as that is not what they were."""
        for name, values in found.items():
            source = plans[name].source
            own = values.detach().cpu().to(TORCH_DTYPES[source.dtype], copy=True)
            if not torch.equal(own, source.load()):
                self.tuned[name] = own

    def plain(self, source: SourceTensor) -> Tensor | None:
        """What refits made of it, if it is one of the model's vectors or statistics."""
        return self.tuned.get(source.name)


def tables_of(model: nn.Module) -> set[str]:
    """Names of weights that are looked up and nothing else, as words and positions."""
    modules = [module for module in model.modules() if hasattr(module, "weight")]
    looked_up = {id(module.weight) for module in modules if isinstance(module, nn.Embedding)}
    looked_up -= {id(module.weight) for module in modules if not isinstance(module, nn.Embedding)}
    return {name for name, p in model.named_parameters(remove_duplicate=False) if id(p) in looked_up}


def _vectors(plans: Mapping[str, Plan], parameters: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """What stays plain and can be tuned: norms, biases and small matrices, unless the user excludes them."""
    plain = [name for name, plan in plans.items() if isinstance(plan, Plain) and plan.why in _TUNED]
    return {name: parameters[name] for name in plain if name in parameters}


def _is_of_low_rank(job: Job) -> bool:
    """Whether all there is of a difference are factors, which then can be fitted."""
    return job.choice.option.codec == THIN.name and job.choice.option.recipe.rest is None


def _statistics(plans: Mapping[str, Plan]) -> set[str]:
    return {name for name, plan in plans.items() if isinstance(plan, Plain) and plan.why is Why.STATISTICS}


def _are_pictures(batch: Mapping[str, Tensor]) -> bool:
    return next(iter(batch.values())).ndim == 4
