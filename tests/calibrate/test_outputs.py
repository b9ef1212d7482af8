"""Answers of many numbers are worked on in parts, which changes nothing of what they say."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from miracle_hub.calibrate import outputs
from miracle_hub.calibrate.outputs import divergence, parts, sampled_gradient
from miracle_hub.calibrate.sensitivity import Sensitivity
from miracle_hub.calibrate.teacher import Teacher, _kl


def logits(seed: int, *shape: int) -> Tensor:
    return 3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=[1, 1300, 1 << 22])
def part(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Floats of a part: fewer than a row has, some rows, all."""
    monkeypatch.setattr(outputs, "_PART", request.param)
    return request.param


def teacher_of(dense: Tensor) -> Teacher:
    """Of a model that answers to anything with these logits."""
    return Teacher(answering(dense), [{"input_ids": torch.zeros(dense.shape[:2], dtype=torch.long)}])


def answering(values: Tensor) -> torch.nn.Module:
    class Model(torch.nn.Module):
        def forward(self, input_ids: Tensor) -> SimpleNamespace:
            return SimpleNamespace(logits=values)

    return Model()


def test_parts_are_all_rows_in_order(part: int) -> None:
    assert torch.cat([torch.arange(9)[some] for some in parts(torch.zeros(9, 600))]).tolist() == list(
        range(9)
    )
    assert list(parts(torch.zeros(0, 600))) == []


def test_divergence_of_few_classes_and_its_gradient_are_those_of_the_plain_formula(part: int) -> None:
    dense, found = logits(0, 3, 5, 600), logits(1, 3, 5, 600).requires_grad_()
    teacher = teacher_of(dense)
    log_p, classes = dense.log_softmax(-1).topk(128)
    plain = _kl(log_p.half().float(), found.log_softmax(-1).gather(-1, classes)).mean()
    (wanted,) = torch.autograd.grad(2 * plain, found)
    loss = teacher.divergence(answering(found), 0)
    (gradient,) = torch.autograd.grad(2 * loss, found)
    torch.testing.assert_close(loss, plain)
    torch.testing.assert_close(gradient, wanted)
    assert teacher.mean_divergence(answering(found)) == pytest.approx(float(plain.detach()), rel=1e-5)


def test_divergence_of_few_classes_is_nearly_that_of_all() -> None:
    dense, found = 3 * logits(0, 2, 40, 600), 3 * logits(0, 2, 40, 600) + 0.1 * logits(1, 2, 40, 600)
    whole = float(divergence("logits", found, dense))
    assert teacher_of(dense).mean_divergence(answering(found)) == pytest.approx(whole, rel=0.05)
    # It keeps logarithms below 32 in float16, which are wrong by 2⁻⁷ at most.
    assert teacher_of(dense).mean_divergence(answering(dense)) == pytest.approx(0, abs=2.0**-7)


def test_a_half_precision_answer_has_a_gradient_of_its_own_type(part: int) -> None:
    found = logits(1, 2, 4, 600).bfloat16().requires_grad_()
    teacher_of(logits(0, 2, 4, 600)).divergence(answering(found), 0).backward()
    assert found.grad is not None and found.grad.dtype == torch.bfloat16 and bool(found.grad.any())


def test_gradients_of_logits_have_the_moments_of_the_fisher_matrix(part: int) -> None:
    found = logits(2, 1, 1, 5).expand(40_000, 1, 5)
    drawn = sampled_gradient("logits", found, torch.Generator().manual_seed(0)).flatten(0, 1)
    p = found[0, 0].softmax(-1)
    fisher = p.diag() - p[:, None] * p
    torch.testing.assert_close(drawn.T @ drawn / len(drawn), fisher, rtol=0, atol=0.01)


def test_sums_over_tokens_are_the_same_in_parts(part: int) -> None:
    x, gradient = logits(0, 50, 8).bfloat16(), logits(1, 50, 600)
    sensitivity = Sensitivity()
    for _ in range(2):
        sensitivity.add("w", "layer", x, gradient, torch.Size((600, 8)))
    found, power = sensitivity.sums["w"]["layer"], gradient.square()
    weighted = x.float() * power.sum(1, keepdim=True)
    assert found.columns is not None and found.columns.dtype == torch.float32
    torch.testing.assert_close(found.rows, 2 * power.sum(0))
    torch.testing.assert_close(found.columns, 2 * weighted.T @ x.float(), rtol=1e-5, atol=1e-2)
    assert found.weight == pytest.approx(2 * float(power.sum()), rel=1e-5)
