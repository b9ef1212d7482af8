"""Jobs are pure functions: their digests tell inputs apart, and their order and process do not matter."""

import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from miracle_hub.code import Code
from miracle_hub.codec import jobs as jobs_module
from miracle_hub.codec.curvature import Curvature
from miracle_hub.codec.jobs import Job, refining, run_all
from miracle_hub.codec.rates import Choice, Option
from miracle_hub.codec.source import list_tensors
from miracle_hub.codec.stored import payload_at
from miracle_hub.codec.trellis import Recipe
from miracle_hub.coding.backend import choose

CPU, TWO_BITS = choose("cpu"), Code(8, 2, 1)


def choice(code: Code = TWO_BITS) -> Choice:
    return Choice(96, Option(Recipe(code, False, 64, 64), 0, 0.0))


@pytest.fixture
def job(model: Path) -> Job:
    source = next(t for t in list_tensors([model / "model.safetensors"]) if t.name == "first.weight")
    return Job(source, "0" * 64, choice())


def as_tensor(payload: bytes) -> Tensor:
    return torch.frombuffer(bytearray(payload), dtype=torch.uint8)


def test_equal_inputs_have_one_digest_and_one_payload(job: Job) -> None:
    again = replace(job, choice=choice())
    assert again.digest(CPU) == job.digest(CPU) and again.run([], CPU) == job.run([], CPU)


def test_every_input_changes_the_digest(job: Job) -> None:
    source, two = job.source, Choice(96, choice().option, choice(Code(8, 3, 1)).option, 10)
    changed = [
        replace(job, content="1" * 64),
        replace(job, source=replace(source, dtype="BF16")),
        replace(job, source=replace(source, shape=(64, 96))),
        replace(job, choice=choice(Code(8, 2, 1, seed=1))),
        replace(job, choice=choice(Code(8, 3, 1))),
        replace(job, choice=two),
        replace(job, stage=2),
        replace(job, earlier=("2" * 64,)),
    ]
    assert len({each.digest(CPU) for each in [job, *changed]}) == 1 + len(changed)


def test_where_a_tensor_lies_and_how_it_is_called_do_not_matter(job: Job) -> None:
    moved = replace(job, source=replace(job.source, name="another", path=Path("elsewhere")))
    assert moved.digest(CPU) == job.digest(CPU)


def test_jobs_in_another_order_give_the_same_payloads(job: Job) -> None:
    jobs = [job, replace(job, choice=choice(Code(8, 3, 1))), replace(job, choice=choice(Code(8, 1, 1)))]
    forth = {each.digest(CPU): payload for each, payload in run_all(jobs, lambda job: (), CPU)}
    back = {each.digest(CPU): payload for each, payload in run_all(jobs[::-1], lambda job: (), CPU)}
    assert forth == back and len(forth) == 3


def test_jobs_with_feedback_run_at_once_and_come_in_their_order(job: Job) -> None:
    rows = torch.randn(200, 64, generator=torch.Generator().manual_seed(0))
    known = Curvature(torch.ones(96), rows.T @ rows / 200)
    codes = [Code(8, step_bits, 1) for step_bits in (1, 2, 3, 4, 5)]
    jobs = [replace(job, choice=choice(code), curvature=known) for code in codes]
    jobs.insert(2, job)
    found = list(run_all(jobs, lambda job: (), CPU))
    assert [each for each, _ in found] == jobs
    assert [payload for _, payload in found] == [each.run((), CPU) for each in jobs]


def test_where_torch_refuses_other_threads_jobs_run_in_their_callers(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    monkeypatch.setattr(jobs_module, "torch_threads", lambda: 1)
    monkeypatch.setattr(Job, "run", lambda *_: seen.append(threading.current_thread()) or b"")
    assert list(run_all([job, job], lambda job: (), CPU)) == [(job, b"")] * 2
    assert seen == [threading.current_thread()] * 2


def test_a_refining_job_codes_what_the_stages_before_leave(job: Job) -> None:
    first = as_tensor(job.run([], CPU))
    (second,) = refining({job.source.name: job}, lambda source: choice(Code(12, 4, 7)), CPU)
    assert (second.name, second.earlier) == ("first.weight.stage_2", (job.digest(CPU),))
    left = job.source.load() - payload_at(first, "w").decode(CPU)
    refined = payload_at(as_tensor(second.run([first], CPU)), "w").decode(CPU)
    assert float((left - refined).square().sum()) < 0.6 * float(left.square().sum())
