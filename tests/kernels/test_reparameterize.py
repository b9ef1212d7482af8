"""reparameterize: the drawn weight, its KL and every gradient equal float64 autograd of the plain formulas.

Errors are ‖found - expected‖ / ‖expected‖ per tensor, and below 1e-5.
"""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from miracle_hub.coding.philox import philox4x32
from miracle_hub.coding.quantiles import quantiles
from miracle_kernels import (
    KernelInputError,
    reparameterize,
    reparameterize_mean_kl,
    reparameterize_mean_kl_torch,
    reparameterize_torch,
)
from miracle_kernels._triton import tl, triton
from miracle_kernels.draws import noise as kernel_noise
from miracle_kernels.draws import noise_torch
from miracle_kernels.reparameterize import (
    reparameterize_backward,
    reparameterize_backward_torch,
    reparameterize_backward_triton,
    reparameterize_triton,
)
from miracle_kernels.reparameterize_mean_kl import (
    reparameterize_mean_kl_backward,
    reparameterize_mean_kl_backward_torch,
    reparameterize_mean_kl_backward_triton,
    reparameterize_mean_kl_triton,
)

FORWARDS = (reparameterize_triton, reparameterize_torch)
BACKWARDS = (reparameterize_backward_triton, reparameterize_backward_torch)
KL_FORWARDS = (reparameterize_mean_kl_triton, reparameterize_mean_kl_torch)
KL_BACKWARDS = (reparameterize_mean_kl_backward_triton, reparameterize_mean_kl_backward_torch)
SEED, STREAM_ID = 2**40 + 5, 9
SIZES = [1, 63, 1311]


def normal(n: int, seed: int) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed))


def noise(n: int, seed: int = SEED, stream_id: int = STREAM_ID, first_group: int = 0) -> Tensor:
    """By the definition: eps[e] = quantiles[half e % 8 of counter (e // 8, stream_id, 2)]."""
    groups = first_group + torch.arange(-(-n // 8))
    words = philox4x32((groups & 0xFFFFFFFF, groups >> 32, stream_id, 2), seed % 2**64)
    words = torch.stack(words, dim=1)
    halves = torch.stack((words & 0xFFFF, words >> 16), dim=2)
    return quantiles()[halves.flatten()[:n]]


def relative(found: Tensor, expected: Tensor) -> float:
    """‖found - expected‖ / ‖expected‖; 0 for two zeros."""
    expected = expected.detach()
    error = (found.cpu().double() - expected).norm()
    return float(error / expected.norm()) if error > 0 else 0.0


def plain_mean_var(
    mean: Tensor, log_std: Tensor, log_scale: Tensor, prior_mean: Tensor, eps: Tensor
) -> tuple[Tensor, Tensor]:
    m, log_v = (mean - prior_mean) / log_scale.exp(), 2 * (log_std - log_scale)
    return mean + log_std.exp() * eps, ((m**2 + torch.expm1(log_v) - log_v) / 2).sum()


def solved(excess: Tensor) -> Tensor:
    """log v ≤ 0 with v - log v - 1 = excess, by Newton; its derivative 1/(v - 1) through one last step."""
    with torch.no_grad():
        u = torch.where(excess < 1, -(2 * excess).sqrt(), -1 - excess)
        for _ in range(9):
            u = u - (torch.expm1(u) - u - excess) / torch.expm1(u)
    return u + (excess - excess.detach()) / torch.expm1(u)


def plain_mean_kl(
    tau: Tensor, alpha: Tensor, log_scale: Tensor, block_kl_nats: float, block_weights: int, eps: Tensor
) -> tuple[Tensor, Tensor]:
    """The weights less their prior mean, and KL(q‖p) of each."""
    kappa = torch.cat([block_kl_nats * block.softmax(0) for block in alpha.split(block_weights)])
    m, u = (2 * kappa).sqrt() * tau.tanh(), solved(2 * kappa / tau.cosh() ** 2)
    return log_scale.exp() * (m + (u / 2).exp() * eps), (m**2 + torch.expm1(u) - u) / 2


def block_noise(n: int, block_weights: int) -> Tensor:
    """Blocks start at multiples of the next power of two."""
    width, blocks = 1 << (block_weights - 1).bit_length(), -(-n // block_weights)
    return noise(blocks * width).view(blocks, width)[:, :block_weights].flatten()[:n]


def gradients(outputs: list[tuple[Tensor, Tensor]], inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(sum((out * grad).sum() for out, grad in outputs), inputs)  # pyright: ignore


def parameters64(one: Tensor, two: Tensor, log_scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    wide = one.cpu().double(), two.cpu().double(), log_scale.cpu().double()
    return wide[0].requires_grad_(), wide[1].requires_grad_(), wide[2].requires_grad_()


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
        _noise_kernel[(1,)](out, table, first_group, seed, stream_id, 64)  # pyright: ignore[reportArgumentType]
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_w_may_have_sixteen_bits_and_so_may_its_gradient(device: torch.device, dtype: torch.dtype) -> None:
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
        assert w.dtype == dtype and torch.equal(w, wide.to(dtype)) and torch.equal(kl_nats, same)
        found = backward(grad, scale, *arguments)
        assert all(map(torch.equal, found, backward(grad.float(), scale, *arguments)))
    rest = (5.0, 8, SEED, STREAM_ID)
    for forward, backward in zip(KL_FORWARDS, KL_BACKWARDS, strict=True):
        w = forward(mean, log_std, table, scale, None, *rest, dtype)
        assert w.dtype == dtype
        assert torch.equal(w, forward(mean, log_std, table, scale, None, *rest).to(dtype))
        found = backward(grad, mean, log_std, table, scale, *rest)
        assert all(map(torch.equal, found, backward(grad.float(), mean, log_std, table, scale, *rest)))


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


def mean_var_loss(mean: Tensor, log_std: Tensor, scale: Tensor, table: Tensor, seed: int) -> Tensor:
    w, kl_nats = reparameterize(mean, log_std, table, scale, None, seed, STREAM_ID)
    return (w.sin().sum() + 0.1 * kl_nats) * 2


def mean_kl_loss(tau: Tensor, alpha: Tensor, scale: Tensor, table: Tensor, seed: int) -> Tensor:
    return reparameterize_mean_kl(tau, alpha, table, scale, None, 9.0, 20, seed, STREAM_ID).sin().sum() * 2


def inputs32(device: torch.device, n: int) -> tuple[Tensor, Tensor, Tensor]:
    one, two, log_scale = normal(n, 0).to(device), normal(n, 1).to(device) - 1, torch.tensor(-0.5).to(device)
    return one.requires_grad_(), two.requires_grad_(), log_scale.requires_grad_()


@pytest.mark.parametrize("loss", [mean_var_loss, mean_kl_loss])
def test_autograd_through_the_op_equals_float64(device: torch.device, loss: Callable) -> None:
    inputs, n = inputs32(device, 63), 63
    value = loss(*inputs, quantiles().to(device), SEED)
    found = torch.autograd.grad(value, inputs)
    wide = parameters64(inputs[0].detach(), inputs[1].detach(), inputs[2].detach())
    if loss is mean_var_loss:
        w, kl_nats = plain_mean_var(*wide, torch.zeros(n).double(), noise(n).double())
        expected = (w.sin().sum() + 0.1 * kl_nats) * 2
    else:
        expected = plain_mean_kl(*wide, 9.0, 20, block_noise(n, 20).double())[0].sin().sum() * 2
    assert relative(value.detach(), expected.detach()) <= 1e-5
    for one, two in zip(found, torch.autograd.grad(expected, wide), strict=True):
        assert relative(one, two) <= 1e-5


@pytest.mark.parametrize("loss", [mean_var_loss, mean_kl_loss])
def test_torch_compile_gives_the_same_for_every_seed(device: torch.device, loss: Callable) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    inputs, table = inputs32(device, 63), quantiles().to(device)
    for seed in (3, 4, 2**40, -5):
        one, two = compiled(*inputs, table, seed), loss(*inputs, table, seed)
        assert torch.equal(one, two)
        assert all(map(torch.equal, torch.autograd.grad(one, inputs), torch.autograd.grad(two, inputs)))


def test_the_ops_are_sound_torch_ops(device: torch.device) -> None:
    one, two, scale = inputs32(device, 63)
    table, prior_mean = quantiles().to(device), normal(63, 5).to(device)
    constants = (one.detach(), two.detach(), table, scale.detach())
    grad, number = normal(63, 6).to(device), torch.tensor(0.5, device=device)
    torch.library.opcheck(reparameterize, (one, two, table, scale, prior_mean, 5, 9, torch.bfloat16))
    torch.library.opcheck(reparameterize, (one, two, table, scale, None, 5, 9))
    torch.library.opcheck(reparameterize_backward, (grad, number, *constants, None, 5, 9))
    torch.library.opcheck(reparameterize_mean_kl, (one, two, table, scale, prior_mean, 9.0, 8, 5, 9))
    torch.library.opcheck(reparameterize_mean_kl_backward, (grad, *constants, 9.0, 8, 5, 9))


@pytest.mark.parametrize("loss", [mean_var_loss, mean_kl_loss])
def test_nothing_is_saved_but_what_the_caller_holds(device: torch.device, loss: Callable) -> None:
    inputs, table = inputs32(device, 1311), quantiles().to(device)
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        value = loss(*inputs, table, SEED)
    held = {tensor.data_ptr() for tensor in (*inputs, table)}
    extra = [tensor for tensor in saved if tensor.data_ptr() not in held]
    assert len(saved) - len(extra) == 4
    assert len(extra) == 1 and extra[0].numel() == 1311  # the argument of sin, w itself
    value.backward()


class Allocations(TorchDispatchMode):
    """Sizes of the tensors that torch.empty and its kin make."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if "empty" in func.__name__:
            self.sizes.append(result.numel())
        return result


def test_launches_allocate_w_and_then_the_gradients_only(device: torch.device) -> None:
    n = 5000
    one, two, scale = (tensor.detach() for tensor in inputs32(device, n))
    table, grad, rest = quantiles().to(device), torch.ones(n, device=device), (SEED, STREAM_ID)
    calls = [
        (lambda: reparameterize_triton(one, two, table, scale, None, *rest), 1),
        (lambda: reparameterize_backward_triton(grad, scale, one, two, table, scale, None, *rest), 2),
        (lambda: reparameterize_mean_kl_triton(one, two, table, scale, None, 9.0, 8, *rest), 1),
        (lambda: reparameterize_mean_kl_backward_triton(grad, one, two, table, scale, 9.0, 8, *rest), 2),
    ]
    for call, expected in calls:
        with Allocations() as allocations:
            call()
        large = [size for size in allocations.sizes if size > n // 100]
        assert large == [n] * expected


def test_gradients_that_no_one_wrote_out_are_taken(device: torch.device) -> None:
    """w.sum() sends back one number with strides of 0, and a KL of no use sends back nothing."""
    inputs, table = inputs32(device, 63), quantiles().to(device)
    w, _ = reparameterize(*inputs[:2], table, inputs[2], None, 0, 0)
    w.sum().backward()
    assert inputs[0].grad is not None and inputs[2].grad is not None
    assert torch.equal(inputs[0].grad, torch.ones(63, device=device))
    assert inputs[2].grad == 0


@pytest.mark.parametrize("op", [reparameterize, reparameterize_mean_kl])
def test_a_prior_mean_is_a_constant(op: Callable) -> None:
    tensors = (torch.zeros(8), torch.zeros(8), quantiles(), torch.tensor(0.0))
    rest = (0, 0) if op is reparameterize else (1.0, 8, 0, 0)
    with pytest.raises(KernelInputError, match="prior_mean: expected a constant, found a tensor that"):
        op(*tensors, torch.zeros(8, requires_grad=True), *rest)


BAD = [
    (dict(first=torch.zeros(8).double()), "(mean|tau): expected float32, found torch.float64"),
    (dict(second=torch.zeros(8).half()), "(log_std|alpha): expected float32, found torch.float16"),
    (dict(second=torch.zeros(7)), r"(log_std|alpha): expected shape \(8,\) like (mean|tau), found \(7,\)"),
    (dict(second=torch.zeros(2, 4)), r"expected shape \(8,\) like (mean|tau), found \(2, 4\)"),
    (dict(first=torch.zeros(16)[::2]), r"(mean|tau): expected a contiguous tensor, found strides \(2,\)"),
    (dict(second=torch.zeros(8, device="meta")), "expected all tensors on cpu, found meta"),
    (dict(quantiles=torch.zeros(65536)), "quantiles: expected float16, found torch.float32"),
    (dict(quantiles=torch.zeros(100).half()), "quantiles: expected 65536 entries, found 100"),
    (dict(prior_log_scale=torch.zeros(1)), "prior_log_scale: expected 0 dimensions, found 1"),
    (dict(prior_log_scale=torch.tensor(0)), "prior_log_scale: expected float32, found torch.int64"),
    (dict(prior_mean=torch.zeros(8).double()), "prior_mean: expected float32 or bfloat16 or float16, found"),
    (dict(prior_mean=torch.zeros(8, 1)), r"prior_mean: expected shape \(8,\) like .*, found \(8, 1\)"),
    (dict(seed=2**63), "seed: expected an integer from -9223372036854775808"),
    (dict(stream_id=2**32), "stream_id: expected an integer from 0 to 4294967295, found 4294967296"),
    (dict(dtype=torch.float64), "dtype: expected float32, bfloat16 or float16, found torch.float64"),
]  # fmt: skip
BAD_BLOCKS = [
    (dict(block_weights=0), "block_weights: expected an integer from 1 to 1024, found 0"),
    (dict(block_weights=1025), "block_weights: expected an integer from 1 to 1024, found 1025"),
    (dict(block_kl_nats=0.0), "block_kl_nats: expected a finite number of nats above 0, found 0.0"),
    (dict(block_kl_nats=math.inf), "block_kl_nats: expected a finite number of nats above 0, found inf"),
    (dict(block_kl_nats=math.nan), "block_kl_nats: expected a finite number of nats above 0, found nan"),
]


def good() -> dict[str, Any]:
    tensors: dict[str, Any] = dict(first=torch.zeros(8), second=torch.zeros(8), quantiles=quantiles())
    return tensors | dict(prior_log_scale=torch.tensor(0.0), prior_mean=None, seed=0, stream_id=0)


@pytest.mark.parametrize(("change", "message"), BAD)
def test_bad_input_of_mean_var_is_named(change: dict, message: str) -> None:
    arguments: dict[str, Any] = good() | change
    mean, log_std = arguments.pop("first"), arguments.pop("second")
    for function in FORWARDS:
        with pytest.raises(KernelInputError, match=f"reparameterize: .*{message}"):
            function(mean=mean, log_std=log_std, **arguments)


@pytest.mark.parametrize(("change", "message"), BAD + BAD_BLOCKS)
def test_bad_input_of_mean_kl_is_named(change: dict, message: str) -> None:
    arguments: dict[str, Any] = good() | dict(block_kl_nats=1.0, block_weights=4) | change
    tau, alpha = arguments.pop("first"), arguments.pop("second")
    for function in KL_FORWARDS:
        with pytest.raises(KernelInputError, match=f"reparameterize_mean_kl: .*{message}"):
            function(tau=tau, alpha=alpha, **arguments)


def test_a_bad_gradient_is_named() -> None:
    ok, table, scale = torch.zeros(8), quantiles(), torch.tensor(0.0)
    for backward in BACKWARDS:
        with pytest.raises(KernelInputError, match=r"grad_w: expected shape \(8,\) like mean, found \(7,\)"):
            backward(torch.zeros(7), scale, ok, ok, table, scale, None, 0, 0)
        with pytest.raises(KernelInputError, match="grad_kl_nats: expected 0 dimensions, found 1"):
            backward(ok, ok, ok, ok, table, scale, None, 0, 0)
    for backward in KL_BACKWARDS:
        with pytest.raises(KernelInputError, match="grad_w: expected float32 or bfloat16 or float16, found"):
            backward(ok.long(), ok, ok, table, scale, 1.0, 4, 0, 0)
        with pytest.raises(KernelInputError, match="block_weights: expected an integer from 1 to 1024"):
            backward(ok, ok, ok, table, scale, 1.0, 2000, 0, 0)
