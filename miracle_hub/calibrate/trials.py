"""Which damping of the feedback suits each kind of matrix: tried on a few of them, judged on held-out rows.

Feedback keeps errors out of the directions in which a matrix's inputs are large, and raises those in others.
Where squares do not tell the loss, as of the last matrix of post-norm blocks, that is worse: MiniLM's at 2
bits diverge by 0.77 without it, and by 1.67, 1.11, 0.62 and 0.38 with dampings of 0.01, 0.1, 0.5 and 2; its
queries by 0.21, and by 0.041, 0.041, 0.050 and 0.057.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn
from tqdm import tqdm

from miracle_hub.calibrate.matrix import MatrixInMaking, code_all
from miracle_hub.calibrate.norms import Norms
from miracle_hub.calibrate.precision import fast_if_large
from miracle_hub.calibrate.teacher import Teacher
from miracle_hub.codec.jobs import Job
from miracle_hub.codec.kept import Kept
from miracle_hub.coding.backend import Backend

# From the most feedback to none, as far as it gets better: with damping divergences fall, then rise.
_DAMPINGS = (0.03, 0.3, 3.0, None)
# Of one kind: the first, the middle and the last, in models of many layers.
_TRIED = 3
# Of one matrix; larger ones, as those of words, are not tried and have the damping of `Curvature`.
_MOST_WEIGHTS = 1 << 22


def kind_of(name: str) -> str:
    """Names that differ in the numbers of layers are of one kind."""
    return re.sub(r"\d+", "*", name)


def with_damping(
    jobs: Sequence[Job],
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    held_out: Teacher,
    backend: Backend,
    progress: bool = False,
    kept: Kept | None = None,
    norms: Norms | None = None,
) -> list[Job]:
    """The jobs, those of each kind with the damping, or without the feedback, that diverged least.

    Args:
        norms: whose statistics are estimated anew in every trial, as they will be.
    """
    kept = kept or Kept()
    if (found := kept.load("damping")) is None:
        chosen = _chosen(jobs, model, parameters, held_out, backend, progress, norms)
        kept.save("damping", chosen=chosen)
    else:
        chosen = found.facts["chosen"]
    return [
        _damped(job, chosen[kind]) if (kind := kind_of(job.source.name)) in chosen else job for job in jobs
    ]


def _chosen(
    jobs: Sequence[Job],
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    held_out: Teacher,
    backend: Backend,
    progress: bool,
    norms: Norms | None,
) -> dict[str, float | None]:
    """Of every kind of matrices that was tried."""
    kinds: dict[str, list[Job]] = {}
    for job in jobs:
        if job.curvature is not None and job.curvature.columns is not None:
            kinds.setdefault(kind_of(job.source.name), []).append(job)
    chosen = dict[str, float | None]()
    for kind, own in tqdm(kinds.items(), desc="feedback", disable=not progress):
        picked = [own[i] for i in sorted({0, len(own) // 2, len(own) - 1})][:_TRIED]
        if sum(job.source.n_weights for job in picked) <= _TRIED * _MOST_WEIGHTS:
            given = (model, parameters, held_out, backend, norms)
            damped = ([_damped(job, damping) for job in picked] for damping in _DAMPINGS)
            chosen[kind] = _DAMPINGS[first_least(_diverged(jobs, *given) for jobs in damped)]
    return chosen


def first_least(values: Iterable[float]) -> int:
    """The place of the least value; none is asked for after one that is larger than the one before."""
    least, place = math.inf, 0
    for i, value in enumerate(values):
        if value >= least:
            break
        least, place = value, i
    return place


def _damped(job: Job, damping: float | None) -> Job:
    curvature = job.curvature
    if curvature is None:  # no answer depends on it
        return job
    if damping is None:
        return replace(job, curvature=replace(curvature, columns=None))
    return replace(job, curvature=replace(curvature, damping=damping))


@torch.no_grad()
def _diverged(
    jobs: Sequence[Job],
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    held_out: Teacher,
    backend: Backend,
    norms: Norms | None,
) -> float:
    """The divergence of the model with these matrices coded; they are as they were afterwards."""
    own = [parameters[job.source.name] for job in jobs]
    changed = [*own, *(norms.buffers.values() if norms else ())]
    before = [values.detach().clone() for values in changed]
    try:
        made = [MatrixInMaking(job, parameter, backend) for job, parameter in zip(jobs, own, strict=True)]
        code_all((matrix, matrix.columns) for matrix in made)
        if norms:
            norms.estimate()
        with fast_if_large(model):  # all trials are rounded alike
            return held_out.mean_divergence(model)
    finally:
        for own_values, values in zip(changed, before, strict=True):
            own_values.copy_(values)
