"""The two parametrizations: the KL that they promise, and where they start."""

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from miracle_hub.training import posterior

BLOCK = 16


def normal(n: int, seed: int = 0) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed))


def mean_kl(weights: Tensor, bits_per_weight: float) -> posterior.MeanKL:
    return posterior.MeanKL(weights, torch.ones(1), BLOCK, BLOCK * bits_per_weight * math.log(2))


def block_kl(mean: Tensor, variance: Tensor) -> Tensor:
    """KL to the standard normal per block, by torch, in float64."""
    each = kl_divergence(Normal(mean.double(), variance.double().sqrt()), Normal(0.0, 1.0))
    return torch.nn.functional.pad(each, (0, -each.numel() % BLOCK)).view(-1, BLOCK).sum(1)


@pytest.mark.parametrize("spread", [0.0, 0.05, 0.2])
@pytest.mark.parametrize("bits_per_weight", [0.1, 1.0, 3.0])
def test_the_kl_of_every_block_is_the_budget_whatever_the_parameters_are(
    bits_per_weight: float, spread: float
) -> None:
    """At a rate of 20 the widest of them have shares of e^±12 and means at the very end of their reach."""
    own = mean_kl(normal(5 * BLOCK - 3), bits_per_weight)
    with torch.no_grad():
        own.tau.copy_(spread * normal(own.tau.numel(), 1))
        own.alpha.copy_(spread * normal(own.alpha.numel(), 2))
    mean, variance = own.moments(torch.zeros(1))
    assert mean.dtype == torch.float32 and float(variance.detach().min()) > 0
    budget = torch.full((5,), BLOCK * bits_per_weight * math.log(2))
    torch.testing.assert_close(own.kl_nats(torch.zeros(1)), budget)
    # Means and variances are rounded to float32.
    torch.testing.assert_close(block_kl(mean, variance).float(), budget, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bits_per_weight", [0.5, 1.0, 2.0])
def test_mean_kl_starts_as_the_gaussian_test_channel(bits_per_weight: float) -> None:
    """For weights of variance 1 and a scale of √(1 - D): means (1 - D)·w, and draws miss w by D = 2^(-2R)."""
    distortion = 4.0**-bits_per_weight
    weights, scale = normal(500 * BLOCK), torch.full((1,), math.sqrt(1 - distortion))
    own = posterior.MeanKL(weights, scale, BLOCK, BLOCK * bits_per_weight * math.log(2))
    mean = scale * own.moments(scale.log())[0]
    assert float(torch.corrcoef(torch.stack((mean, weights)))[0, 1]) > 0.99
    assert float((mean * weights).mean()) == pytest.approx(1 - distortion, rel=0.05)
    draw = own.draw(scale.log()[0], torch.tensor(5, dtype=torch.int64), 0).detach()
    # Reach is bounded by κ, which blocks share out as evenly as their weights let them: a little is lost.
    assert distortion * 0.97 < float((draw - weights).square().mean()) < distortion * 1.15


def test_mean_kl_gives_weights_of_a_block_the_shares_that_their_sizes_ask_for() -> None:
    weights = torch.tensor([0.0] * (BLOCK - 1) + [3.0])
    own = mean_kl(weights, 1.0)
    share = own.alpha.detach().mul(posterior.RATE).softmax(0)
    assert float(share[-1]) > 5 * float(share[0]) > 0
    mean, _ = own.moments(torch.zeros(1))
    assert not mean[:-1].any() and 0.5 < float(mean[-1]) < 3
    # At the lowest rates a value of no size would have as good as no share, which could hardly grow.
    share = mean_kl(weights, 0.005).alpha.detach().mul(posterior.RATE).softmax(0)
    assert float(share[-1]) < 4 * float(share[0])


def test_mean_var_starts_at_the_weights_with_little_noise() -> None:
    weights = normal(50)
    own = posterior.MeanVar(weights, torch.ones(1), BLOCK, 1.0)
    draw = own.draw(torch.zeros(()), torch.tensor(5, dtype=torch.int64), 0)
    assert float((draw - weights).detach().std()) == pytest.approx(math.exp(-10), rel=0.3)
    mean, variance = own.moments(torch.full((1,), 0.5))
    torch.testing.assert_close(mean, weights * math.exp(-0.5))
    torch.testing.assert_close(variance, torch.full((50,), math.exp(-21)))


def test_the_kl_of_mean_var_and_its_gradient_are_those_of_torch() -> None:
    own = posterior.MeanVar(0.3 * normal(3 * BLOCK - 5), torch.ones(1), BLOCK, 1.0)
    with torch.no_grad():
        own.log_std.copy_(-1 + normal(own.mean.numel(), 1))
    log_scales = (0.2 * normal(own.mean.numel(), 2)).requires_grad_()
    inputs = (own.mean, own.log_std, log_scales)
    doubles = [x.detach().double().requires_grad_() for x in inputs]
    each = kl_divergence(Normal(doubles[0], doubles[1].exp()), Normal(0.0, doubles[2].exp()))
    expected = torch.nn.functional.pad(each, (0, 5)).view(-1, BLOCK).sum(1)
    weights = torch.tensor([1.0, -2.0, 0.5])
    found = own.kl_nats(log_scales)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    for x, double in zip(inputs, doubles, strict=True):
        assert x.grad is not None and double.grad is not None
        torch.testing.assert_close(x.grad.double(), double.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rate", [0.01, 0.5, 4.0])
def test_the_share_of_the_test_channel_is_one_minus_shannons_bound(rate: float) -> None:
    assert posterior.test_channel_share(rate * math.log(2)) == pytest.approx(1 - 2 ** (-2 * rate))
