"""The law of selection "sample": messages are drawn in proportion to their importance weight q/p.

Every verdict is a chi-square test whose false-alarm rate is stated; seeds are fixed, so a verdict never
changes between runs. Controls show that a wrong factor in the exponent is rejected by the same test.
"""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.stats import chi2, norm

from miracle_hub.code import Code
from miracle_hub.coding import block, reference, sliding
from miracle_hub.coding.encode import encode_stream
from miracle_hub.coding.posterior import Cost, Posterior, Prior, importance_cost
from tests.chi_square import p_value

# Thousands of tiny products are ten times slower while idle threads wait for work.
pytestmark = pytest.mark.usefixtures("one_torch_thread")

# A right encoder fails one case in ten thousand; a wrong one must be rejected far beyond chance.
FALSE_ALARM = 1e-4
REJECTED = 1e-9
# (L, k, V, n): sliding windows, then blocks; n is not always a multiple of V.
TINY = [(3, 1, 1, 5), (4, 2, 2, 5), (5, 2, 9, 12), (3, 3, 2, 4), (4, 4, 3, 5), (6, 6, 4, 4)]
tiny_codes = pytest.mark.parametrize(("L", "k", "V", "n"), TINY)


def random_case(n: int, seed: int) -> tuple[Posterior, Prior]:
    """Posteriors up to 1.5 times narrower or wider than the prior, and off its mean."""
    generator = torch.Generator().manual_seed(seed)
    shift, log_ratio, prior_mean = torch.rand(3, n, generator=generator) * 2 - 1
    scale = torch.tensor(0.3)
    return Posterior(prior_mean + 0.7 * scale * shift, (scale * 1.5**log_ratio) ** 2), Prior(
        prior_mean, scale
    )


def probabilities(posterior: Posterior, prior: Prior, z: np.ndarray) -> np.ndarray:
    """q(w)/p(w) of every message's weights w = mean + scale · z, as a distribution; by scipy's densities."""
    mean, scale = prior.mean.double().numpy(), float(prior.scale)
    weights = mean + scale * z
    spread = posterior.variance.double().sqrt().numpy()
    log_q = norm.logpdf(weights, posterior.mean.double().numpy(), spread)
    log_ratio = (log_q - norm.logpdf(weights, mean, scale)).sum(-1)
    ratio = np.exp(log_ratio - log_ratio.max())
    return ratio / ratio.sum()


def draw_messages(cost: Cost, code: Code, n_draws: int, seed: int) -> np.ndarray:
    """How often each message was drawn, by number; the draws share one generator."""
    generator = torch.Generator().manual_seed(seed)
    bits = code.message_bits(cost.linear.numel())
    counts = np.zeros(2**bits)
    for _ in range(n_draws):
        message = encode_stream(cost, code, "sample", generator)
        counts[int.from_bytes(message.numpy().tobytes(), "big") >> (8 * message.numel() - bits)] += 1
    return counts


def scaled(cost: Cost, factor: float) -> Cost:
    return Cost(factor * cost.quadratic, factor * cost.linear)


@tiny_codes
@pytest.mark.parametrize(("factor", "right"), [(1.0, True), (2.0, False), (0.5, False)])
def test_messages_are_drawn_in_proportion_to_their_importance_weight(
    every_message: Callable[..., np.ndarray], L: int, k: int, V: int, n: int, factor: float, right: bool
) -> None:
    # Factor 2 is what an encoder would draw that forgot the ½ in log q/p, or in exp(-cost/2).
    code = Code(L, k, V, seed=2**35 + n, stream_id=L)
    posterior, prior = random_case(n, seed=L)
    law = probabilities(posterior, prior, every_message(code, n))
    n_draws = 4000
    counts = draw_messages(scaled(importance_cost(posterior, prior), factor), code, n_draws, seed=n)
    p = p_value(counts, n_draws * law, 5)
    assert p > FALSE_ALARM if right else p < REJECTED


@tiny_codes
def test_with_posterior_equal_to_prior_every_message_is_equally_likely(
    L: int, k: int, V: int, n: int
) -> None:
    code = Code(L, k, V, seed=3)
    prior = Prior(torch.full((n,), 0.7), torch.tensor(0.3))
    cost = importance_cost(Posterior(prior.mean, (prior.scale**2).expand(n)), prior)
    n_messages = 2 ** code.message_bits(n)
    counts = draw_messages(cost, code, 16 * n_messages, seed=5)
    statistic = ((counts - 16) ** 2 / 16).sum()
    assert chi2.sf(statistic, n_messages - 1) > FALSE_ALARM
    assert counts.min() > 0  # a missed message has probability 2^bits · e^-16 < 3e-5


@pytest.mark.parametrize("tile_candidates", [1, 3, 7])
def test_the_law_of_blocks_does_not_depend_on_tiles(
    every_message: Callable[..., np.ndarray], tile_candidates: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, n, n_draws = Code(4, 4, 3), 5, 4000
    posterior, prior = random_case(n, seed=9)
    monkeypatch.setattr(block, "_TILE_CANDIDATES", tile_candidates)
    monkeypatch.setattr(block, "_TILE_BLOCKS", 1)
    counts = draw_messages(importance_cost(posterior, prior), code, n_draws, seed=tile_candidates)
    expected = n_draws * probabilities(posterior, prior, every_message(code, n))
    assert p_value(counts, expected, 5) > FALSE_ALARM


def state_marginals(posterior: Posterior, prior: Prior, code: Code) -> np.ndarray:
    """Exact probability of every state at every step, [steps, states], by forward-backward sums."""
    n, nodes, branches = posterior.mean.numel(), 2**code.overlap_bits, 2**code.step_bits
    z = reference.candidates(torch.arange(2**code.window_bits), code).double().numpy()
    assert code.step_weights == 1
    weights = prior.mean.double().numpy() + float(prior.scale) * z  # [states, n]
    q = norm.pdf(weights, posterior.mean.numpy(), posterior.variance.sqrt().numpy())
    ratio = (q / norm.pdf(weights, prior.mean.numpy(), float(prior.scale))).T
    forward, backward = np.ones((n + 1, nodes)), np.ones((n + 1, nodes))
    for t in range(n):  # state = choice · nodes + next node = node · branches + new bits
        into = (np.repeat(forward[t], branches) * ratio[t]).reshape(branches, nodes).sum(0)
        forward[t + 1] = into / into.sum()
    for t in range(n - 1, -1, -1):
        out = (np.tile(backward[t + 1], branches) * ratio[t]).reshape(nodes, branches).sum(1)
        backward[t] = out / out.sum()
    marginals = np.stack(
        [np.repeat(forward[t], branches) * ratio[t] * np.tile(backward[t + 1], branches) for t in range(n)]
    )
    return marginals / marginals.sum(1, keepdims=True)


def p_values_by_step(counts: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Of one chi-square test per step; states expected fewer than 20 times join the likeliest state."""
    rare, steps = expected < 20, np.arange(len(expected))
    likeliest = expected.argmax(1)
    pooled = []
    for cells in (counts, expected):
        kept = np.where(rare, 0.0, cells)
        kept[steps, likeliest] += np.where(rare, cells, 0.0).sum(1)
        pooled.append(kept)
    assert (rare.sum(1) < 5).all()
    statistic = ((pooled[0] - pooled[1]) ** 2 / np.where(rare, 1.0, pooled[1])).sum(1)
    return chi2.sf(statistic, 7 - rare.sum(1))


@pytest.mark.parametrize(("merge_windows", "right"), [(8, True), (0, False)])
def test_joined_pieces_draw_every_window_from_the_exact_law(
    merge_windows: int, right: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # 32 pieces: all 16 lanes in both passes. Without margins (the control) even pieces know nothing of
    # the steps behind their ends, and the same test must notice it.
    code, n, n_draws = Code(3, 1, 1, seed=8), 32 * 50, 1500
    monkeypatch.setattr(sliding, "_FULL_PIECES", 1)
    monkeypatch.setattr(sliding, "_PIECE_STEPS", 50)
    monkeypatch.setattr(sliding, "_MERGE_WINDOWS", merge_windows)
    assert len(sliding.cut(n, code)) == 32
    posterior, prior = random_case(n, seed=1)
    cost, generator = importance_cost(posterior, prior), torch.Generator().manual_seed(2)
    counts = np.zeros((n, 8))
    for _ in range(n_draws):
        message = encode_stream(cost, code, "sample", generator)
        states = reference.windows(message, code, n).numpy()
        counts[np.arange(n), states] += 1
    p = p_values_by_step(counts, n_draws * state_marginals(posterior, prior, code))
    # The least of n values, so n times as likely to be small by chance (Bonferroni).
    assert n * p.min() > FALSE_ALARM if right else n * p.min() < REJECTED


@pytest.mark.parametrize("code", [Code(8, 2, 1), Code(8, 8, 4)], ids=str)
def test_the_generator_decides_the_message(code: Code) -> None:
    posterior, prior = random_case(400, seed=4)
    cost = importance_cost(posterior, prior)

    def draw(seed: int) -> torch.Tensor:
        return encode_stream(cost, code, "sample", torch.Generator().manual_seed(seed))

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    one = torch.Generator().manual_seed(1)
    first, second = (encode_stream(cost, code, "sample", one) for _ in range(2))
    assert torch.equal(first, draw(1)) and not torch.equal(first, second)


@pytest.mark.parametrize("code", [Code(8, 2, 1), Code(8, 8, 4)], ids=str)
def test_no_global_generator_is_read_or_moved(code: Code) -> None:
    posterior, prior = random_case(100, seed=4)
    cost = importance_cost(posterior, prior)
    messages = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        np.random.seed(seed)
        before = torch.get_rng_state(), np.random.get_state(legacy=False)["state"]["key"]
        messages.append(encode_stream(cost, code, "sample", torch.Generator().manual_seed(3)))
        assert torch.equal(torch.get_rng_state(), before[0])
        assert np.array_equal(np.random.get_state(legacy=False)["state"]["key"], before[1])
    assert torch.equal(*messages)


@pytest.mark.parametrize("code", [Code(10, 2, 1), Code(10, 10, 5)], ids=str)
def test_a_sample_of_a_sharp_posterior_is_the_best_message(code: Code) -> None:
    generator = torch.Generator().manual_seed(6)
    posterior = Posterior(torch.randn(100, generator=generator), torch.full((100,), 1e-10))
    cost = importance_cost(posterior, Prior(torch.tensor(0.0), torch.tensor(1.0)))
    assert torch.equal(encode_stream(cost, code, "sample", generator), encode_stream(cost, code))
