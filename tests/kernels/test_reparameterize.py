"""reparameterize: the drawn weight, its KL and every gradient equal float64 autograd of the plain formulas.

Errors are ‖found - expected‖ / ‖expected‖ per tensor, and below 1e-5.
"""

import math
from typing import Any

import pytest
import torch
from plain_draws import (
    BACKWARDS,
    FORWARDS,
    KL_BACKWARDS,
    KL_FORWARDS,
    SEED,
    STREAM_ID,
    block_noise,
    gradients,
    noise,
    normal,
    parameters64,
    plain_mean_kl,
    plain_mean_var,
    relative,
    solved,
)
from torch import Tensor

from miracle_hub.coding.quantiles import quantiles
from miracle_kernels import reparameterize_torch
from miracle_kernels._triton import tl, triton
from miracle_kernels.draws import noise as kernel_noise
from miracle_kernels.draws import noise_torch
from miracle_kernels.reparameterize_mean_kl import reparameterize_mean_kl_triton

SIZES = [1, 63, 1311]


def check_mean_var(
    device: torch.device, mean: Tensor, log_std: Tensor, log_scale: float, prior_mean: Tensor | None
) -> None:
    n, scale = mean.numel(), torch.tensor(log_scale)
    inputs = parameters64(mean, log_std, scale)
    center = torch.zeros(n) if prior_mean is None else prior_mean
    w, kl_nats = plain_mean_var(*inputs, center.double(), noise(n).double())
    grad_w, grad_kl = normal(n, 3), torch.tensor(0.7)
    expected = gradients([(w, grad_w), (kl_nats, grad_kl)], inputs)
    arguments: list[Any] = [mean, log_std, quantiles(), scale, prior_mean, SEED, STREAM_ID]
    arguments = [value.to(device) if isinstance(value, Tensor) else value for value in arguments]
    for forward, backward in zip(FORWARDS, BACKWARDS, strict=True):
        found = (*forward(*arguments), *backward(grad_w.to(device), grad_kl.to(device), *arguments))
        errors = [relative(*pair) for pair in zip(found, (w, kl_nats, *expected), strict=True)]
        assert max(errors) <= 1e-5, f"{forward.__name__}: {errors}"


def check_mean_kl(
    device: torch.device,
    tau: Tensor,
    alpha: Tensor,
    block_kl_nats: float,
    block_weights: int,
    of: float = 1e-5,
) -> None:
    n, scale = tau.numel(), torch.tensor(-3.0)
    inputs = parameters64(tau, alpha, scale)
    eps = block_noise(n, block_weights).double()
    w, _ = plain_mean_kl(*inputs, block_kl_nats, block_weights, eps)
    # Of a quadratic loss: Σ grad_w·w, the gradient of the scale, does not cancel.
    grad_w, prior_mean = (
        (w.detach() + 0.3 * w.detach().std(correction=0) * normal(n, 3)).float(),
        normal(n, 4),
    )
    expected = gradients([(w, grad_w)], inputs)
    tensors = tau.to(device), alpha.to(device), quantiles().to(device), scale.to(device)
    rest = (block_kl_nats, block_weights, SEED, STREAM_ID)
    for forward, backward in zip(KL_FORWARDS, KL_BACKWARDS, strict=True):
        found = (forward(*tensors, None, *rest), *backward(grad_w.to(device), *tensors, *rest))
        pairs = zip(found, (w, *expected), strict=True)
        errors = [relative(*pair) for pair in pairs]
        # A block of one weight has no shares to move: alpha's gradient is 0 up to rounding.
        errors[2] = 0.0 if block_weights == 1 else errors[2]
        assert max(errors) <= 1e-5, f"{forward.__name__}: {errors}"
        moved = forward(*tensors, prior_mean.to(device), *rest)
        assert relative(moved, w + prior_mean.double()) <= 1e-5


@triton.jit(do_not_specialize=["first_group", "seed", "stream_id"])
def _noise_kernel(out_ptr, quantiles_ptr, first_group, seed, stream_id, TILE: tl.constexpr):
    eps = kernel_noise(first_group.to(tl.int64), quantiles_ptr, seed, stream_id, TILE)
    tl.store(out_ptr + tl.arange(0, TILE), eps)


@pytest.mark.parametrize("first_group", [0, 2**31 - 4, 2**32 - 4, 2**35 + 1])
@pytest.mark.parametrize("seed", [0, 1, 2**32 + 7, 2**63 - 1, -1, -(2**63)])
def test_noise_is_bit_equal_to_its_definition(device: torch.device, first_group: int, seed: int) -> None:
    for stream_id in (0, 2**32 - 1):
        out, table = torch.empty(64, device=device), quantiles().to(device)
        _noise_kernel[(1,)](out, table, first_group, seed, stream_id, 64, enable_fp_fusion=False)  # pyright: ignore
        expected = noise(64, seed, stream_id, first_group)
        at = slice(8 * first_group, 8 * first_group + 64)
        assert torch.equal(out.cpu().half(), expected)
        assert torch.equal(noise_torch(at, table, seed, stream_id).cpu(), expected)


@pytest.mark.parametrize("n", SIZES)
def test_kernel_and_torch_draw_the_same_noise(device: torch.device, n: int) -> None:
    """mean = 0 and std = 1 leave eps itself; so do the blocks of Mean-KL at a negligible KL."""
    zeros, table = torch.zeros(n, device=device), quantiles().to(device)
    for forward in FORWARDS:
        w, _ = forward(zeros, zeros, table, zeros.sum(), None, SEED, STREAM_ID)
        assert torch.equal(w.cpu(), noise(n).float())
    for forward in KL_FORWARDS:
        w = forward(zeros, zeros, table, zeros.sum(), None, 1e-20, 24, SEED, STREAM_ID)
        assert torch.equal(w.cpu(), block_noise(n, 24).float())


def test_noise_is_standard_normal_and_depends_on_seed_and_stream() -> None:
    """Bounds of five standard errors: false alarm below 1e-6 each. The table's variance is 3.3e-6 below 1."""
    n = 100_000
    first, second = noise_torch(slice(0, n), quantiles(), 1, 0), noise_torch(slice(0, n), quantiles(), 2, 0)
    other = noise_torch(slice(0, n), quantiles(), 1, 1)
    for eps in (first.double(), second.double(), other.double()):
        assert abs(eps.mean()) <= 5 / math.sqrt(n)
        assert abs(eps.var() - 1) <= 5 * math.sqrt(2 / n) + 4e-6
    for one, two in ((first, second), (first, other)):
        assert abs((one.double() * two.double()).mean()) <= 5 / math.sqrt(n)


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("prior", [None, torch.float32, torch.bfloat16])
def test_mean_var_equals_float64_autograd(device: torch.device, n: int, prior: torch.dtype | None) -> None:
    prior_mean = None if prior is None else (0.1 * normal(n, 2)).to(prior)
    check_mean_var(device, 0.1 * normal(n, 0), normal(n, 1) - 3, -2.0, prior_mean)


@pytest.mark.parametrize("log_std", [(-20, 0), (-20, -19), (-2.1, -1.9), (-2.0001, -1.9999), (-2, -2)])
def test_mean_var_keeps_its_digits_from_sharp_posteriors_to_q_near_p(
    device: torch.device, log_std: tuple[float, float]
) -> None:
    """At q = p both the KL and its gradients vanish; neither may be rounding noise."""
    low, high = log_std
    n = 300
    width = max(high - low, 1e-4) if high > low else 0.0
    values = low + width * torch.rand(n, generator=torch.Generator().manual_seed(8))
    check_mean_var(device, 1e-3 * width * normal(n, 0), values, -2.0, None)


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("block_weights", [1, 2, 3, 8, 20, 64])
def test_mean_kl_equals_float64_autograd(device: torch.device, n: int, block_weights: int) -> None:
    check_mean_kl(device, normal(n, 0), normal(n, 1), 16 * math.log(2), block_weights)


def test_blocks_may_have_1024_weights(device: torch.device) -> None:
    check_mean_kl(device, normal(1311, 0), normal(1311, 1), 24 * math.log(2), 1024)


@pytest.mark.parametrize("bits", [0.01, 1, 12, 24])
@pytest.mark.parametrize("tau", [0.0, 1e-4, 0.25, 3.0, 10.0, -10.0])
def test_mean_kl_keeps_its_digits_wherever_the_mean_is(device: torch.device, bits: float, tau: float) -> None:
    """|tau| of 10 takes v to 1, where dv/dc has its pole."""
    taus = tau * (1 + 0.1 * normal(64, 0))
    check_mean_kl(device, taus, 3 * normal(64, 1), bits * math.log(2), 4)


@pytest.mark.parametrize("tau", [50.0, -200.0])
def test_mean_kl_takes_a_mean_at_the_end_of_its_reach(device: torch.device, tau: float) -> None:
    """sech² tau underflows: σ is the prior's, tau is at rest, and nothing is NaN."""
    taus, alpha, table = torch.full((64,), tau, device=device), torch.zeros(64, device=device), quantiles()
    arguments = (taus, alpha, table.to(device), alpha.sum())
    for forward, backward in zip(KL_FORWARDS, KL_BACKWARDS, strict=True):
        w = forward(*arguments, None, 8.0, 8, SEED, STREAM_ID)
        assert relative(w, math.copysign(math.sqrt(2), tau) + noise(64).double()) <= 1e-6
        grad_tau, *others = backward(torch.ones(64, device=device), *arguments, 8.0, 8, SEED, STREAM_ID)
        assert float(grad_tau.abs().max()) <= 1e-12
        assert all(bool(gradient.isfinite().all()) for gradient in others)


def test_mean_kl_takes_weights_without_a_share(device: torch.device) -> None:
    """alpha 200 below its block's underflows κ to 0: w is the prior's draw, and no gradient is NaN."""
    alpha = torch.zeros(64)
    alpha[::2] = -200
    check_mean_kl(device, normal(64, 0), alpha, 11.0, 8)


@pytest.mark.parametrize("block_weights", [3, 8])
def test_every_block_has_its_budget_of_kl_a_short_one_too(block_weights: int) -> None:
    inputs = parameters64(normal(11, 0), normal(11, 1), torch.tensor(0.3))
    _, kl_nats = plain_mean_kl(*inputs, 5.0, block_weights, torch.zeros(11))
    sums = torch.stack([block.sum() for block in kl_nats.split(block_weights)])
    assert torch.allclose(sums, torch.full_like(sums, 5.0), rtol=1e-12)


def test_the_solution_is_float32s_at_every_excess(device: torch.device) -> None:
    """tau = 0 and blocks of one leave w = √v·eps. -log v of 2κ has an error of its own: float32 at 2κ."""
    table, zero = quantiles().to(device), torch.zeros(64, device=device)
    for kappa in [*torch.logspace(-6, 1.3, 60).tolist(), 0.5 - 1e-7, 0.5, 0.5 + 1e-7]:
        w = reparameterize_mean_kl_triton(zero, zero, table, zero.sum(), None, kappa, 1, SEED, STREAM_ID)
        std = (solved(torch.tensor([2 * kappa]).double()) / 2).exp()
        assert relative(w, std * noise(64).double()) <= 3e-7 * (1 + kappa), kappa


# Kernels of other dtypes lay out their tiles in other ways, and so add them up in other orders: each of 63
# terms passes through at most 15 roundings of 2⁻²⁴ (7 in a thread, 5 in a warp, 3 between warps) on its way.
ORDERS_DIFFER_BY = 2 * 15 * 2**-24


def same_but_for_the_order(found: Tensor, expected: Tensor, magnitude: float) -> bool:
    """Of sums whose terms have magnitudes that add up to `magnitude`."""
    return abs(float(found) - float(expected)) <= ORDERS_DIFFER_BY * magnitude


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_w_may_have_sixteen_bits_and_so_may_its_gradient(device: torch.device, dtype: torch.dtype) -> None:
    """Bit for bit but for sums over all weights, which come in an order of the dtype's."""
    mean, log_std, scale = (
        normal(63, 0).to(device),
        normal(63, 1).to(device),
        torch.tensor(0.0, device=device),
    )
    table, grad = quantiles().to(device), normal(63, 2).to(device, dtype)
    arguments = (mean, log_std, table, scale, None, SEED, STREAM_ID)
    for forward, backward in zip(FORWARDS, BACKWARDS, strict=True):
        w, kl_nats = forward(*arguments, dtype)
        wide, same = forward(*arguments)
        assert w.dtype == dtype and torch.equal(w, wide.to(dtype))
        assert same_but_for_the_order(kl_nats, same, float(same))
        found, wide = backward(grad, scale, *arguments), backward(grad.float(), scale, *arguments)
        assert all(map(torch.equal, found[:2], wide[:2]))
        terms = mean.cpu().double() ** 2 + torch.expm1(2 * log_std.cpu().double())
        assert same_but_for_the_order(found[2], wide[2], float(terms.abs().sum()))
    rest = (5.0, 8, SEED, STREAM_ID)
    for forward, backward in zip(KL_FORWARDS, KL_BACKWARDS, strict=True):
        w = forward(mean, log_std, table, scale, None, *rest, dtype)
        assert w.dtype == dtype
        wide = forward(mean, log_std, table, scale, None, *rest)
        assert torch.equal(w, wide.to(dtype))
        terms = (grad.double() * wide).abs().sum()
        found = backward(grad, mean, log_std, table, scale, *rest)
        wide = backward(grad.float(), mean, log_std, table, scale, *rest)
        assert all(map(torch.equal, found[:2], wide[:2]))
        assert same_but_for_the_order(found[2], wide[2], float(terms))


def test_parameters_may_be_views_with_an_offset(device: torch.device) -> None:
    check_mean_var(device, normal(200, 0)[17:80], normal(200, 1)[3:66], 0.0, normal(200, 2)[1:64])
    check_mean_kl(device, normal(200, 0)[17:80], normal(200, 1)[3:66], 5.0, 8)


def test_no_weights_give_no_weights(device: torch.device) -> None:
    none, table = torch.zeros(0, 4, device=device), quantiles().to(device)
    for forward, backward in zip(FORWARDS, BACKWARDS, strict=True):
        w, kl_nats = forward(none, none, table, none.sum(), None, 0, 0)
        grads = backward(none, none.sum(), none, none, table, none.sum(), None, 0, 0)
        assert w.shape == grads[0].shape == (0, 4) and kl_nats == 0 and grads[2] == 0
    for forward, backward in zip(KL_FORWARDS, KL_BACKWARDS, strict=True):
        w = forward(none, none, table, none.sum(), None, 1.0, 8, 0, 0)
        grads = backward(none, none, none, table, none.sum(), 1.0, 8, 0, 0)
        assert w.shape == grads[0].shape == (0, 4) and grads[2] == 0


def test_kl_nats_is_the_expected_log_importance_weight() -> None:
    """Over 64 draws of 4,096 weights, within five standard errors: false alarm below 1e-6."""
    mean, log_std, scale = 0.3 * normal(4096, 0), 0.3 * normal(4096, 1) - 1.5, torch.tensor(-1.0)
    totals, kl_nats = [], torch.tensor(0.0)
    for seed in range(64):
        w, kl_nats = reparameterize_torch(mean, log_std, quantiles(), scale, None, seed, 0)
        q = torch.distributions.Normal(mean, log_std.exp())
        p = torch.distributions.Normal(0.0, scale.exp())
        totals.append(float((q.log_prob(w) - p.log_prob(w)).sum()))
    draws = torch.tensor(totals).double()
    # The table's variance is 3.3e-6 below 1, and only ½(v - 1)·eps² of each weight feels it.
    assert abs(draws.mean() - kl_nats) <= 5 * draws.std() / 8 + 0.5 * 4e-6 * 4096


def test_the_sum_of_many_small_kls_keeps_its_digits(device: torch.device) -> None:
    """1e-6 nats each: added one by one in float32, 2¹⁸ of them lose a ten-thousandth."""
    n = 2**18
    log_std, zero = torch.full((n,), 1e-3, device=device), torch.zeros((), device=device)
    u = 2 * log_std[0].cpu().double()
    for forward in FORWARDS:
        _, kl_nats = forward(torch.zeros_like(log_std), log_std, quantiles().to(device), zero, None, 0, 0)
        assert relative(kl_nats, n * (torch.expm1(u) - u) / 2) <= 1e-6
