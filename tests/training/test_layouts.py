"""Layouts of a stream's values: one tensor in its own order, or several that are permuted together."""

import math

import pytest
import torch
from torch import Tensor

from miracle_hub.code import Code
from miracle_hub.coding.order import permutation
from miracle_hub.coding.sharing import Sharing
from miracle_hub.training.layout import Joint, Layout, Matrix, Member, layout_of, scale_columns

CODE = Code(8, 2, 1, seed=5)


def member(name: str, *shape: int, shared: int = 0, kind: str = "hash") -> Member:
    n = math.prod(shape)
    sharing = Sharing(kind, shared, n) if shared else Sharing("none", n, n)
    return Member(name, shape, torch.float32, sharing)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def joint() -> tuple[Joint, list[Tensor]]:
    weights = [normal(4, 5), 100 * normal(3, seed=1)]
    return Joint([member("a", 4, 5), member("b", 3)], CODE), weights


def test_only_one_tensor_without_sharing_keeps_its_own_order() -> None:
    assert isinstance(layout_of([member("w", 64, 128)], CODE, True), Matrix)
    assert isinstance(layout_of([member("w", 64, 128, shared=99)], CODE, True), Joint)
    assert isinstance(layout_of([member("a", 4), member("b", 4)], CODE, True), Joint)


@pytest.mark.parametrize(
    ("shape", "n_scales"), [((64, 128), 64), ((64, 127), 1), ((8192,), 64), ((9,), 1), ((1, 128), 1)]
)
def test_rows_of_128_have_a_scale_each_and_shorter_ones_share_one(
    shape: tuple[int, ...], n_scales: int
) -> None:
    assert Matrix(member("w", *shape), True).n_scales == n_scales
    assert Matrix(member("w", *shape), False).n_scales == 1
    assert (scale_columns(shape) > 0) == (n_scales > 1)


@pytest.mark.parametrize("has_row_scales", [False, True])
def test_a_matrix_is_its_rows(has_row_scales: bool) -> None:
    weights = normal(64, 128) * torch.logspace(-3, 3, 64)[:, None]
    layout = Matrix(member("w", 64, 128), has_row_scales)
    values = layout.start([weights])
    assert torch.equal(values, weights.flatten()) and torch.equal(layout.weight(values, 0), weights)
    rows = weights.view(layout.n_scales, -1)
    torch.testing.assert_close(layout.mean_squares(values), rows.double().square().mean(1).float())
    scales = torch.arange(1.0, 1 + layout.n_scales)
    expected = (rows * scales[:, None]).flatten()
    assert torch.equal(layout.times(values, scales), expected)
    assert torch.equal(values * layout.by_value(scales), expected)


def test_tensors_that_are_joined_are_permuted_by_the_code_and_have_a_scale_each() -> None:
    layout, weights = joint()
    values, order = layout.start(weights), permutation(23, CODE)
    assert torch.equal(values, torch.cat([w.flatten() for w in weights])[order])
    assert all(torch.equal(layout.weight(values, i), w) for i, w in enumerate(weights))
    expected = torch.stack([w.double().square().mean() for w in weights]).float()
    torch.testing.assert_close(layout.mean_squares(values), expected)
    scaled = layout.times(values, torch.tensor([2.0, 3.0]))
    assert torch.equal(layout.weight(scaled, 0), 2 * weights[0])
    assert torch.equal(layout.weight(scaled, 1), 3 * weights[1])


def test_the_dtype_of_a_member_is_that_of_its_weights() -> None:
    half = Member("w", (2, 3), torch.bfloat16, Sharing("none", 6, 6))
    assert Matrix(half, False).weight(torch.zeros(6), 0).dtype == torch.bfloat16
    assert Joint([half, half], CODE).weight(torch.zeros(12), 1).dtype == torch.bfloat16


def test_values_beside_a_base_are_the_difference_and_weights_the_sum_in_float32() -> None:
    base, weights = normal(64, 128), normal(64, 128, seed=2)
    layout = Matrix(member("w", 64, 128), True, base.bfloat16())
    values = layout.start([weights])
    assert torch.equal(values, (weights - base.bfloat16().float()).flatten())
    assert torch.equal(layout.weight(values, 0).flatten(), base.bfloat16().float().flatten() + values)
    assert torch.equal(layout.start([base.bfloat16()]), torch.zeros(64 * 128))
    kept = layout.base
    assert layout.to(torch.bfloat16).base is kept and not layout.state_dict()
    assert layout.to("meta").base.device.type == "meta"  # pyright: ignore[reportOptionalMemberAccess]


@pytest.mark.parametrize("kind", ["hash", "tile"])
def test_weights_that_share_a_value_start_from_their_mean_at_the_size_of_the_weights(kind: str) -> None:
    shared = member("w", 40, 10, shared=50, kind=kind)
    layout, weights = Joint([shared], CODE), normal(40, 10)
    values = layout.start([weights])
    places, signs = shared.sharing.places(CODE.seed, 0)
    by_value = torch.empty(50).index_copy_(0, layout.order, values)
    means = torch.stack([(weights.flatten() * signs)[places == i].mean() for i in range(50)])
    assert float(torch.corrcoef(torch.stack((by_value, means)))[0, 1]) > 0.9999
    assert float(values.square().mean()) == pytest.approx(float(weights.square().mean()), rel=1e-5)
    assert torch.equal(layout.weight(values, 0).flatten(), by_value[places] * signs)


def layouts() -> list[Layout]:
    return [Matrix(member("w", 64, 128), True), Matrix(member("w", 4, 5), False), joint()[0]]


@pytest.mark.parametrize("number", range(3))
def test_gradients_of_scaled_values_reach_values_and_scales(number: int) -> None:
    layout = layouts()[number]
    values, scales = normal(layout.n_values), 0.5 + torch.rand(layout.n_scales)
    grad, inputs = normal(layout.n_values, seed=2), [values.requires_grad_(), scales.requires_grad_()]
    found = torch.autograd.grad((layout.times(values, scales) * grad).sum(), inputs)
    doubles = [x.detach().double().requires_grad_() for x in inputs]
    product = doubles[0] * layout.by_value(doubles[1])
    expected = torch.autograd.grad((product * grad).sum(), doubles)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5)
