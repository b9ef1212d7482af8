"""slide's samples have the exact law: chi-square tests with a stated false-alarm rate, and fixed seeds."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from slides import CODES, MODULE, Costs, arguments, encode, every_cost, gaussian_cost, number_of
from streams import generator

from miracle_hub.code import Code
from miracle_hub.coding import reference
from miracle_kernels import slide_torch
from miracle_kernels._triton import tl, triton
from miracle_kernels.noise import SELECT_CANDIDATE, SLIDE, uniform
from miracle_kernels.slide import slide_triton
from tests.chi_square import p_value

pytestmark = pytest.mark.usefixtures("wide_tiles")

# A right encoder fails one case in ten thousand; a wrong one must be rejected far beyond chance.
FALSE_ALARM = 1e-4
REJECTED = 1e-6


def check_law(counts: np.ndarray, costs: np.ndarray) -> None:
    """Draws follow exp(-cost/2); the same test rejects a lost or doubled factor in the exponent."""
    for factor in (1.0, 2.0, 0.5):
        weights = np.exp(-0.5 * factor * (costs - costs.min()))
        p = p_value(counts, counts.sum() * weights / weights.sum(), 3)
        assert p > FALSE_ALARM if factor == 1 else p < REJECTED


# Two steps of two weights, then a step that costs nothing: no bit is shared between two such rounds, so
# one stream holds as many independent draws as it has rounds.
ROUND_CODE = Code(4, 2, 2, 2**35, 3)


def round_cost() -> Costs:
    """Chosen so that the test also rejects a recursion over the best ways instead of sums of all ways."""
    return Costs(torch.tensor([-0.5, -0.6, 1.1, -0.3]), torch.tensor([-1.7, 2.3, 2.1, -3.8]))


def count_rounds(n_rounds: int, device: torch.device, seed: int, function: Callable) -> np.ndarray:
    """How often each of the 2^6 messages of a round was drawn, in one stream."""
    one, n = round_cost(), 6 * n_rounds - 2
    quadratic, linear = (
        torch.cat((values, torch.zeros(2))).repeat(n_rounds)[:n] for values in (one.quadratic, one.linear)
    )
    message, _ = encode(Costs(quadratic, linear), ROUND_CODE, device, "sample", seed, function)
    states = reference.windows(message, ROUND_CODE, ROUND_CODE.steps(n))
    states = torch.nn.functional.pad(states, (0, 1)).view(n_rounds, 3)
    return np.bincount((states[:, 0] << 2 | states[:, 1] & 3).numpy(), minlength=64)


def test_steps_of_joined_pieces_are_drawn_from_the_exact_law(
    device: torch.device, cut_into: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Margins of a whole round make the cut exact, whatever the pieces."""
    cut_into(12)
    monkeypatch.setattr(MODULE, "_MERGE_WINDOWS", 2)
    counts = count_rounds(200, device, seed=1, function=slide_triton)
    check_law(counts, every_cost(round_cost(), ROUND_CODE))


def test_steps_of_the_torch_reference_are_drawn_from_the_exact_law(device: torch.device) -> None:
    counts = count_rounds(4000, device, seed=1, function=slide_torch)
    check_law(counts, every_cost(round_cost(), ROUND_CODE))


@pytest.mark.parametrize(("function", "n_draws"), [(slide_triton, 150), (slide_torch, 4000)])
def test_messages_of_many_seeds_are_drawn_from_the_exact_law(
    device: torch.device, function: Callable, n_draws: int
) -> None:
    code, cost = Code(5, 1, 2, 11), Costs(torch.tensor([-0.5, -0.3]), torch.tensor([1.4, 3.2]))
    given, counts = arguments(cost, code, device, "sample"), np.zeros(32)
    for seed in range(n_draws):
        message, _ = function(**given | dict(seed=seed))
        counts[number_of(message.cpu(), 5)] += 1
    check_law(counts, every_cost(cost, code))


@pytest.mark.parametrize("function", [slide_triton, slide_torch])
def test_the_seed_decides_the_message(device: torch.device, function: Callable) -> None:
    cost = gaussian_cost(30, 0.3)
    seeds = [1, 2, -1]
    messages = {bytes(encode(cost, CODES[2], device, "sample", s, function)[0].tolist()) for s in seeds}
    again = encode(cost, CODES[2], device, "sample", 2, function)[0]
    assert len(messages) == len(seeds) and bytes(again.tolist()) in messages


def test_every_word_of_the_seed_counts(device: torch.device) -> None:
    cost = gaussian_cost(30, 0.3)
    messages = [encode(cost, CODES[2], device, "sample", seed)[0] for seed in (1, 1 + 2**32, 1 - 2**63)]
    assert not torch.equal(*messages[:2]) and not torch.equal(*messages[1:])


@pytest.mark.parametrize("n_pieces", [1, 9])
def test_drawn_costs_and_squares_have_the_mean_of_the_torch_reference(
    device: torch.device, n_pieces: int, cut_into: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Means of 2 and of 60 draws differ by less than 4.5 deviations: a false alarm in 10⁵ for either."""
    cut_into(n_pieces)
    monkeypatch.setattr(MODULE, "_MERGE_WINDOWS", 4)
    code, n = Code(6, 3, 1, 7), 144
    cost = gaussian_cost(n, 0.2)

    def moments(seed: int, function: Callable) -> list[float]:
        message, found = encode(cost, code, device, "sample", seed, function)
        return [found, float(reference.decode_stream(message, code, n).square().sum())]

    expected = np.array([moments(seed, slide_torch) for seed in range(60)])
    found = np.array([moments(seed, slide_triton) for seed in range(2)])
    bound = 4.5 * expected.std(0, ddof=1) * (1 / 2 + 1 / 60) ** 0.5
    assert (abs(found.mean(0) - expected.mean(0)) <= bound).all()
    # The best message is far cheaper than that bound can see.
    assert encode(cost, code, device, function=slide_torch)[1] < expected.mean(0)[0] - 2 * bound[0]


@pytest.mark.parametrize("function", [slide_triton, slide_torch])
def test_a_sample_of_a_sharp_posterior_is_the_best_message(device: torch.device, function: Callable) -> None:
    cost = gaussian_cost(20, 1e-9)
    best, _ = encode(cost, CODES[0], device, function=function)
    assert torch.equal(encode(cost, CODES[0], device, "sample", 3, function)[0], best)


@triton.jit
def _uniform_kernel(out_ptr, seed, first, second, third, DOMAIN: tl.constexpr, TILE: tl.constexpr):  # pyright: ignore
    at = tl.arange(0, TILE)
    tl.store(out_ptr + at, uniform(seed, first + at, second, third, DOMAIN))


# Counters whose Philox word starts with 24 ones, found by search: the largest draw there is.
LARGEST = [
    (37388, 3, 0, 0, SLIDE.value),
    (1572392, 12, 1, 0, SLIDE.value),
    (4694899, 8, 0, 1, SLIDE.value),
    (1420952, 9, 0, 0, SELECT_CANDIDATE.value),
]


@pytest.mark.parametrize("counter", LARGEST, ids=str)
def test_the_largest_uniform_draw_is_below_one(device: torch.device, counter: tuple) -> None:
    *words, domain = counter
    out = torch.empty(1, device=device)
    _uniform_kernel[(1,)](out, *words, DOMAIN=domain, TILE=1, enable_fp_fusion=True)  # pyright: ignore
    assert 0.999 < float(out) < 1


def test_the_largest_noise_does_not_draw_an_impossible_node(device: torch.device) -> None:
    """Its node is the twelfth of sixteen, and not the best one's."""
    seed, node = LARGEST[1][:2]
    code, cost = Code(5, 1, 1), Costs(torch.tensor([1e9]), torch.tensor([2e9]))
    best, _ = encode(cost, code, device)
    assert int(reference.windows(best, code, 1)) & 15 != node
    assert torch.equal(encode(cost, code, device, "sample", seed)[0], best)


def test_the_largest_noise_does_not_leave_a_pieces_first_node(
    device: torch.device, cut_into: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    cut_into(4)
    monkeypatch.setattr(MODULE, "_MERGE_WINDOWS", 2)
    cost = Costs(torch.ones(1), 2 * torch.randn(160, generator=generator(0)))
    encode(cost, Code(4, 2, 1), device, "sample", seed=LARGEST[2][0])


def test_uniform_draws_are_uniform(device: torch.device) -> None:
    """Chi-square of 64 cells, 4,096 draws of varying words, at a false-alarm rate of 1e-4 each."""
    for word in range(3):
        counter = [3, 5, 9]
        draws = []
        for i in range(4):
            counter[word] = 10**9 * (i + 1) % 2**31
            out = torch.empty(1024, device=device)
            _uniform_kernel[(1,)](  # pyright: ignore
                out, 2**40 + word, *counter, DOMAIN=SLIDE, TILE=1024, enable_fp_fusion=True
            )
            draws.append(out.cpu())
        counts = np.bincount((torch.cat(draws) * 64).long().numpy(), minlength=64)
        assert p_value(counts, np.full(64, counts.sum() / 64), 3) > FALSE_ALARM
        assert len(torch.cat(draws).unique()) > 4000
