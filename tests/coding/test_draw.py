"""Variational draws: weights and gradients equal float64 references with the same noise; moments are exact.

Errors are ‖found - expected‖ / ‖expected‖ per tensor: below 1e-6 for weights, 1e-5 for gradients. Draws are
no part of the format, so neither they nor their gradients need equal anything but themselves bit for bit.
"""

import math
from collections.abc import Callable
from typing import Any

import mpmath
import pytest
import torch
from torch import Tensor

from miracle_hub.coding import cpu
from miracle_hub.coding.draw import (
    draw_mean_kl,
    draw_mean_kl_backward,
    draw_mean_var,
    draw_mean_var_backward,
    mean_kl_moments,
)
from miracle_hub.coding.quantiles import quantiles
from miracle_kernels import reparameterize_mean_kl_torch, reparameterize_torch
from miracle_kernels.draws import noise_torch
from miracle_kernels.reparameterize import reparameterize_backward_torch
from miracle_kernels.reparameterize_mean_kl import reparameterize_mean_kl_backward_torch

# The references are long chains of small tensors: idle threads only wait.
pytestmark = pytest.mark.usefixtures("one_torch_thread")

SEED, STREAM_ID = 2**40 + 5, 9
LOG_SCALE = torch.tensor(-3.0)
SIZES = [1, 7, 1003]
RATES = [1.0, 20.0]


def normal(n: int, seed: int) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed))


def relative(found: Tensor, expected: Tensor) -> float:
    """‖found - expected‖ / ‖expected‖; 0 for two zeros."""
    error = (found.detach().double() - expected.double()).norm()
    return float(error / expected.double().norm()) if error > 0 else 0.0


def seed_of(number: int) -> Tensor:
    return torch.tensor(number, dtype=torch.int64)


def check_mean_kl(
    tau: Tensor, alpha: Tensor, rate: float, kl: float, block_weights: int, moves: bool = True
) -> None:
    """Through autograd; `moves` is whether tau has a gradient above the reference's own resolution."""
    inputs = tau.clone().requires_grad_(), alpha.clone().requires_grad_(), LOG_SCALE.clone().requires_grad_()
    found = draw_mean_kl(inputs[0], inputs[1], rate, inputs[2], kl, block_weights, seed_of(SEED), STREAM_ID)
    tensors, rest = (rate * tau, rate * alpha, quantiles(), LOG_SCALE), (kl, block_weights, SEED, STREAM_ID)
    expected = reparameterize_mean_kl_torch(*tensors, None, *rest)
    assert found.dtype == torch.float32 and found.shape == tau.shape
    assert relative(found, expected) <= 1e-6
    # Of a quadratic loss: Σ grad_w·w, the gradient of the scale, does not cancel.
    grad_w = expected + 0.3 * expected.std(correction=0) * normal(tau.numel(), 3)
    grads = torch.autograd.grad(found, inputs, grad_w)
    by_tau, by_alpha, by_scale = reparameterize_mean_kl_backward_torch(grad_w, *tensors, *rest)
    assert float(grads[0].abs().max()) <= 1e-12 if not moves else relative(grads[0], rate * by_tau) <= 1e-5
    # A block of one weight has no shares to move: alpha's gradient is 0 up to rounding.
    assert block_weights == 1 or relative(grads[1], rate * by_alpha) <= 1e-5
    assert relative(grads[2], by_scale) <= 1e-5


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("block_weights", [1, 3, 40, 128, 1024])
def test_mean_kl_equals_the_float64_reference(n: int, block_weights: int) -> None:
    """1003 is no multiple of any but 1: the last blocks are short."""
    for rate in RATES:
        for kl in (0.01, 16 * math.log(2), 300.0):
            check_mean_kl(normal(n, 0) / rate, normal(n, 1) / rate, rate, kl, block_weights)


@pytest.mark.parametrize("kl", [1e-12, 1e-6, 1e-3, 1.0, 20.0])
@pytest.mark.parametrize("tau", [0.0, 1e-4, 0.25, -0.45, 3.0, -10.0])
def test_mean_kl_keeps_its_digits_near_the_prior(kl: float, tau: float) -> None:
    """A tiny κ, or a |tau| of 10 that leaves the variance nothing, takes v to 1, where dv/dκ has its pole."""
    check_mean_kl(tau * (1 + 0.1 * normal(64, 0)), 3 * normal(64, 1), 1.0, kl, 4)


@pytest.mark.parametrize("block_weights", [1, 3, 30, 128, 1000])
@pytest.mark.parametrize("touched", [slice(0, 0), slice(0, 1), slice(4095, 4097), slice(5000, 9001)])
def test_blocks_without_a_gradient_have_none_and_leave_that_of_others(
    block_weights: int, touched: slice
) -> None:
    """As the rows of an embedding whose tokens are in no sentence of a batch."""
    n, rest = 9001, (RATES[1], LOG_SCALE, 0.7 * block_weights, block_weights, seed_of(SEED), STREAM_ID)
    tau, alpha, grad_w = 0.05 * normal(n, 1), 0.01 * normal(n, 2), normal(n, 3)
    some = torch.zeros(n)
    some[touched] = grad_w[touched]
    found = draw_mean_kl_backward(some, tau, alpha, *rest)
    others = draw_mean_kl_backward(grad_w - some, tau, alpha, *rest)
    together = draw_mean_kl_backward(grad_w, tau, alpha, *rest)
    assert all(relative(a + b, c) <= 1e-6 for a, b, c in zip(found, others, together, strict=True))
    blocks = some.new_zeros(-(-n // block_weights) * block_weights)
    blocks[: len(some)] = some
    is_touched = (blocks.view(-1, block_weights) != 0).any(1).repeat_interleave(block_weights)[:n]
    assert not found[0][~is_touched].any() and not found[1][~is_touched].any()
    assert torch.equal(found[0][touched], together[0][touched])


@pytest.mark.parametrize("tau", [50.0, -200.0])
def test_a_mean_at_the_end_of_its_reach_is_at_rest(tau: float) -> None:
    check_mean_kl(torch.full((64,), tau), normal(64, 1), 1.0, 8.0, 8, moves=False)


def test_weights_without_a_share_are_the_priors_and_have_finite_gradients() -> None:
    alpha = torch.zeros(64)
    alpha[::2] = -200.0
    check_mean_kl(normal(64, 0), alpha, 1.0, 11.0, 8)
    check_mean_kl(normal(64, 0), alpha / 20, 20.0, 11.0, 8)


@pytest.mark.parametrize("n", SIZES)
def test_mean_var_equals_the_float64_reference(n: int) -> None:
    for shift in (-10.0, -3.0, 0.0):
        mean, log_std = 0.1 * normal(n, 0), normal(n, 1) + shift
        inputs = mean.clone().requires_grad_(), log_std.clone().requires_grad_()
        found = draw_mean_var(*inputs, seed_of(SEED), STREAM_ID)
        zero, rest, grad_w = torch.tensor(0.0), (None, SEED, STREAM_ID), normal(n, 3)
        expected = reparameterize_torch(mean, log_std, quantiles(), zero, *rest)[0]
        assert relative(found, expected) <= 1e-6
        grads = torch.autograd.grad(found, inputs, grad_w)
        by_std = reparameterize_backward_torch(grad_w, zero, mean, log_std, quantiles(), zero, *rest)[1]
        assert torch.equal(grads[0], grad_w) and relative(grads[1], by_std) <= 1e-5


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("seed", [0, 7, 2**63 - 1, -1, -(2**63)])
def test_the_noise_is_that_of_the_kernels_bit_for_bit(n: int, seed: int) -> None:
    """mean = 0 and std = 1 leave eps itself; blocks of Mean-KL start at multiples of a power of two."""
    zeros, stream_id = torch.zeros(n), 2**32 - 1
    w = draw_mean_var(zeros, zeros, seed_of(seed), stream_id)
    assert torch.equal(w, noise_torch(slice(0, n), quantiles(), seed, stream_id).float())
    w = draw_mean_kl(zeros, zeros, 1.0, zeros.sum(), 1e-20, 24, seed_of(seed), stream_id)
    blocks = noise_torch(slice(0, -(-n // 24) * 32), quantiles(), seed, stream_id).view(-1, 32)
    assert torch.equal(w, blocks[:, :24].flatten()[:n].float())


def mean_kl(one: Tensor, two: Tensor, scale: Tensor, seed: Tensor, stream_id: int = STREAM_ID) -> Tensor:
    return draw_mean_kl(one, two, 2.0, scale, 9.0, 20, seed, stream_id)


def mean_var(one: Tensor, two: Tensor, scale: Tensor, seed: Tensor, stream_id: int = STREAM_ID) -> Tensor:
    return draw_mean_var(one, two, seed, stream_id) * scale.exp()


both = pytest.mark.parametrize("draw", [mean_kl, mean_var])


def inputs32(n: int) -> tuple[Tensor, Tensor, Tensor]:
    one, two, scale = normal(n, 0), normal(n, 1) - 1, torch.tensor(-0.5)
    return one.requires_grad_(), two.requires_grad_(), scale.requires_grad_()


def gradients(draw: Callable[..., Tensor], n: int, seed: int) -> tuple[Tensor, ...]:
    """A draw and the gradients of a loss of it."""
    inputs = inputs32(n)
    w = draw(*inputs, seed_of(seed))
    return w.detach(), *torch.autograd.grad(w.sin().sum(), inputs)


@both
def test_equal_seeds_draw_equal_weights_and_others_draw_others(draw: Callable[..., Tensor]) -> None:
    inputs = [x.detach() for x in inputs32(1000)]
    w = draw(*inputs, seed_of(5))
    assert torch.equal(w, draw(*inputs, seed_of(5)))
    for other in (draw(*inputs, seed_of(6)), draw(*inputs, seed_of(5 + 2**32)), draw(*inputs, seed_of(5), 8)):
        # The table has 65,536 values: of 1,000 weights, a few are equal by chance at most.
        assert int((w == other).sum()) <= 3


@both
def test_draws_and_gradients_do_not_depend_on_the_number_of_threads(
    draw: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = []
    for count in (1, 3, 3):
        monkeypatch.setattr(cpu, "n_threads", lambda count=count: count)
        runs.append(gradients(draw, 300_001, 3))  # three tasks
    assert all(map(torch.equal, runs[0], runs[1])) and all(map(torch.equal, runs[1], runs[2]))


@both
def test_the_backward_pass_has_the_noise_of_its_forward_pass(draw: Callable[..., Tensor]) -> None:
    """The seed is counted up in place before the backward pass, and again by a second draw."""
    inputs, seed = inputs32(100), seed_of(3)
    first = draw(*inputs, seed)
    seed.add_(1)
    second = draw(*inputs, seed)
    seed.add_(1)
    for w, number in ((first, 3), (second, 4)):
        found = torch.autograd.grad(w.sin().sum(), inputs)
        assert all(map(torch.equal, found, gradients(draw, 100, number)[1:]))


@both
def test_the_kernels_draw_the_same_where_tensors_are_on_a_gpu(
    draw: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a GPU, tensors only say that they are on one, and the kernels' references run."""
    expected = gradients(draw, 1003, -7)
    if not torch.cuda.is_available():
        monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    inputs = [x.detach().to(device).requires_grad_() for x in inputs32(1003)]
    w = draw(*inputs, seed_of(-7))
    found = w, *torch.autograd.grad(w.sin().sum(), inputs)
    errors = [relative(one.cpu(), two) for one, two in zip(found, expected, strict=True)]
    assert errors[0] <= 1e-6 and max(errors[1:]) <= 1e-5, errors


@both
def test_a_gradient_that_no_one_wrote_out_is_taken(draw: Callable[..., Tensor]) -> None:
    """w.sum() sends back one number with strides of 0."""
    inputs = inputs32(63)
    w = draw(*inputs, seed_of(3))
    found = torch.autograd.grad(w.sum(), inputs, retain_graph=True)
    assert all(map(torch.equal, found, torch.autograd.grad(w, inputs, torch.ones(63))))


@both
def test_no_weights_give_no_weights(draw: Callable[..., Tensor]) -> None:
    w, by_one, by_two, by_scale = gradients(draw, 0, 1)
    assert w.shape == by_one.shape == by_two.shape == (0,) and by_scale == 0


@both
def test_torch_compile_makes_one_program_for_all_seeds(draw: Callable[..., Tensor]) -> None:
    torch._dynamo.reset()
    programs = 0

    def counted(graph: torch.fx.GraphModule, example: list[Tensor]) -> Any:
        nonlocal programs
        programs += 1
        return torch._dynamo.lookup_backend("aot_eager")(graph, example)

    compiled = torch.compile(draw, fullgraph=True, backend=counted)
    inputs, seed = inputs32(63), seed_of(3)
    for number in (3, 4, 2**40, -5):
        seed.fill_(number)
        w = compiled(*inputs, seed)
        expected = gradients(draw, 63, number)
        assert torch.equal(w.detach(), expected[0])
        assert all(map(torch.equal, torch.autograd.grad(w.sin().sum(), inputs), expected[1:]))
    assert programs == 1


def test_the_ops_are_sound_torch_ops() -> None:
    (one, two, scale), seed, grad_w = inputs32(63), seed_of(3), normal(63, 6)
    constants = one.detach(), two.detach()
    torch.library.opcheck(draw_mean_kl, (one, two, 2.0, scale, 9.0, 20, seed, 5))
    torch.library.opcheck(draw_mean_var, (one, two, seed, 5))
    numbers = (2.0, scale.detach(), 9.0, 20, seed, 5)
    torch.library.opcheck(draw_mean_kl_backward, (grad_w, *constants, *numbers))
    torch.library.opcheck(draw_mean_var_backward, (grad_w, constants[1], seed, 5))


def exact_moments(kappa: float, tau: float) -> tuple[float, float]:
    """In 50 digits: v - log v = 1 + d is v = -W(-e^(-1-d)), on the branch that is 1 at the most."""
    with mpmath.workdps(50):
        d = 2 * mpmath.mpf(kappa) * mpmath.sech(tau) ** 2
        variance = -mpmath.lambertw(-mpmath.exp(-1 - d))
        mean = mpmath.sqrt(2 * mpmath.mpf(kappa)) * mpmath.tanh(tau)
        return float(mean), float(variance.real)


@pytest.mark.parametrize("kappa", [1e-12, 1e-6, 1e-3, 0.4999999, 0.5000001, 1.0, 10.0, 40.0])
@pytest.mark.parametrize("tau", [0.0, 1e-4, -0.3, 2.0, 30.0])
def test_moments_are_those_of_the_exact_solution(kappa: float, tau: float) -> None:
    # Blocks of one weight have its whole budget; both results are rounded to float32 once.
    rate, alpha = 4.0, torch.tensor([0.7])
    found = mean_kl_moments(torch.tensor([tau / rate]), alpha, rate, kappa, 1)
    mean, variance = exact_moments(kappa, float(torch.tensor(tau)))
    assert found[0].dtype == found[1].dtype == torch.float32
    assert float(found[0]) == pytest.approx(mean, rel=1.2e-7, abs=0)
    assert float(found[1]) == pytest.approx(variance, rel=1.2e-7, abs=0)


@pytest.mark.parametrize("block_weights", [1, 3, 40, 128, 1024])
@pytest.mark.parametrize("budget", [0.3, 16 * math.log(2), 40.0])
def test_the_kl_of_the_moments_is_every_blocks_budget(block_weights: int, budget: float) -> None:
    tau, alpha = normal(1003, 0) / 20, normal(1003, 1) / 20
    mean, variance = (x.double() for x in mean_kl_moments(tau, alpha, 20.0, budget, block_weights))
    kl = (mean.square() + variance - 1 - variance.log()) / 2
    for block in kl.split(block_weights):  # a short last one has the whole budget too
        assert float(block.sum()) == pytest.approx(budget, rel=1e-6)


def test_moments_do_not_depend_on_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    tau, alpha = normal(1003, 0), normal(1003, 1)
    whole = mean_kl_moments(tau, alpha, 1.0, 5.0, 40)
    for chunk in (1, 100, 401):  # less than a block, some blocks, a fraction of one too many
        monkeypatch.setattr("miracle_hub.coding.draw._CHUNK", chunk)
        assert all(map(torch.equal, mean_kl_moments(tau, alpha, 1.0, 5.0, 40), whole))


def test_moments_of_nothing_are_nothing_and_have_no_gradient() -> None:
    mean, variance = mean_kl_moments(torch.zeros(0), torch.zeros(0), 1.0, 5.0, 40)
    assert mean.shape == variance.shape == (0,)
    tau = torch.zeros(4, requires_grad=True)
    assert not any(x.requires_grad for x in mean_kl_moments(tau, tau, 1.0, 5.0, 4))


@pytest.mark.parametrize("kl", [0.5, 16 * math.log(2)])
def test_draws_have_the_moments_that_coding_is_told(kl: float) -> None:
    """20,000 equal blocks of 12 weights, five standard errors: false alarms below 1e-6 each."""
    blocks, weights, log_scale = 20_000, 12, -1.0
    tau, alpha = normal(weights, 0).repeat(blocks), normal(weights, 1).repeat(blocks)
    w = draw_mean_kl(tau, alpha, 1.0, torch.tensor(log_scale), kl, weights, seed_of(SEED), STREAM_ID)
    drawn = w.double().view(blocks, weights) / math.exp(log_scale)
    mean, variance = (x[:weights].double() for x in mean_kl_moments(tau, alpha, 1.0, kl, weights))
    assert bool(((drawn.mean(0) - mean).abs() <= 5 * (variance / blocks).sqrt()).all())
    # The variance of the table of candidates is 3.3e-6 below 1.
    assert bool(((drawn.var(0) / variance - 1).abs() <= 5 * math.sqrt(2 / blocks) + 4e-6).all())
