"""Shared values: which value every weight takes, with which sign, all of it fixed by the format."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from miracle_hub.coding.sharing import KINDS, Sharing, expand, expand_backward
from miracle_hub.errors import OptionError


def test_kinds_have_the_numbers_of_the_format() -> None:
    assert KINDS == ("none", "hash", "tile")


# (n_values, n_weights, seed, number of the tensor), places, signs. Written once by `independent_hash` below;
# a change here is a new format version.
GOLDEN = [
    ((5, 12, 0, 0), [0, 0, 1, 0, 1, 1, 4, 3, 2, 3, 4, 2], "+-+-++-----+"),
    ((4, 10, 2**64 - 1, 3), [2, 2, 0, 3, 0, 1, 1, 3, 0, 1], "--+++-+++-"),
    ((3, 3, 7, 65535), [0, 2, 1], "--+"),
    ((1, 9, 1, 1), [0, 0, 0, 0, 0, 0, 0, 0, 0], "-+++++--+"),
]


@pytest.mark.parametrize(("case", "places", "signs"), GOLDEN)
def test_the_hash_is_the_committed_one(case: tuple[int, int, int, int], places: list, signs: str) -> None:
    n_values, n_weights, seed, number = case
    found = Sharing("hash", n_values, n_weights).places(seed, number)
    assert found[0].dtype == torch.int64 and found[1].dtype == torch.float32
    assert found[0].tolist() == places
    assert found[1].tolist() == [1.0 if sign == "+" else -1.0 for sign in signs]


def independent_hash(
    golden: dict[str, Any], n_values: int, n_weights: int, seed: int, number: int
) -> tuple[np.ndarray, np.ndarray]:
    """From the docstring of coding/sharing.py, through the Philox of tests/golden/decoder.py."""
    words = golden["philox4x32"]((np.arange(n_weights), 0, number, 1), (seed % 2**32, seed >> 32))
    permuted = np.lexsort((words[:, 0], words[:, 1]))  # the last key is the first to count
    return permuted % n_values, 1.0 - 2.0 * (words[:, 2] & 1)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.data())
def test_the_hash_is_that_of_an_independent_implementation(
    golden_decoder: dict[str, Any], data: st.DataObject
) -> None:
    n_weights = data.draw(st.integers(1, 3000))
    n_values, seed = data.draw(st.integers(1, n_weights)), data.draw(st.integers(0, 2**64 - 1))
    number = data.draw(st.integers(0, 2**32 - 1))
    places, signs = Sharing("hash", n_values, n_weights).places(seed, number)
    expected = independent_hash(golden_decoder, n_values, n_weights, seed, number)
    assert np.array_equal(places.numpy(), expected[0]) and np.array_equal(signs.numpy(), expected[1])


@pytest.mark.parametrize(("n_values", "n_weights"), [(1, 1), (1, 50), (7, 50), (49, 50), (50, 50), (3, 9)])
def test_every_value_has_its_fair_share_of_weights(n_values: int, n_weights: int) -> None:
    for kind in ("hash", "tile"):
        places, _ = Sharing(kind, n_values, n_weights).places(5, 2)
        counts = places.bincount(minlength=n_values)
        assert counts.numel() == n_values and int(counts.sum()) == n_weights
        assert set(counts.tolist()) <= {n_weights // n_values, -(-n_weights // n_values)}


def test_half_of_the_signs_are_minus_whatever_the_value() -> None:
    """Within five standard errors: false alarm below 1e-6."""
    n, n_values = 100_000, 100
    places, signs = Sharing("hash", n_values, n).places(3, 1)
    assert set(signs.tolist()) == {-1.0, 1.0}
    assert abs(float(signs.sum())) <= 5 * math.sqrt(n)
    by_value = torch.zeros(n_values).index_add_(0, places, signs)
    # Σ of squares of 100 sums of 1,000 signs: 100·1000, with a relative standard deviation of √(2/100).
    assert abs(float(by_value.square().sum()) / n - 1) <= 5 * math.sqrt(2 / n_values)


@pytest.mark.parametrize("other", [(3, 2), (4, 1), (3 + 2**32, 1), (3 + 2**63, 1)])
def test_other_tensors_and_other_seeds_are_hashed_differently(other: tuple[int, int]) -> None:
    """As if drawn anew: one weight in ten meets the same value, one in two the same sign, within 5 errors."""
    n, sharing = 10_000, Sharing("hash", 10, 10_000)
    (places, signs), (other_places, other_signs) = sharing.places(3, 1), sharing.places(*other)
    for same, chance in ((places == other_places, 0.1), (signs == other_signs, 0.5)):
        assert abs(float(same.double().mean()) - chance) <= 5 * math.sqrt(chance * (1 - chance) / n)


def test_tiles_repeat_the_values_in_order() -> None:
    places, signs = Sharing("tile", 3, 8).places(5, 2)
    assert places.tolist() == [0, 1, 2, 0, 1, 2, 0, 1] and signs.tolist() == [1.0] * 8
    assert torch.equal(Sharing("tile", 3, 8).places(6, 3)[0], places)


def test_without_sharing_every_weight_is_its_own_value() -> None:
    places, signs = Sharing("none", 5, 5).places(1, 2)
    assert places.tolist() == [0, 1, 2, 3, 4] and signs.tolist() == [1.0] * 5


@pytest.mark.parametrize("kind", KINDS)
def test_expanding_is_indexing_with_signs_bit_for_bit(kind: str) -> None:
    sharing = Sharing(kind, 1000 if kind == "none" else 37, 1000)
    places, signs = sharing.places(5, 2)
    values = torch.randn(sharing.n_values, generator=torch.Generator().manual_seed(0))
    values[3] = 0.0  # a minus sign makes it -0
    expected = values[places] * signs
    found = expand(values, places, signs)
    assert torch.equal(found.view(torch.int32), expected.view(torch.int32))


@pytest.mark.parametrize("kind", ["hash", "tile"])
def test_the_gradient_of_expanding_is_that_of_indexing(kind: str) -> None:
    """Gradients are small integers here, whose sums have no order."""
    places, signs = Sharing(kind, 37, 1000).places(5, 2)
    one, two = torch.ones(37, requires_grad=True), torch.ones(37, requires_grad=True)
    grad = torch.randint(-9, 10, (1000,), generator=torch.Generator().manual_seed(1)).float()
    expand(one, places, signs).backward(grad)
    (two[places] * signs).backward(grad)
    assert one.grad is not None and two.grad is not None and bool(two.grad.any())
    assert torch.equal(one.grad, two.grad)
    # one number with strides of 0, as a sum sends back
    (by_sum,) = torch.autograd.grad(expand(one, places, signs).sum(), one)
    assert torch.equal(by_sum, torch.zeros(37).index_add_(0, places, signs))


def test_tensors_on_a_gpu_are_expanded_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU, tensors only say that they are on one."""
    places, signs = Sharing("hash", 37, 1000).places(5, 2)
    values, grad = torch.randn(37), torch.randint(-9, 10, (1000,)).float()
    expected = expand(values, places, signs), expand_backward(grad, places, signs, 37)
    if not torch.cuda.is_available():
        monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    values, grad, places, signs = (x.to(device) for x in (values, grad, places, signs))
    assert torch.equal(expand(values, places, signs).cpu(), expected[0])
    assert torch.equal(expand_backward(grad, places, signs, 37).cpu(), expected[1])


def test_the_ops_are_sound_torch_ops() -> None:
    places, signs = Sharing("hash", 7, 20).places(5, 2)
    torch.library.opcheck(expand, (torch.randn(7, requires_grad=True), places, signs))
    torch.library.opcheck(expand_backward, (torch.randn(20), places, signs, 7))


@pytest.mark.parametrize(
    ("kind", "n_values", "n_weights", "expected"),
    [
        ("none", 4, 5, "5 to 5 values for 5 weights, found 4"),
        ("none", 6, 5, "5 to 5 values for 5 weights, found 6"),
        ("hash", 0, 5, "1 to 5 values for 5 weights, found 0"),
        ("tile", 6, 5, "1 to 5 values for 5 weights, found 6"),
        ("hash", 1, 0, "1 to 0 values for 0 weights, found 1"),
    ],
)
def test_a_number_of_values_that_cannot_be_is_named(
    kind: str, n_values: int, n_weights: int, expected: str
) -> None:
    with pytest.raises(OptionError) as raised:
        Sharing(kind, n_values, n_weights)
    assert str(raised.value) == f"sharing: expected {expected}; share less or more"


def test_an_unknown_kind_is_named() -> None:
    with pytest.raises(OptionError) as raised:
        Sharing("hsah", 1, 5)
    assert str(raised.value) == (
        "sharing: expected one of ('none', 'hash', 'tile'), found 'hsah'; choose one of them"
    )
