"""slide as a torch op: packing, empty streams, views, compilation, and named errors for bad input."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from slides import CODES, KINDS, Costs, arguments, check_message, random_cost
from torch import Tensor

from miracle_hub.code import Code
from miracle_hub.coding import reference
from miracle_hub.coding.encode import pack_states
from miracle_hub.coding.quantiles import quantiles
from miracle_kernels import KernelInputError, slide, slide_torch
from miracle_kernels.slide import pack_torch, slide_triton

pytestmark = pytest.mark.usefixtures("wide_tiles")


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
