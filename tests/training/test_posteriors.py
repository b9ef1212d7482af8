"""The kinds of posteriors: the KL that they promise, and where they start."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from miracle_hub.coding.scales import carried_share
from miracle_hub.coding.sharing import Sharing
from miracle_hub.training.blocks import Budget
from miracle_hub.training.config import PARAMETRIZATIONS
from miracle_hub.training.layout import Matrix, Member
from miracle_hub.training.posteriors.mean_kl import MeanKL
from miracle_hub.training.posteriors.mean_var import MeanVar
from miracle_hub.training.posteriors.protocol import Start, Weighted
from miracle_hub.training.posteriors.registry import POSTERIORS
from miracle_hub.training.posteriors.scaled import RATE, scales_of

BLOCK = 16


def normal(n: int, seed: int = 0) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed))


def started(weights: Tensor, kl_nats: float, scale: float = 1.0) -> Start:
    """A vector in blocks that have so much KL each, under a prior of one scale."""
    n = weights.numel()
    layout = Matrix(Member("w", (n,), torch.float32, Sharing("none", n, n)), False)
    return Start(weights, torch.full((1,), scale), layout, Budget(BLOCK, kl_nats), 1e-8, 5e-5)


def mean_kl(weights: Tensor, rate: float, scale: float = 1.0) -> MeanKL:
    return MeanKL(started(weights, BLOCK * rate * math.log(2), scale))


def block_kl(mean: Tensor, variance: Tensor) -> Tensor:
    """KL to the standard normal per block, by torch, in float64."""
    each = kl_divergence(Normal(mean.double(), variance.double().sqrt()), Normal(0.0, 1.0))
    return torch.nn.functional.pad(each, (0, -each.numel() % BLOCK)).view(-1, BLOCK).sum(1)


@pytest.mark.parametrize("spread", [0.0, 0.05, 0.2])
@pytest.mark.parametrize("rate", [0.1, 1.0, 3.0])
def test_the_kl_of_every_block_is_the_budget_whatever_the_parameters_are(rate: float, spread: float) -> None:
    """At a rate of 20 the widest of them have shares of e^±12 and means at the very end of their reach."""
    own = mean_kl(normal(5 * BLOCK - 3), rate)
    with torch.no_grad():
        own.tau.copy_(spread * normal(own.tau.numel(), 1))
        own.alpha.copy_(spread * normal(own.alpha.numel(), 2))
    mean, variance = own.moments()
    assert mean.dtype == torch.float32 and float(variance.detach().min()) > 0
    budget = torch.full((5,), BLOCK * rate * math.log(2))
    torch.testing.assert_close(own.kl_nats(), budget)
    # Means and variances are rounded to float32.
    torch.testing.assert_close(block_kl(mean, variance).float(), budget, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rate", [0.5, 1.0, 2.0])
def test_mean_kl_starts_as_the_gaussian_test_channel(rate: float) -> None:
    """For weights of variance 1 and a scale of √(1 - D): means (1 - D)·w, and draws miss w by D = 2^(-2R)."""
    distortion = 4.0**-rate
    weights = normal(500 * BLOCK)
    own = mean_kl(weights, rate, math.sqrt(1 - distortion))
    mean = own.mean()
    assert float(torch.corrcoef(torch.stack((mean, weights)))[0, 1]) > 0.99
    assert float((mean * weights).mean()) == pytest.approx(1 - distortion, rel=0.05)
    draw = own.draw(torch.tensor(5, dtype=torch.int64), 0).detach()
    # Reach is bounded by κ, which blocks share out as evenly as their weights let them: a little is lost.
    assert distortion * 0.97 < float((draw - weights).square().mean()) < distortion * 1.15


def test_mean_kl_gives_weights_of_a_block_the_shares_that_their_sizes_ask_for() -> None:
    weights = torch.tensor([0.0] * (BLOCK - 1) + [3.0])
    own = mean_kl(weights, 1.0)
    share = own.alpha.detach().mul(RATE).softmax(0)
    assert float(share[-1]) > 5 * float(share[0]) > 0
    mean, _ = own.moments()
    assert not mean[:-1].any() and 0.5 < float(mean[-1]) < 3
    # At the lowest rates a value of no size would have as good as no share, which could hardly grow.
    share = mean_kl(weights, 0.005).alpha.detach().mul(RATE).softmax(0)
    assert float(share[-1]) < 4 * float(share[0])


def test_mean_var_starts_at_the_weights_with_little_noise() -> None:
    weights = normal(50)
    own = MeanVar(started(weights, 1.0, math.exp(0.5)))
    draw = own.draw(torch.tensor(5, dtype=torch.int64), 0)
    assert float((draw - weights).detach().std()) == pytest.approx(math.exp(-10), rel=0.3)
    mean, variance = own.moments()
    torch.testing.assert_close(mean, weights * math.exp(-0.5))
    torch.testing.assert_close(variance, torch.full((50,), math.exp(-21)))


def test_the_kl_of_mean_var_and_its_gradient_are_those_of_torch() -> None:
    own = MeanVar(started(0.3 * normal(3 * BLOCK - 5), 1.0, 0.8))
    with torch.no_grad():
        own.log_std.copy_(-1 + normal(own.mean_values.numel(), 1))
    inputs = (own.mean_values, own.log_std, own.log_scales)
    doubles = [x.detach().double().requires_grad_() for x in inputs]
    each = kl_divergence(Normal(doubles[0], doubles[1].exp()), Normal(0.0, (RATE * doubles[2]).exp()))
    expected = torch.nn.functional.pad(each, (0, 5)).view(-1, BLOCK).sum(1)
    weights = torch.tensor([1.0, -2.0, 0.5])
    found = own.kl_nats()
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    for x, double in zip(inputs, doubles, strict=True):
        assert x.grad is not None and double.grad is not None
        torch.testing.assert_close(x.grad.double(), double.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rate", [0.01, 0.5, 4.0])
def test_the_share_of_the_test_channel_is_one_minus_shannons_bound(rate: float) -> None:
    assert carried_share(rate * math.log(2)) == pytest.approx(1 - 2 ** (-2 * rate))


def test_every_parametrization_has_its_class() -> None:
    assert list(POSTERIORS) == list(PARAMETRIZATIONS)


@pytest.mark.parametrize("kind", POSTERIORS)
def test_every_kind_answers_what_a_stream_asks_before_and_after_scales_are_fixed(kind: str) -> None:
    weights, seed = 0.1 * normal(3 * BLOCK - 5), torch.tensor(5, dtype=torch.int64)
    own: Any = POSTERIORS[kind](started(weights, BLOCK * math.log(2), 0.07))
    for _ in range(2):
        mean, variance = own.moments()
        for values in (own.draw(seed, 0).detach(), own.sample(seed, 0), own.mean(), mean, variance):
            assert values.shape == weights.shape and values.dtype == torch.float32
            assert bool(values.isfinite().all()) and not values.requires_grad
        assert torch.equal(own.draw(seed, 0), own.mean()) != own.has_noise
        assert own.kl_nats().shape == (3,) and own.scales().shape == own.value_scales().shape == (1,)
        assert own.penalty() is None or own.penalty().shape == (3,)
        own.after_step()
        own.fix_scales()
        assert torch.equal(own.scales(), own.scales().bfloat16().float())
    fixed = own.scales().clone()
    with torch.no_grad():
        for parameter in own.parameters():
            parameter.mul_(2)
    assert torch.equal(own.scales(), fixed)


def test_only_the_test_channel_takes_curvature_and_less_noise_where_errors_cost_more() -> None:
    made: dict[str, Any] = {kind: make(started(normal(BLOCK), 1.0)) for kind, make in POSTERIORS.items()}
    assert [kind for kind, own in made.items() if isinstance(own, Weighted)] == ["test-channel"]
    own = made["test-channel"]
    own.curvature = torch.tensor([0.5, 1.5])
    dear, cheap = own.moments()[1].view(-1, 2)[:, 1], own.moments()[1].view(-1, 2)[:, 0]
    assert bool((dear < cheap).all())


def test_a_prior_of_zeros_has_the_scale_that_is_asked_for() -> None:
    weights = torch.cat((torch.zeros(128), normal(128)))
    layout = Matrix(Member("w", (64, 128), torch.float32, Sharing("none", 8192, 8192)), True)
    values = torch.cat((weights, torch.ones(8192 - 256)))
    scales = scales_of(values, layout, 0.75, 0.01)
    assert float(scales[0]) == pytest.approx(0.01) and scales.shape == (64,)
    torch.testing.assert_close(scales[2:], torch.full((62,), math.sqrt(0.75)))
