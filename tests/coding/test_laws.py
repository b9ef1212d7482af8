"""What coded samples must look like: uniform for q = p, else log q/p and moments of their law, and of q.

test_sampling.py compares whole distributions of tiny messages; here are the quantities that a user looks
at, at sizes of use. Statistics are chi-square; seeds are fixed, so verdicts never change between runs. The
control of each is an importance weight without the ½ of the prior's term, q/p², which it must reject.
"""

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import chi2, norm

from miracle_hub.code import Code
from miracle_hub.coding import reference
from miracle_hub.coding.encode import encode_states, encode_stream
from miracle_hub.coding.posterior import Cost, Posterior, Prior, importance_cost, kl_nats

# Thousands of tiny products are ten times slower while idle threads wait for work.
pytestmark = pytest.mark.usefixtures("one_torch_thread")

# A right encoder fails one case in ten thousand; a wrong one must be rejected far beyond chance.
FALSE_ALARM = 1e-4
REJECTED = 1e-9
SCALE = 0.3
weights_of = pytest.mark.parametrize("is_right", [True, False], ids=["q/p", "q/p²"])


def cost_of(posterior: Posterior, prior: Prior, is_right: bool) -> Cost:
    """exp(-cost/2) = q/p, or q/p²: log p(z) = -½z² counts once more."""
    cost = importance_cost(posterior, prior)
    return cost if is_right else replace(cost, quadratic=cost.quadratic - 1)


def verdict(statistic: float, degrees: int, is_right: bool) -> None:
    p = float(chi2.sf(statistic, degrees))
    assert p > FALSE_ALARM if is_right else p < REJECTED, p


def case(n: int, seed: int) -> tuple[Posterior, Prior]:
    """Posteriors of 0.4 to 0.8 of the prior's variance, within two scales of its mean."""
    generator = torch.Generator().manual_seed(seed)
    shift, variance = torch.rand(2, n, generator=generator)
    posterior = Posterior(SCALE * (4 * shift - 2), SCALE**2 * (0.4 + 0.4 * variance))
    return posterior, Prior(torch.tensor(0.0), torch.tensor(SCALE))


def log_ratio(posterior: Posterior, z: np.ndarray) -> np.ndarray:
    """log q/p of weights SCALE · z, by scipy's densities, over the last dimension."""
    spread = posterior.variance.double().sqrt().numpy()
    log_q = norm.logpdf(SCALE * z, posterior.mean.double().numpy(), spread)
    return (log_q - norm.logpdf(SCALE * z, 0.0, SCALE)).sum(-1)


@weights_of
@pytest.mark.parametrize(("code", "apart"), [(Code(8, 8, 4, 3), 1), (Code(8, 2, 1, 3), 4)], ids=str)
def test_with_posterior_equal_to_prior_every_index_of_a_long_stream_is_uniform(
    code: Code, apart: int, is_right: bool
) -> None:
    """Windows that share no bits are independent, so one message is a sample of all 256 indices."""
    n = 40 * 256 * apart * code.step_weights
    prior = Prior(torch.full((n,), 0.7), torch.tensor(SCALE))
    cost = cost_of(Posterior(prior.mean, (prior.scale**2).expand(n)), prior, is_right)
    states = encode_states(cost, code, "sample", torch.Generator().manual_seed(1))[::apart]
    counts = np.bincount(states, minlength=256)
    verdict(float(((counts - 40) ** 2 / 40).sum()), 255, is_right)


def features(posterior: Posterior, z: np.ndarray) -> np.ndarray:
    """log q/p, every weight and its square, and products of neighbors."""
    return np.concatenate((log_ratio(posterior, z)[:, None], z, z**2, z[:, 1:] * z[:, :-1]), axis=1)


def distance(drawn: np.ndarray, mean: np.ndarray, covariance: np.ndarray) -> float:
    """Squared distance of the mean of draws from what is expected, chi-square of as many degrees."""
    error = drawn.mean(0) - mean
    return float(len(drawn) * error @ np.linalg.solve(covariance, error))


@weights_of
def test_blocks_have_the_log_weight_and_the_moments_of_their_law(is_right: bool) -> None:
    """4,000 equal blocks are as many draws from 4,096 candidates, over which the law is summed exactly."""
    code, n_blocks = Code(12, 12, 6, seed=5), 4000
    posterior, prior = case(6, seed=2)
    z = reference.candidates(torch.arange(4096), code).double().numpy()
    law = np.exp(log_ratio(posterior, z))
    law /= law.sum()
    of_all = features(posterior, z)
    mean = law @ of_all
    covariance = (of_all - mean).T @ ((of_all - mean) * law[:, None])
    cost = cost_of(posterior, prior, is_right)
    repeated = Cost(cost.quadratic.repeat(n_blocks), cost.linear.repeat(n_blocks))
    states = encode_states(repeated, code, "sample", torch.Generator().manual_seed(3))
    verdict(distance(of_all[states], mean, covariance), mean.size, is_right)
    one = distance(of_all[states, :1], mean[:1], covariance[:1, :1])  # of log q/p alone
    verdict(one, 1, is_right)


@weights_of
@pytest.mark.parametrize(("code", "n"), [(Code(6, 2, 1, 4), 6), (Code(7, 3, 2, 4), 7)], ids=str)
def test_sliding_messages_have_the_log_weight_and_the_moments_of_their_law(
    every_message: Callable[..., np.ndarray], code: Code, n: int, is_right: bool
) -> None:
    """1,500 draws of one short stream; the law is summed over all its messages."""
    posterior, prior = case(n, seed=4)
    of_all = features(posterior, every_message(code, n))
    law = np.exp(of_all[:, 0])
    law /= law.sum()
    mean = law @ of_all
    covariance = (of_all - mean).T @ ((of_all - mean) * law[:, None])
    cost, generator = cost_of(posterior, prior, is_right), torch.Generator().manual_seed(5)
    bits, drawn = code.message_bits(n), []
    for _ in range(1500):
        message = encode_stream(cost, code, "sample", generator)
        drawn.append(int.from_bytes(message.numpy().tobytes(), "big") >> (8 * message.numel() - bits))
    verdict(distance(of_all[drawn], mean, covariance), mean.size, is_right)
    one = distance(of_all[drawn, :1], mean[:1], covariance[:1, :1])
    verdict(one, 1, is_right)


# Codes and streams whose messages have several bits more than KL(q‖p).
OVERSAMPLED = [(Code(13, 13, 5), 5), (Code(9, 3, 1), 8), (Code(9, 5, 2), 8)]


@weights_of
@pytest.mark.parametrize(("code", "n"), OVERSAMPLED, ids=str)
def test_oversampled_messages_are_draws_of_the_posterior_itself(code: Code, n: int, is_right: bool) -> None:
    """One draw from each of 500 codebooks: log q/p against the KL, and all moments up to the second."""
    posterior, prior = case(n, seed=6)
    kl = float(kl_nats(posterior, prior).sum())
    assert code.message_bits(n) > kl / math.log(2) + 6
    cost, generator = cost_of(posterior, prior, is_right), torch.Generator().manual_seed(7)
    drawn = []
    for seed in range(500):
        fresh = replace(code, seed=seed)
        message = encode_stream(cost, fresh, "sample", generator)
        drawn.append(reference.decode_stream(message, fresh, n).double().numpy())
    z = np.stack(drawn)
    # standardized by q: means 0, squares 1, and no correlation between any two weights
    u = (SCALE * z - posterior.mean.double().numpy()) / posterior.variance.double().sqrt().numpy()
    products = (u[:, :, None] * u[:, None, :])[:, *np.triu_indices(n, 1)]
    standard = np.concatenate((u, (u**2 - 1) / math.sqrt(2), products), axis=1)  # of variance 1 each
    verdict(float(500 * (standard.mean(0) ** 2).sum()), standard.shape[1], is_right)
    weights = log_ratio(posterior, z)
    verdict(float(500 * (weights.mean() - kl) ** 2 / weights.var()), 1, is_right)
