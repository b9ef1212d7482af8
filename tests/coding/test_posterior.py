"""Posterior, prior and the cost that follows, against the densities of torch.distributions."""

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from miracle_hub.coding.posterior import Posterior, Prior, importance_cost, kl_nats, squared_error_cost
from miracle_hub.errors import OptionError

N = 40


def random_case(seed: int) -> tuple[Posterior, Prior]:
    """Posteriors both narrower and wider than their priors."""
    generator = torch.Generator().manual_seed(seed)
    mean, prior_mean, log_std, log_scale = torch.randn(4, N, generator=generator)
    return Posterior(mean, (0.7 * log_std).exp() ** 2), Prior(prior_mean, (0.5 * log_scale).exp())


def densities(posterior: Posterior, prior: Prior) -> tuple[Normal, Normal]:
    """The same two Gaussians in float64."""
    prior_mean, scale = (value.double().expand(N) for value in (prior.mean, prior.scale))
    return Normal(posterior.mean.double(), posterior.variance.double().sqrt()), Normal(prior_mean, scale)


def log_ratio_minus_cost(posterior: Posterior, prior: Prior) -> torch.Tensor:
    """Per draw and weight: log q/p by torch.distributions, less what the cost says."""
    q, p = densities(posterior, prior)
    cost = importance_cost(posterior, prior)
    z = torch.linspace(-4, 4, 33).double()[:, None].expand(33, N)
    weights = p.loc + p.scale * z
    by_cost = -0.5 * (cost.quadratic.double() * z**2 - cost.linear.double() * z)
    return q.log_prob(weights) - p.log_prob(weights) - by_cost


@pytest.mark.parametrize("seed", range(3))
def test_importance_cost_is_the_log_density_ratio_up_to_a_constant_per_weight(seed: int) -> None:
    posterior, prior = random_case(seed)
    quadratic = importance_cost(posterior, prior).quadratic
    assert bool((quadratic < 0).any()) and bool((quadratic > 0).any())
    difference = log_ratio_minus_cost(posterior, prior)
    # float32 coefficients up to about 100, times z² up to 16
    assert torch.allclose(difference, difference[:1].expand(33, N), rtol=0, atol=1e-3)
    # the constant depends on the weight, so the test above is not one of zeros
    assert float(difference[0].std()) > 0.1


@pytest.mark.parametrize(("mean_shape", "scale_shape"), [((), ()), ((N,), ()), ((), (N,)), ((1,), (N,))])
def test_one_prior_for_all_weights_equals_the_same_prior_for_each(
    mean_shape: tuple[int, ...], scale_shape: tuple[int, ...]
) -> None:
    posterior, _ = random_case(1)
    one = Prior(torch.full(mean_shape, 0.3), torch.full(scale_shape, 1.7))
    each = Prior(torch.full((N,), 0.3), torch.full((N,), 1.7))
    assert torch.equal(importance_cost(posterior, one).quadratic, importance_cost(posterior, each).quadratic)
    assert torch.equal(importance_cost(posterior, one).linear, importance_cost(posterior, each).linear)
    assert torch.equal(kl_nats(posterior, one), kl_nats(posterior, each))
    assert importance_cost(posterior, one).linear.shape == (N,)


def test_log_importance_weights_of_a_stream_are_the_sum_over_its_weights() -> None:
    posterior, prior = random_case(2)
    q, p = densities(posterior, prior)
    z = torch.randn(6, N, generator=torch.Generator().manual_seed(7))
    weights = p.loc + p.scale * z.double()
    exact = (q.log_prob(weights) - p.log_prob(weights)).sum(-1)
    found = importance_cost(posterior, prior).log_importance_weights(z)
    assert found.shape == (6,)
    assert torch.allclose(found.double() - found[0], exact - exact[0], rtol=1e-5, atol=1e-3)
    assert float((exact - exact[0]).abs().max()) > 10


@pytest.mark.parametrize("spread", [1e-2, 1e-4])
def test_squared_error_is_the_limit_of_small_equal_variances(spread: float) -> None:
    # cost · v = (1 - v) z² - 2 m z, which is z² - 2 m z up to v z².
    _, prior = random_case(3)
    weights = torch.randn(N, generator=torch.Generator().manual_seed(8))
    limit = squared_error_cost((weights - prior.mean) / prior.scale)
    posterior = Posterior(weights, spread * prior.scale**2)
    cost = importance_cost(posterior, prior)
    assert torch.allclose(cost.quadratic * spread, limit.quadratic, rtol=0, atol=1.01 * spread)
    assert torch.allclose(cost.linear * spread, limit.linear, rtol=1e-5, atol=0)


def test_squared_error_cost_is_the_squared_distance_up_to_a_constant() -> None:
    m, z = torch.randn(2, N, generator=torch.Generator().manual_seed(9))
    cost = squared_error_cost(m)
    assert cost.quadratic.shape == cost.linear.shape == (N,)
    by_cost = cost.quadratic * z**2 - cost.linear * z
    assert torch.allclose(by_cost, (z - m) ** 2 - m**2, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_kl_nats_is_the_divergence_of_torch_distributions(seed: int) -> None:
    posterior, prior = random_case(seed)
    expected = kl_divergence(*densities(posterior, prior))
    assert torch.allclose(kl_nats(posterior, prior).double(), expected, rtol=1e-5, atol=1e-6)
    # a divergence of exchanged arguments, or in bits, is another number
    assert not torch.allclose(kl_divergence(*densities(posterior, prior)[::-1]), expected, rtol=1e-2)


def test_a_posterior_equal_to_its_prior_costs_nothing() -> None:
    prior = Prior(torch.tensor(0.25), torch.tensor(0.5))
    posterior = Posterior(torch.full((3,), 0.25), torch.full((3,), 0.25))
    cost = importance_cost(posterior, prior)
    assert torch.equal(cost.quadratic, torch.zeros(3)) and torch.equal(cost.linear, torch.zeros(3))
    assert torch.equal(kl_nats(posterior, prior), torch.zeros(3))


@pytest.mark.parametrize("value", [0.0, -0.5, float("nan")])
def test_a_variance_that_is_not_positive_is_refused(value: float) -> None:
    posterior = Posterior(torch.zeros(3), torch.tensor([1.0, value, 2.0]))
    with pytest.raises(OptionError) as caught:
        importance_cost(posterior, Prior(torch.tensor(0.0), torch.tensor(1.0)))
    assert str(caught.value) == (
        f"variance: expected positive values, found {value}; "
        "use squared_error_cost for a posterior without spread"
    )


@pytest.mark.parametrize("value", [0.0, -0.5])
def test_a_prior_scale_that_is_not_positive_is_refused(value: float) -> None:
    posterior = Posterior(torch.zeros(3), torch.ones(3))
    with pytest.raises(OptionError) as caught:
        importance_cost(posterior, Prior(torch.zeros(3), torch.tensor([1.0, 1.0, value])))
    assert str(caught.value).startswith(f"prior scale: expected positive values, found {value};")
