"""Both encoders: lossless packing, "best" against all messages, pieces, tiles, threads and distortion."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from miracle_hub.coding import block, cpu, reference, sliding
from miracle_hub.coding.encode import encode_stream, pack_states
from miracle_hub.coding.posterior import Cost, squared_error_cost
from miracle_hub.config import Code
from miracle_hub.errors import OptionError

# (L, k, V, n); n is not always a multiple of V.
TINY = [
    (4, 1, 1, 10),
    (10, 1, 1, 5),
    (5, 3, 2, 7),
    (6, 2, 3, 13),
    (6, 5, 9, 25),
    (1, 1, 1, 12),
    (4, 4, 3, 10),
    (7, 7, 9, 18),
    (14, 14, 5, 3),
]
# Two block codes, and sliding codes with one, several, and more than eight weights per step.
CODES = [Code(8, 8, 4, 3), Code(11, 11, 9, 1, 5), Code(8, 2, 1, 7), Code(7, 3, 2, 2**63, 9), Code(6, 4, 9)]


def random_cost(n: int, seed: int) -> Cost:
    """Quadratic coefficients of both signs: posteriors narrower and wider than the prior."""
    generator = torch.Generator().manual_seed(seed)
    quadratic, linear = torch.randn(2, n, generator=generator)
    return Cost(2 * quadratic, 3 * linear)


def normal_cost(n: int, seed: int = 0, scale: float = 1.0) -> Cost:
    """Squared error of unit normal weights under a prior of standard deviation `scale`."""
    weights = torch.randn(n, generator=torch.Generator().manual_seed(seed))
    return squared_error_cost(weights / scale)


def total_cost(cost: Cost, z: np.ndarray) -> np.ndarray:
    """float64, over the last dimension."""
    quadratic, linear = cost.quadratic.double().numpy(), cost.linear.double().numpy()
    return (quadratic * z**2 - linear * z).sum(-1)


def number_of(message: torch.Tensor, bits: int) -> int:
    """The message's bits as one number; the bits behind it must be zero."""
    number = int.from_bytes(message.numpy().tobytes(), "big")
    unused = 8 * message.numel() - bits
    assert 0 <= unused < 8 and number % 2**unused == 0
    return number >> unused


def generator_of(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def encode_states(cost: Cost, code: Code, selection: str) -> np.ndarray:
    encoder = sliding.encode_sliding if code.overlap_bits else block.encode_block
    return encoder(cost, code, selection, generator_of(1))


@pytest.mark.parametrize("selection", ["best", "sample"])
@pytest.mark.parametrize("code", CODES, ids=str)
@pytest.mark.parametrize("n", [1, 2, 100, 257])
def test_decoding_gives_exactly_the_candidates_of_the_chosen_states(
    code: Code, n: int, selection: str
) -> None:
    cost = random_cost(n, n)
    states = encode_states(cost, code, selection)
    assert states.shape == (code.steps(n),)
    message = encode_stream(cost, code, selection, generator_of(1))
    assert message.dtype == torch.uint8 and message.numel() == code.message_bytes(n)
    number_of(message, code.message_bits(n))
    assert reference.windows(message, code, code.steps(n)).tolist() == states.tolist()
    chosen = reference.candidates(torch.from_numpy(states), code).flatten()[:n]
    assert torch.equal(reference.decode_stream(message, code, n), chosen)
    assert torch.equal(cpu.decode_stream(message, code, n), chosen)


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(st.integers(1, 24), st.data())
def test_packing_the_windows_of_a_message_gives_the_message_back(
    window_bits: int, data: st.DataObject
) -> None:
    code = Code(window_bits, data.draw(st.integers(1, window_bits)), 1)
    n = data.draw(st.integers(1, 40))
    bits = code.message_bits(n)
    number = data.draw(st.integers(0, 2**bits - 1))
    padded = number << (8 * code.message_bytes(n) - bits)
    message = torch.tensor(list(padded.to_bytes(code.message_bytes(n), "big")), dtype=torch.uint8)
    states = reference.windows(message, code, n).numpy()
    assert torch.equal(pack_states(states, code), message)


@pytest.mark.parametrize(("L", "k", "V", "n"), TINY)
@pytest.mark.parametrize("kind", ["random", "squared error"])
def test_best_is_the_best_of_all_messages(
    every_message: Callable[..., np.ndarray], L: int, k: int, V: int, n: int, kind: str
) -> None:
    code = Code(L, k, V, seed=L + 100 * k, stream_id=V)
    table = every_message(code, n)
    for seed in range(4):
        cost = random_cost(n, seed) if kind == "random" else normal_cost(n, seed)
        costs = total_cost(cost, table)
        best, second = np.partition(costs, 1)[:2]
        chosen = number_of(encode_stream(cost, code), code.message_bits(n))
        assert costs[chosen] - best <= 1e-5 * abs(costs).max()  # float32 sums
        if second - best > 1e-4 * abs(costs).max():
            assert chosen == costs.argmin()


@pytest.mark.parametrize("code", CODES, ids=str)
def test_missing_weights_of_the_last_step_cost_nothing(code: Code) -> None:
    # One more weight that the encoder does not care about takes the place of a missing one.
    n = 5 * code.step_weights - min(2, code.step_weights - 1)
    cost, none = random_cost(n, 3), torch.zeros(5 * code.step_weights - n)
    filled = Cost(torch.cat((cost.quadratic, none)), torch.cat((cost.linear, none)))
    assert torch.equal(encode_stream(cost, code), encode_stream(filled, code))


@pytest.mark.parametrize("kind", ["random", "squared error"])
@pytest.mark.parametrize("code", [Code(8, 2, 1, 7), Code(7, 3, 2), Code(6, 4, 9)], ids=str)
@pytest.mark.parametrize("n_steps", [400, 401, 3000])
def test_joined_pieces_cost_what_one_undivided_search_costs(
    code: Code, n_steps: int, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    n = n_steps * code.step_weights - (code.step_weights > 1)
    cost = random_cost(n, 5) if kind == "random" else normal_cost(n, 5, 0.9)
    monkeypatch.setattr(sliding, "_PIECE_STEPS", 10**9)
    assert len(sliding.cut(n_steps, code)) == 1
    undivided = total_cost(cost, reference.decode_stream(encode_stream(cost, code), code, n).numpy())
    monkeypatch.setattr(sliding, "_PIECE_STEPS", 100)
    assert len(sliding.cut(n_steps, code)) == -(-n_steps // 100)
    states = sliding.encode_sliding(cost, code, "best", None)
    message = encode_stream(cost, code)
    assert reference.windows(message, code, n_steps).tolist() == states.tolist()
    joined = total_cost(cost, reference.decode_stream(message, code, n).numpy())
    assert abs(joined - undivided) <= 1e-3 * abs(undivided)
    assert joined >= undivided - 1e-6 * abs(undivided)
