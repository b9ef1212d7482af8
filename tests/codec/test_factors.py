"""Factors of a low-rank product: others of the same product, which cost it less when they are coded."""

import pytest
import torch
from torch import Tensor

from miracle_hub.codec.factors import are_factors, balanced, squared, squared_distance


def factors(
    out: int, rank: int, columns: tuple[int, ...], dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """As training may leave them: of other sizes, and of directions of other sizes."""
    generator = torch.Generator().manual_seed(out + rank)
    decay = 2.0 ** -torch.arange(rank)
    b = torch.randn(out, rank, generator=generator) * decay
    a = torch.randn(rank, *columns, generator=generator) * 30
    return b.view(out, rank, *[1] * (len(columns) - 1)).to(dtype), a.to(dtype)


SHAPES = [
    (96, 8, (64,)), (96, 1, (64,)), (50, 3, (70,)), (33, 13, (47,)), (5, 8, (64,)), (64, 8, (6,)),
    (4, 8, (3,)), (24, 5, (8, 3, 3)),
]  # fmt: skip


@pytest.mark.parametrize(("out", "rank", "columns"), SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_the_product_stays_within_the_rounding_of_the_dtype(
    out: int, rank: int, columns: tuple[int, ...], dtype: torch.dtype
) -> None:
    b, a = factors(out, rank, columns, dtype)
    found_b, found_a = balanced(b, a)
    assert (found_b.shape, found_b.dtype, found_a.shape, found_a.dtype) == (b.shape, dtype, a.shape, dtype)
    product, found = (y.double().flatten(1) @ x.double().flatten(1) for y, x in ((b, a), (found_b, found_a)))
    assert float((found - product).norm() / product.norm()) < 50 * torch.finfo(dtype).eps


@pytest.mark.parametrize(("out", "rank", "columns"), SHAPES, ids=str)
def test_all_directions_of_both_factors_have_the_same_square(
    out: int, rank: int, columns: tuple[int, ...]
) -> None:
    b, a = balanced(*factors(out, rank, columns, torch.float64))
    squares = torch.cat((b.flatten(1).square().sum(0), a.flatten(1).square().sum(1)))
    assert torch.allclose(squares, squares.mean().expand(2 * rank))


def test_no_factors_of_the_product_have_a_smaller_product_of_norms() -> None:
    b, a = factors(40, 6, (30,), torch.float64)
    found_b, found_a = balanced(b, a)
    least = float(torch.linalg.svdvals(b @ a).sum())
    assert float(found_b.norm() * found_a.norm()) == pytest.approx(least)
    assert float(b.norm() * a.norm()) > 1.3 * least


def test_noise_of_equal_share_costs_the_product_less() -> None:
    pair = factors(96, 8, (64,), torch.float64)
    generator = torch.Generator().manual_seed(1)

    def noisy(factor: Tensor) -> Tensor:
        noise = torch.randn(factor.shape, generator=generator, dtype=torch.float64)
        return factor + 0.1 * factor.square().mean().sqrt() * noise

    errors = [squared_distance(both, (noisy(both[0]), noisy(both[1]))) for both in (pair, balanced(*pair))]
    assert errors[1] < 0.6 * errors[0]


def test_squares_are_those_of_the_products() -> None:
    one, other = factors(20, 4, (5, 3, 3)), factors(20, 6, (5, 3, 3))
    products = [b.double().flatten(1) @ a.double().flatten(1) for b, a in (one, other)]
    assert squared(*one) == pytest.approx(float(products[0].square().sum()))
    assert squared_distance(one, other) == pytest.approx(float((products[0] - products[1]).square().sum()))


def test_a_product_of_less_rank_has_factors_too() -> None:
    b, a = factors(30, 5, (20,))
    b[:, 2], a[3] = 0, 0
    found_b, found_a = balanced(b, a)
    torch.testing.assert_close(found_b @ found_a, b @ a, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("b", "a"), [((8, 4), (5, 9)), ((8, 4, 3, 3), (4, 2, 3, 3)), ((8, 2, 1, 1), (4, 2, 3, 3)), ((8,), (8,))]
)
def test_what_has_no_such_product_is_told(b: tuple[int, ...], a: tuple[int, ...]) -> None:
    assert not are_factors(b, a)
    assert are_factors((8, 4, 1, 1), (4, 2, 3, 3)) and are_factors((8, 4), (4, 9))
