"""Writes the files of a repository, entry after entry, with one payload in memory at a time."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from miracle_hub.codec.dtypes import as_bytes, raw_bytes
from miracle_hub.codec.guard import Contents, guards_of_stages
from miracle_hub.codec.jobs import Job, run_all
from miracle_hub.codec.naming import stage_name, stage_of
from miracle_hub.codec.plan import Exact, Plain, Plan, Ready
from miracle_hub.codec.repository import OutputFile, payloads_digest, write_indices
from miracle_hub.codec.source import files_of_weights
from miracle_hub.codec.stored import payload_at
from miracle_hub.coding.backend import Backend
from miracle_hub.files.container import opened
from miracle_hub.format.spec import TensorSpec


@dataclass(frozen=True)
class Written:
    """What config.json states of files, each of the first n stages, for every n.

    Attributes:
        digests: of the payloads.
        guards: of all tensors.
    """

    digests: tuple[str, ...]
    guards: tuple[str, ...]


@dataclass
class Writer:
    """Writes files entry after entry; payloads come from the jobs, in the order of the files."""

    folder: Path
    plans: Mapping[str, Plan]
    backend: Backend

    def write(self, stages: list[list[OutputFile]], jobs: list[list[Job]], progress: bool) -> Written:
        """The files of all stages, and their indices."""
        total = sum(job.source.n_weights for stage in jobs for job in stage)
        found: dict[str, int] = {}
        digests, contents = [], list[list[Contents]]()
        with tqdm(total=total, unit="weights", unit_scale=True, desc="compress", disable=not progress) as bar:
            for files, stage_jobs in zip(stages, jobs, strict=True):
                results = run_all(stage_jobs, self._earlier, self.backend)
                stage_digests, stage_contents = self._write_stage(files, results, bar)
                found |= stage_digests
                digests.append(payloads_digest(found))
                contents.append(stage_contents)
        guards = guards_of_stages(contents)
        write_indices(self.folder, stages, guards)
        return Written(tuple(digests), tuple(guards))

    def _write_stage(
        self, files: list[OutputFile], results: Iterator[tuple[Job, bytes]], bar: tqdm
    ) -> tuple[dict[str, int], list[Contents]]:
        """The files of one stage; returns the digests of its payloads, and what guards cover."""
        digests: dict[str, int] = {}

        def data(entry: TensorSpec) -> bytes:
            plan = self.plans.get(entry.name)
            if isinstance(plan, Plain):
                weights = plan.load()
                return raw_bytes(weights.half() if plan.is_narrowed else weights)
            if isinstance(plan, Ready | Exact):
                raw = plan.payload
            else:
                job, raw = next(results)
                assert job.name == entry.name, f"expected the payload of {entry.name}, found {job.name}"
                bar.update(job.source.n_weights)
            digests[entry.name] = _digest(raw, entry.name)
            return raw

        written = [file.write(self.folder, data) for file in files]
        return digests, [contents for contents in written if contents is not None]

    def _earlier(self, job: Job) -> Sequence[Tensor]:
        """The payloads of a tensor's stages before a job's, in order, as they were written."""
        wanted, found = [stage_name(job.source.name, stage) for stage in range(1, job.stage)], {}
        for path in files_of_weights(self.folder):
            if stage_of(path) < job.stage:
                with opened(path) as file:
                    found |= {key: file.get_tensor(key) for key in set(wanted) & set(file.keys())}
        return [found[name] for name in wanted]


def _digest(payload: bytes, name: str) -> int:
    return payload_at(as_bytes(payload), name).facts.digest
