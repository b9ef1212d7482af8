"""slide: messages decode to the cost that the op reports, "best" is the optimum, "sample" has the exact law.

Without a GPU a step takes 5 to 10 ms, so few streams are long there. Laws are judged by chi-square tests
with a stated false-alarm rate; seeds are fixed, so a verdict never changes.
"""

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from scipy.stats import chi2
from streams import generator, table_of
from torch import Tensor

from miracle_hub.code import Code
from miracle_hub.coding import reference
from miracle_hub.coding.encode import encode_stream, pack_states
from miracle_hub.coding.posterior import Cost, Posterior, Prior, importance_cost
from miracle_hub.coding.quantiles import quantiles
from miracle_kernels import KernelInputError, slide, slide_torch
from miracle_kernels._triton import tl, triton
from miracle_kernels.noise import SELECT_CANDIDATE, SLIDE, uniform
from miracle_kernels.slide import count_pieces, pack_torch, slide_triton
from miracle_kernels.tuning import tiles

# The package's attribute `slide` is the op.
MODULE: Any = importlib.import_module("miracle_kernels.slide")
# A right encoder fails one case in ten thousand; a wrong one must be rejected far beyond chance.
FALSE_ALARM = 1e-4
REJECTED = 1e-6
# Below this the chi-square approximation is poor, and cells are merged.
LEAST_EXPECTED = 5
KINDS = ["one entry", "both signs"]
# Also windows that overlap by less than one step, and branches that need 16 bits.
CODES = [
    Code(8, 2, 1, 7),
    Code(8, 3, 2, 2**63, 9),
    Code(6, 4, 1),
    Code(9, 8, 3, 1, 5),
    Code(10, 1, 4, 2),
    Code(5, 4, 1, 3),
    Code(16, 15, 2, 4),
]
SHORT = [(code, n, kind) for code in CODES for n in (1, 63) for kind in KINDS]
# On a GPU every code and kind; 1,311 is no multiple of any V but 1 and 3.
LONG = [(CODES[3], 1311, KINDS[0]), (CODES[4], 1311, KINDS[1])]
if torch.cuda.is_available():
    LONG = [(code, 1311, kind) for code in CODES for kind in KINDS]


class Costs(NamedTuple):
    """quadratic · z² - linear · z per weight; unlike the package's Cost, one quadratic may serve them all."""

    quadratic: Tensor
    linear: Tensor


@pytest.fixture
def cut_into(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """`cut_into(n)`: streams are cut into n pieces, or into as many as are two margins long."""

    def cut(n_pieces: int) -> None:
        def count(n_steps: int, margin: int, wanted: int) -> int:
            return max(1, min(n_pieces, n_steps // (2 * margin)))

        monkeypatch.setattr(MODULE, "count_pieces", count)

    return cut


@pytest.fixture(autouse=True)
def wide_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU only: the interpreter takes longer for many tiles than for one of 2^16 states."""
    if not torch.cuda.is_available():
        set_tiles(monkeypatch, TILE_NODES=1 << 16)


def set_tiles(monkeypatch: pytest.MonkeyPatch, **sizes: int) -> None:
    monkeypatch.setattr(MODULE, "tiles", lambda *args, **problem: tiles(*args, **problem) | sizes)


def random_cost(n: int, kind: str, seed: int = 0) -> Costs:
    """Of a Gaussian source, or of posteriors narrower and wider than the prior (quadratic of both signs)."""
    first, second = torch.randn(2, n, generator=generator(seed))
    return Costs(torch.ones(1), 2 * first) if kind == KINDS[0] else Costs(2 * second, 3 * first)


def gaussian_cost(n: int, variance: float, seed: int = 0) -> Costs:
    """Of posteriors of one variance whose means are normal like the prior."""
    posterior = Posterior(torch.randn(n, generator=generator(seed)), torch.full((n,), variance))
    cost = importance_cost(posterior, Prior(torch.tensor(0.0), torch.tensor(1.0)))
    return Costs(cost.quadratic, cost.linear)


def arguments(
    cost: Costs, code: Code, device: torch.device, selection: str = "best", seed: int = 0
) -> dict[str, Any]:
    tensors = dict(quadratic=cost.quadratic, linear=cost.linear, table=table_of(code))
    rest = dict(
        window_bits=code.window_bits,
        step_bits=code.step_bits,
        step_weights=code.step_weights,
        selection=selection,
        seed=seed,
    )
    return {name: tensor.to(device) for name, tensor in tensors.items()} | rest


def encode(
    cost: Costs,
    code: Code,
    device: torch.device,
    selection: str = "best",
    seed: int = 0,
    function: Callable[..., tuple[Tensor, Tensor]] = slide_triton,
) -> tuple[Tensor, float]:
    """Message and cost, which must be of the right types and belong together."""
    message, found = function(**arguments(cost, code, device, selection, seed))
    assert found.dtype == torch.float64 and found.shape == () and message.device == found.device
    check_message(cost, code, message.cpu(), float(found))
    return message.cpu(), float(found)


def check_message(cost: Costs, code: Code, message: Tensor, found: float) -> None:
    """Of the right length, zero behind its last bit, and decoding to exactly the cost found.

    Exactly but for float32: terms are rounded three times and summed pairwise in tiles of at most 4,096,
    so each passes through at most 15 roundings of 2⁻²⁴, which is less than 2⁻²⁰ of the sum of magnitudes.
    """
    n = cost.linear.numel()
    assert message.dtype == torch.uint8 and message.shape == (code.message_bytes(n),)
    assert not np.unpackbits(message.numpy())[code.message_bits(n) :].any()
    quadratic, linear = cost.quadratic.double(), cost.linear.double()
    z = reference.decode_stream(message, code, n).double()
    magnitude = float((quadratic.abs() * z * z + (linear * z).abs()).sum())
    assert abs(found - float((quadratic * z * z - linear * z).sum())) <= 2**-20 * magnitude


def least_cost(cost: Costs, code: Code) -> float:
    """Of all messages, by a float64 recursion over the whole stream."""
    n, nodes = cost.linear.numel(), 1 << code.overlap_bits
    z = table_of(code).double().numpy()
    padding = (0, code.steps(n) * code.step_weights - n)
    quadratic, linear = (
        torch.nn.functional.pad(values.expand(n).double(), padding).view(-1, 1, code.step_weights).numpy()
        for values in (cost.quadratic, cost.linear)
    )
    reached = np.zeros(nodes)
    for q, b in zip(quadratic, linear, strict=True):
        total = np.repeat(reached, 1 << code.step_bits) + (z * (q * z - b)).sum(1)
        reached = total.reshape(-1, nodes).min(0)
    return float(reached.min())


def constant(cost: Costs) -> float:
    """What makes the sum of costs a weighted squared error, whose relative size means something."""
    return float((cost.linear.double() ** 2 / (4 * cost.quadratic.double())).sum())


def every_message(code: Code, n: int) -> Tensor:
    """What each message decodes to, float64 [2^message_bits, n]."""
    bits = code.message_bits(n)
    shifts = bits - code.window_bits - code.step_bits * torch.arange(code.steps(n))
    states = (torch.arange(2**bits)[:, None] >> shifts) & (2**code.window_bits - 1)
    return table_of(code).double()[states].flatten(1)[:, :n]


def every_cost(cost: Costs, code: Code) -> np.ndarray:
    """float64 [2^message_bits]."""
    z = every_message(code, cost.linear.numel())
    return (z * (cost.quadratic.double() * z - cost.linear.double())).sum(1).numpy()


def number_of(message: Tensor, bits: int) -> int:
    return int.from_bytes(message.numpy().tobytes(), "big") >> (8 * message.numel() - bits)


@pytest.mark.parametrize(("code", "n", "kind"), SHORT + LONG)
def test_the_best_message_of_one_piece_is_the_optimum(
    device: torch.device, code: Code, n: int, kind: str, cut_into: Callable[[int], None]
) -> None:
    cut_into(1)
    cost = random_cost(n, kind, seed=n)
    _, found = encode(cost, code, device)
    least = least_cost(cost, code)
    # The search compares float32 sums, which the subtracted least costs keep small.
    assert abs(found - least) <= 1e-5 * max(1.0, abs(least))


@pytest.mark.parametrize(("code", "n", "kind"), SHORT + [(CODES[0], 1311, KINDS[0])])
def test_the_best_message_of_the_torch_reference_is_the_optimum(
    device: torch.device, code: Code, n: int, kind: str
) -> None:
    cost = random_cost(n, kind, seed=n)
    _, found = encode(cost, code, device, function=slide_torch)
    least = least_cost(cost, code)
    assert abs(found - least) <= 1e-5 * max(1.0, abs(least))


@pytest.mark.parametrize("code", [Code(8, 2, 1, 7), Code(7, 3, 2, 2**63, 9)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_the_best_message_costs_what_the_encoder_of_the_package_reaches(
    device: torch.device, code: Code, kind: str, cut_into: Callable[[int], None]
) -> None:
    cut_into(1)
    cost = random_cost(63, kind, seed=8)
    whole = Cost(cost.quadratic.expand(63), cost.linear)
    z = reference.decode_stream(encode_stream(whole, code), code, 63).double()
    reached = float((z * (cost.quadratic * z - cost.linear)).sum())
    for function in (slide_triton, slide_torch):
        assert abs(encode(cost, code, device, function=function)[1] - reached) <= 1e-5 * abs(reached)


@pytest.mark.parametrize(
    ("code", "n"),
    [
        (Code(4, 1, 1, 5), 8),
        (Code(10, 1, 1, 6), 4),
        (Code(5, 3, 2, 7), 7),
        (Code(3, 2, 1, 8), 5),
        (Code(6, 5, 9), 20),
    ],
)
def test_the_best_message_is_the_best_of_all_messages(device: torch.device, code: Code, n: int) -> None:
    for kind in KINDS:
        cost = random_cost(n, kind, seed=n)
        costs = every_cost(cost, code)
        for function in (slide_triton, slide_torch):
            message, _ = encode(cost, code, device, function=function)
            chosen = number_of(message, code.message_bits(n))
            assert costs[chosen] - costs.min() <= 1e-5 * abs(costs).max()  # float32 sums
            if np.diff(np.partition(costs, 1)[:2]) > 1e-4 * abs(costs).max():
                assert chosen == costs.argmin()


def test_weights_of_nearly_the_priors_variance_do_not_blind_the_search(device: torch.device) -> None:
    """Their quadratic is tiny, so their least cost over all real z is far below that of any candidate."""
    cost = gaussian_cost(63, 0.1)
    near = importance_cost(
        Posterior(torch.ones(3), torch.full((3,), 1 - 2**-24)), Prior(torch.tensor(0.0), torch.tensor(1.0))
    )
    cost = Costs(torch.cat((near.quadratic, cost.quadratic)), torch.cat((near.linear, cost.linear)))
    assert 0 < cost.quadratic[0] < 1e-6
    least = least_cost(cost, CODES[0])
    for function in (slide_torch, slide_triton):
        assert encode(cost, CODES[0], device, function=function)[1] - least <= 1e-5 * abs(least)


@pytest.mark.parametrize(("code", "n", "kind"), SHORT)
def test_a_drawn_message_decodes_to_its_cost(device: torch.device, code: Code, n: int, kind: str) -> None:
    if n > 1 and device.type == "cpu" and (kind == KINDS[0]) == (code.step_weights == 1):
        n = 9  # either kind is drawn at length 63 for some codes
    for function in (slide_triton, slide_torch):
        encode(random_cost(n, kind, seed=n), code, device, "sample", 2**40 + n, function)


@pytest.mark.parametrize(
    ("code", "n", "n_pieces"),
    [
        (Code(8, 2, 1, 7), 660, 5),
        (Code(9, 8, 3, 1, 5), 601, 5),
        (Code(5, 4, 1, 3), 240, 6),
    ],
)
def test_joined_pieces_cost_within_half_a_percent_of_one_search(
    device: torch.device, code: Code, n: int, n_pieces: int, cut_into: Callable[[int], None]
) -> None:
    cut_into(n_pieces)
    cost = gaussian_cost(n, 0.1)
    margin = -(-MODULE._MERGE_WINDOWS * code.window_bits // code.step_bits)
    assert MODULE.count_pieces(code.steps(n), margin, 0) == n_pieces
    _, found = encode(cost, code, device)
    least = least_cost(cost, code)
    assert -1e-5 <= (found - least) / (least + constant(cost)) <= 0.005


def test_pieces_without_wide_margins_cost_more(
    device: torch.device, cut_into: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control of the test above; messages are sound all the same."""
    cut_into(10**6)
    monkeypatch.setattr(MODULE, "_MERGE_WINDOWS", 1)
    cost = gaussian_cost(200, 0.1)
    _, found = encode(cost, CODES[0], device)
    assert found - least_cost(cost, CODES[0]) > 0.01 * (least_cost(cost, CODES[0]) + constant(cost))


@pytest.mark.parametrize("selection", ["best", "sample"])
def test_the_message_does_not_depend_on_how_many_pieces_are_in_memory(
    device: torch.device, selection: str, cut_into: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    cut_into(6)
    monkeypatch.setattr(MODULE, "_MERGE_WINDOWS", 2)
    code, cost = CODES[5], gaussian_cost(36, 0.1)
    expected, _ = encode(cost, code, device, selection)
    one = (36 // 6 + 2 * 3) * 2 + 2 * 2 * 4  # branches of 6 steps and two margins, two rows of costs
    for share in (1, 2 * one):
        monkeypatch.setattr(MODULE, "memory_share", lambda _, share=share: share)
        assert torch.equal(encode(cost, code, device, selection)[0], expected)


@pytest.mark.parametrize("selection", ["best", "sample"])
@pytest.mark.parametrize("code", [Code(6, 2, 1, 7), Code(5, 4, 3, 3)], ids=str)
def test_the_message_does_not_depend_on_tile_sizes(
    device: torch.device, selection: str, code: Code, monkeypatch: pytest.MonkeyPatch
) -> None:
    cost = random_cost(11 * code.step_weights, KINDS[1])
    expected, _ = encode(cost, code, device, selection)
    set_tiles(monkeypatch, TILE_NODES=8, TILE_MESSAGE=2, TILE_COST=4)
    assert torch.equal(encode(cost, code, device, selection)[0], expected)


@pytest.mark.parametrize(
    ("n_steps", "margin", "wanted", "n_pieces"),
    [
        (1, 1, 100, 1),
        (2048, 96, 1, 1),
        (2049, 96, 1, 2),
        (2048, 96, 6, 6),
        (2048, 96, 100, 10),  # as many as are two margins long
        (2**21, 96, 2000, 2000),
        (2**22, 96, 2000, 2048),
    ],
)
def test_pieces_fill_the_processors_or_are_as_long_as_allowed(
    n_steps: int, margin: int, wanted: int, n_pieces: int
) -> None:
    assert count_pieces(n_steps, margin, wanted) == n_pieces


def test_long_streams_are_cut_by_themselves(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    code, cost = Code(5, 4, 1, 3), gaussian_cost(130, 0.1)
    monkeypatch.setattr(MODULE, "_PIECE_STEPS", 50)
    monkeypatch.setattr(MODULE, "resident_programs", lambda *_: 0)
    _, found = encode(cost, code, device)
    assert (found - least_cost(cost, code)) / (least_cost(cost, code) + constant(cost)) <= 0.005


def p_value(counts: np.ndarray, law: np.ndarray) -> float:
    """Of Pearson's chi-square; rare cells are merged into one, with the least of the others if need be."""
    order = np.argsort(law)
    counts, expected = counts[order], counts.sum() * law[order]
    merged = int(np.searchsorted(np.cumsum(expected), LEAST_EXPECTED)) + 1
    merged = max(merged, int((expected < LEAST_EXPECTED).sum()))
    counts = np.append(counts[merged:], counts[:merged].sum())
    expected = np.append(expected[merged:], expected[:merged].sum())
    assert expected.min() >= LEAST_EXPECTED and expected.size > 2
    return float(chi2.sf(((counts - expected) ** 2 / expected).sum(), expected.size - 1))


def check_law(counts: np.ndarray, costs: np.ndarray) -> None:
    """Draws follow exp(-cost/2); the same test rejects a lost or doubled factor in the exponent."""
    for factor in (1.0, 2.0, 0.5):
        weights = np.exp(-0.5 * factor * (costs - costs.min()))
        p = p_value(counts, weights / weights.sum())
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
    launch: Any = _uniform_kernel[(1,)]
    launch(out, *words, DOMAIN=domain, TILE=1)
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
    launch: Any = _uniform_kernel[(1,)]
    for word in range(3):
        counter = [3, 5, 9]
        draws = []
        for i in range(4):
            counter[word] = 10**9 * (i + 1) % 2**31
            out = torch.empty(1024, device=device)
            launch(out, 2**40 + word, *counter, DOMAIN=SLIDE, TILE=1024)
            draws.append(out.cpu())
        counts = np.bincount((torch.cat(draws) * 64).long().numpy(), minlength=64)
        assert p_value(counts, np.full(64, 1 / 64)) > FALSE_ALARM
        assert len(torch.cat(draws).unique()) > 4000


@pytest.mark.parametrize("code", CODES + [Code(7, 7, 3)], ids=str)
@pytest.mark.parametrize("n_steps", [1, 2, 33])
def test_the_torch_reference_packs_like_the_package(code: Code, n_steps: int) -> None:
    states = reference.windows(torch.randint(256, (99,)).to(torch.uint8), code, n_steps)
    expected = pack_states(states.numpy(), code)
    assert torch.equal(pack_torch(states, code.window_bits, code.step_bits), expected)


@pytest.mark.parametrize("selection", ["best", "sample"])
@pytest.mark.parametrize("function", [slide_triton, slide_torch, slide])
@pytest.mark.parametrize("quadratic", [torch.zeros(0), torch.ones(1)], ids=["per weight", "one entry"])
def test_an_empty_stream_has_an_empty_message(
    device: torch.device, function: Callable, selection: str, quadratic: Tensor
) -> None:
    given = arguments(Costs(quadratic, torch.zeros(0)), CODES[1], device, selection)
    message, cost = function(**given)
    assert message.dtype == torch.uint8 and message.shape == (0,)
    assert cost.dtype == torch.float64 and cost.shape == () and float(cost) == 0


def test_tensors_may_be_views_with_odd_offsets(device: torch.device) -> None:
    code, cost = CODES[1], random_cost(31, KINDS[1])
    given = arguments(cost, code, device)
    expected = slide_triton(**given)
    moved: dict[str, Any] = dict(table=torch.cat((given["table"][:1], given["table"]))[1:])
    for name in ("quadratic", "linear"):
        moved[name] = torch.cat((given[name][:1], given[name], given[name]))[1:32]
    found = slide_triton(**given | moved)
    assert torch.equal(found[0], expected[0]) and found[1] == expected[1]


@pytest.mark.parametrize("selection", ["best", "sample"])
def test_the_op_is_a_sound_torch_op(device: torch.device, selection: str) -> None:
    given = arguments(random_cost(15, KINDS[1]), CODES[1], device, selection)
    torch.library.opcheck(slide, tuple(given.values()))
    check_message(random_cost(15, KINDS[1]), CODES[1], *_on_cpu(slide(*given.values())))


def _on_cpu(found: tuple[Tensor, Tensor]) -> tuple[Tensor, float]:
    return found[0].cpu(), float(found[1])


def test_the_op_compiles_without_a_graph_break(device: torch.device) -> None:
    given = arguments(random_cost(15, KINDS[0]), CODES[1], device)

    def double(*args) -> tuple[Tensor, Tensor]:
        message, cost = slide(*args)
        return message ^ 255, 2 * cost

    compiled = torch.compile(double, fullgraph=True, backend="aot_eager")
    for found, expected in zip(compiled(*given.values()), double(*given.values()), strict=True):
        assert torch.equal(found, expected)


META = torch.device("meta")
BAD = [
    (dict(linear=torch.zeros(63).double()), "linear: expected float32, found torch.float64"),
    (dict(linear=torch.zeros(7, 9)), "linear: expected 1 dimension, found 2"),
    (dict(linear=torch.zeros(126)[::2]), r"linear: expected a contiguous tensor, found strides \(2,\)"),
    (dict(linear=torch.zeros(62)), "quadratic: expected 62 entries, or 1, found 63"),
    (dict(linear=torch.zeros(63, device=META)), "quadratic: expected all tensors on meta, found cpu"),
    (dict(quadratic=torch.zeros(63).half()), "quadratic: expected float32, found torch.float16"),
    (dict(quadratic=torch.zeros(64)), "quadratic: expected 63 entries, or 1, found 64"),
    (dict(quadratic=torch.zeros(0)), "quadratic: expected 63 entries, or 1, found 0"),
    (dict(quadratic=torch.ones(63, 1)), "quadratic: expected 1 dimension, found 2"),
    (dict(quadratic=torch.zeros(1).expand(63)), "quadratic: expected a contiguous tensor"),
    (dict(quadratic=torch.zeros(63, device=META)), "quadratic: expected all tensors on cpu, found meta"),
    (dict(table=torch.zeros(256, 2)), "table: expected float16, found torch.float32"),
    (dict(table=torch.zeros(256, 1).half()), r"candidates of shape \(256, 2\), found \(256, 1\)"),
    (dict(table=torch.zeros(128, 2).half()), r"candidates of shape \(256, 2\), found \(128, 2\)"),
    (dict(table=quantiles()), r"candidates of shape \(256, 2\), found \(65536,\)"),
    (dict(table=torch.zeros(2, 256).half().T), "table: expected a contiguous tensor"),
    (dict(table=torch.zeros(256, 2, device=META).half()), "table: expected all tensors on cpu, found meta"),
    (dict(window_bits=17), "window_bits: expected an integer from 1 to 16, found 17"),
    (dict(window_bits=25), "window_bits: expected an integer from 1 to 24, found 25"),
    (dict(window_bits=0), "window_bits: expected an integer from 1 to 24, found 0"),
    (dict(window_bits=1, step_bits=1), r"step_bits \(select .* code\): expected .* from 1 to 0, found 1"),
    (dict(step_bits=8), r"step_bits \(select encodes the block code\): expected .* from 1 to 7, found 8"),
    (dict(step_bits=9), "step_bits: expected an integer from 1 to 8, found 9"),
    (dict(step_bits=0), "step_bits: expected an integer from 1 to 8, found 0"),
    (dict(step_weights=0), "step_weights: expected an integer from 1 to 256, found 0"),
    (dict(step_weights=257), "step_weights: expected an integer from 1 to 256, found 257"),
    (dict(selection="worst"), r"selection: expected one of \('best', 'sample'\), found 'worst'"),
    (dict(seed=2**63), "seed: expected an integer from -9223372036854775808"),
    (dict(seed=-(2**63) - 1), "seed: expected an integer from -9223372036854775808"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_input_is_named(change: dict[str, Any], message: str) -> None:
    given = arguments(random_cost(63, KINDS[1]), CODES[1], torch.device("cpu"))
    for function in (slide_triton, slide_torch):
        with pytest.raises(KernelInputError, match=message):
            function(**given | change)
