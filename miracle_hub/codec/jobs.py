"""Encoding as a list of jobs: pure functions of a tensor and a choice, each with a digest of its inputs.

A job's payload depends on nothing else, so that jobs may run in any order, in any process, and their results
be found again by their digests. Jobs of a stage above the first take what the stages before made of the
tensor.
"""

import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from miracle_hub.codec.curvature import Curvature
from miracle_hub.codec.naming import stage_name
from miracle_hub.codec.payloads import codec_named
from miracle_hub.codec.rates import Chosen
from miracle_hub.codec.source import SourceTensor
from miracle_hub.codec.stored import StoredTensor, payload_at
from miracle_hub.coding.backend import Backend
from miracle_hub.coding.cpu import torch_threads

# Of the encoders: another search that gives other bytes for equal inputs has another number.
ENCODER = 3
# Weights of a job that runs beside others: a choice.
_MOST_AT_ONCE = 1 << 24
# Jobs per processor that are waited for: they come in their order, and a short one is done before a long one.
_WAITED_FOR = 4


@dataclass(frozen=True)
class Job:
    """One payload to make.

    Attributes:
        content: SHA-256 of the source tensor's bytes.
        earlier: digests of the jobs whose payloads come before in the tensor's sum.
        curvature: what errors cost, where somebody measured it.
        based: the base's tensor, if the difference to that is coded.
    """

    source: SourceTensor
    content: str
    choice: Chosen
    stage: int = 1
    earlier: tuple[str, ...] = ()
    curvature: Curvature | None = None
    based: StoredTensor | None = None

    @property
    def name(self) -> str:
        """Of the entry that the payload becomes."""
        return stage_name(self.source.name, self.stage)

    def digest(self, backend: Backend) -> str:
        """Of all that the payload depends on, SHA-256 in hexadecimal.

        Backends find other messages, of equal error, so that theirs are other results.
        """
        source = (self.source.dtype, list(self.source.shape), self.content)
        parts = [(rows, repr(recipe)) for rows, recipe in self.choice.parts()]
        inputs = [ENCODER, backend.name, source, self.choice.option.codec, parts, self.stage, self.earlier]
        inputs += [] if self.curvature is None else [self.curvature.digest]
        inputs += [] if self.based is None else [self.based.base_digest]
        return hashlib.sha256(json.dumps(inputs).encode()).hexdigest()

    def run(self, earlier: Sequence[Tensor], backend: Backend) -> bytes:
        """The payload.

        Args:
            earlier: the payloads of the stages before, uint8 `[bytes]`, in order.

        Raises:
            SourceError: the tensor cannot be read.
        """
        weights, codec = self.source.load(), codec_named(self.choice.option.codec)
        known: dict[str, Any] = {} if self.curvature is None else {"curvature": self.curvature}
        known |= {} if self.based is None else {"base": self.based.load_base()}
        if not earlier:
            return codec.encode(weights, self.choice, self.source.name, backend, **known)
        decoded = [payload_at(entry, self.source.name).decode(backend) for entry in earlier]
        return codec.encode(weights, self.choice, self.source.name, backend, decoded, **known)


def refining(
    jobs: Mapping[str, Job], choice: Callable[[SourceTensor], Chosen], backend: Backend
) -> list[Job]:
    """The jobs of the next stage, by tensor in order of name.

    Args:
        jobs: of the stage before, by tensor.
        choice: how what is left of a tensor is coded.
    """
    return [
        Job(job.source, job.content, choice(job.source), job.stage + 1, (*job.earlier, job.digest(backend)))
        for _, job in sorted(jobs.items())
    ]


def _is_short(job: Job) -> bool:
    """Whether it is coded band after band, each too short for several threads, and takes little memory."""
    return job.curvature is not None and job.source.n_weights <= _MOST_AT_ONCE


def run_all(
    jobs: Iterable[Job], earlier: Callable[[Job], Sequence[Tensor]], backend: Backend
) -> Iterator[tuple[Job, bytes]]:
    """Every job with its payload, in their order: whoever runs them elsewhere takes the place of this.

    On the CPU jobs with feedback run at once, as many as there are processors: a band keeps one of them busy.

    Args:
        earlier: the payloads that a job of a later stage takes.
    """
    at_once = torch_threads() if backend.device.type == "cpu" else 1
    if at_once == 1:  # in this thread, where torch refuses others
        yield from ((job, job.run(earlier(job), backend)) for job in jobs)
        return
    with ThreadPoolExecutor(at_once) as pool:
        begun = deque[tuple[Job, Future[bytes]]]()
        for job in jobs:
            begun.append((job, pool.submit(job.run, earlier(job), backend)))
            while begun and (len(begun) == _WAITED_FOR * at_once or not _is_short(job)):
                first, payload = begun.popleft()
                yield first, payload.result()
        yield from ((job, payload.result()) for job, payload in begun)
