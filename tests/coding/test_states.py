"""Encoding in parts: windows that go on from an entry give one message, at nearly the cost of one search."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.stats import chi2

from miracle_hub.code import Code
from miracle_hub.coding import reference, sliding
from miracle_hub.coding.encode import encode_states, encode_stream, pack_states
from miracle_hub.coding.posterior import Cost, squared_error_cost

SLIDING = [Code(8, 2, 1, 7), Code(7, 3, 2, 2**63, 9), Code(6, 4, 9), Code(10, 1, 1), Code(5, 1, 3)]
CODES = [*SLIDING, Code(8, 8, 4, 3)]
# (L, k, V, n) of streams short enough for all their messages.
TINY = [(4, 1, 1, 7), (5, 3, 2, 5), (6, 2, 3, 11), (6, 5, 9, 20)]


def normal_cost(n: int, seed: int) -> Cost:
    cost = squared_error_cost(torch.randn(n, generator=torch.Generator().manual_seed(seed)))
    return Cost(cost.quadratic.contiguous(), cost.linear)


def encode_in_parts(
    cost: Cost, code: Code, ends: list[int], ahead: int, selection: str = "best"
) -> np.ndarray:
    """States of steps [0, ends[0]), [ends[0], ends[1]), …, each part searched `ahead` steps too far."""
    generator, n, parts = torch.Generator().manual_seed(1), cost.linear.numel(), []
    for start, stop in zip([0, *ends], ends, strict=False):
        last = int(parts[-1][-1]) & ((1 << code.overlap_bits) - 1) if parts else None
        at = slice(start * code.step_weights, min((stop + ahead) * code.step_weights, n))
        part = Cost(cost.quadratic[at], cost.linear[at])
        parts.append(encode_states(part, code, selection, generator, last)[: stop - start])
    return np.concatenate(parts)


@pytest.mark.parametrize("selection", ["best", "sample"])
@pytest.mark.parametrize("ahead", [0, 1, 40])
@pytest.mark.parametrize("code", CODES, ids=str)
def test_parts_make_one_message_that_decodes_to_their_candidates(
    code: Code, ahead: int, selection: str
) -> None:
    """Parts of one step, of fewer steps than get from node to node, and longer ones; a short last step."""
    ends = [1, 2, 5, 60, 61, 200]
    n = ends[-1] * code.step_weights - (code.step_weights > 1)
    states = encode_in_parts(normal_cost(n, 3), code, ends, ahead, selection)
    assert states.dtype == np.int64 and states.shape == (code.steps(n),)
    mask = (1 << code.overlap_bits) - 1
    assert np.array_equal(states[:-1] & mask, states[1:] >> code.step_bits)
    message = pack_states(states, code)
    assert message.numel() == code.message_bytes(n)
    assert reference.windows(message, code, code.steps(n)).tolist() == states.tolist()
    chosen = reference.candidates(torch.from_numpy(states), code).flatten()[:n]
    assert torch.equal(reference.decode_stream(message, code, n), chosen)


@pytest.mark.parametrize("selection", ["best", "sample"])
@pytest.mark.parametrize("code", CODES, ids=str)
def test_without_an_entry_the_states_are_those_of_the_message(code: Code, selection: str) -> None:
    cost = normal_cost(300, 4)
    states = encode_states(cost, code, selection, torch.Generator().manual_seed(2))
    message = encode_stream(cost, code, selection, torch.Generator().manual_seed(2))
    assert torch.equal(pack_states(states, code), message)


def distortion(cost: Cost, code: Code, states: np.ndarray) -> float:
    """The mean squared error that the states leave."""
    n = cost.linear.numel()
    z = reference.candidates(torch.from_numpy(states), code).flatten()[:n]
    return float((z - cost.linear / 2).double().square().mean())


@pytest.mark.parametrize("code", SLIDING, ids=str)
def test_parts_that_look_ahead_lose_little_against_one_search(code: Code) -> None:
    """Sixteen windows ahead, as the coder of models looks: a thousandth. Control: without, a hundredth."""
    steps = 40 * (-(-code.overlap_bits // code.step_bits))
    ends = list(range(steps // 20, steps + 1, steps // 20))
    cost = normal_cost(steps * code.step_weights, 5)
    whole = distortion(cost, code, encode_states(cost, code, "best", None))
    ahead = 16 * code.window_bits // code.step_bits
    joined = distortion(cost, code, encode_in_parts(cost, code, ends, ahead))
    greedy = distortion(cost, code, encode_in_parts(cost, code, ends, 0))
    assert joined <= 1.001 * whole
    assert greedy > 1.01 * whole


def number_of(states: np.ndarray, code: Code) -> int:
    """The message's bits as one number."""
    message = pack_states(states, code).numpy().tobytes()
    return int.from_bytes(message, "big") >> (
        8 * len(message) - code.overlap_bits - code.step_bits * states.size
    )


def total_cost(cost: Cost, z: np.ndarray) -> np.ndarray:
    """float64, over the last dimension."""
    quadratic, linear = cost.quadratic.double().numpy(), cost.linear.double().numpy()
    return (quadratic * z**2 - linear * z).sum(-1)


@pytest.mark.parametrize(("L", "k", "V", "n"), TINY)
def test_from_every_entry_the_best_is_the_best_of_all_messages_that_start_there(
    every_message: Callable[..., np.ndarray], L: int, k: int, V: int, n: int
) -> None:
    """Node 0 too, which is another thing than no entry."""
    code, cost = Code(L, k, V, seed=L), normal_cost(n, 6)
    bits = code.message_bits(n)
    costs = total_cost(cost, every_message(code, n)).reshape(2**code.overlap_bits, -1)
    for entry in range(2**code.overlap_bits):
        states = encode_states(cost, code, "best", None, entry)
        assert states[0] >> k == entry
        first, rest = divmod(number_of(states, code), 2 ** (bits - code.overlap_bits))
        assert first == entry
        assert costs[entry, rest] - costs[entry].min() <= 1e-5 * abs(costs).max()  # float32 sums


@pytest.mark.parametrize(("L", "k", "V", "n"), [(4, 1, 1, 5), (5, 3, 2, 4)])
@pytest.mark.parametrize("entry", [0, 3])
def test_from_an_entry_messages_are_drawn_in_proportion_to_their_importance_weight(
    every_message: Callable[..., np.ndarray], L: int, k: int, V: int, n: int, entry: int
) -> None:
    """False alarm below 1e-4. Control: the law without the entry's bits is another one."""
    code, n_draws, generator = Code(L, k, V, seed=3), 3000, torch.Generator().manual_seed(7)
    cost = Cost(0.5 * torch.ones(n), normal_cost(n, 8).linear / 2)
    costs = total_cost(cost, every_message(code, n)).reshape(2**code.overlap_bits, -1)
    bits = code.message_bits(n) - code.overlap_bits
    counts = np.zeros(2**bits)
    for _ in range(n_draws):
        states = encode_states(cost, code, "sample", generator, entry)
        counts[number_of(states, code) % 2**bits] += 1

    def p_value(node: int) -> float:
        law = np.exp(-costs[node] / 2)
        expected = n_draws * law / law.sum()
        cell = np.where(expected >= 5, np.arange(law.size), expected.argmax())  # rare ones join the likeliest
        observed, expected = np.bincount(cell, counts), np.bincount(cell, expected)
        often = expected > 0
        assert often.sum() > 8
        statistic = ((observed - expected)[often] ** 2 / expected[often]).sum()
        return float(chi2.sf(statistic, often.sum() - 1))

    assert p_value(entry) > 1e-4
    assert p_value(entry ^ 1) < 1e-9


@pytest.mark.parametrize("selection", ["best", "sample"])
@pytest.mark.parametrize("code", SLIDING, ids=str)
def test_an_entry_holds_for_the_first_of_several_pieces_alone(
    code: Code, selection: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for constant, value in (("_FULL_PIECES", 1), ("_FULL_BAND_PIECES", 1), ("_BAND_MERGE_WINDOWS", 16)):
        monkeypatch.setattr(sliding, constant, value)
    monkeypatch.setattr(sliding, "_PIECE_STEPS", 100)
    n = 40 * 100 * code.step_weights
    assert len(sliding.cut(4000, code)) == len(sliding.cut(4000, code, is_band=True)) == 40
    cost = normal_cost(n, 9)
    for entry in (0, (1 << code.overlap_bits) - 1):
        states = encode_states(cost, code, selection, torch.Generator().manual_seed(3), entry)
        assert states[0] >> code.step_bits == entry
        assert np.array_equal(states[:-1] & ((1 << code.overlap_bits) - 1), states[1:] >> code.step_bits)
        if selection == "best":  # the other end of the stream does not hear of it
            assert np.array_equal(states[-2000:], encode_states(cost, code, "best", None)[-2000:])


def test_blocks_share_no_bits_so_that_an_entry_says_nothing() -> None:
    cost, code = normal_cost(300, 4), Code(8, 8, 4, 3)
    assert np.array_equal(
        encode_states(cost, code, "best", None), encode_states(cost, code, "best", None, entry=0)
    )
