"""slide: messages decode to the cost that the op reports, and "best" is the optimum.

Without a GPU a step takes 5 to 10 ms, so few streams are long there.
"""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from slides import (
    CODES,
    KINDS,
    MODULE,
    Costs,
    constant,
    encode,
    every_cost,
    gaussian_cost,
    least_cost,
    number_of,
    random_cost,
    set_tiles,
)

from miracle_hub.code import Code
from miracle_hub.coding import reference
from miracle_hub.coding.encode import encode_stream
from miracle_hub.coding.posterior import Cost, Posterior, Prior, importance_cost
from miracle_kernels import slide_torch
from miracle_kernels.slide import count_pieces, slide_triton

pytestmark = pytest.mark.usefixtures("wide_tiles")

SHORT = [(code, n, kind) for code in CODES for n in (1, 63) for kind in KINDS]
# On a GPU every code and kind; 1,311 is no multiple of any V but 1 and 3.
LONG = [(CODES[3], 1311, KINDS[0]), (CODES[4], 1311, KINDS[1])]
if torch.cuda.is_available():
    LONG = [(code, 1311, kind) for code in CODES for kind in KINDS]


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
    changes = [
        dict(TILE_NODES=8, TILE_MESSAGE=2, TILE_COST=4),
        dict(TILE_NODES=8, TILE_STATES=16, TILE_STATES_DRAWN=16),  # several tiles of branches
        dict(KEPT_CANDIDATES=0),  # candidates are read at every step
        dict(TILE_NODES=4, TILE_STATES=4, TILE_STATES_DRAWN=4),
    ]
    for change in changes:
        set_tiles(monkeypatch, **change)
        assert torch.equal(encode(cost, code, device, selection)[0], expected), change


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
