"""The Hadamard rotation: the matrix, the order of the float32 sums, and the numba twin's bits."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import hadamard as hadamard_matrix

from miracle_hub.coding import cpu
from miracle_hub.coding.rotation import DEFAULT_WIDTH, check_width, hadamard, widest_rotation
from miracle_hub.errors import OptionError

Rotation = Callable[[torch.Tensor, int], torch.Tensor]
WIDTHS = [1, 2, 4, 8, 16, 64, 128]
BOTH = pytest.mark.parametrize("rotate", [hadamard, cpu.hadamard], ids=["reference", "cpu"])


def random_rows(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Values of very different sizes, so that another order of the sums changes bits."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(-12, 12, (rows, columns), generator=generator)
    return torch.randn(rows, columns, generator=generator) * 2.0**sizes


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    assert one.dtype == other.dtype == torch.float32
    return torch.equal(one.contiguous().view(torch.int32), other.contiguous().view(torch.int32))


def by_hand(row: np.ndarray, width: int) -> np.ndarray:
    """The docstring of `hadamard` as four nested loops over one row."""
    row, stride = row.copy(), 1
    while stride < width:
        for start in range(0, row.size, 2 * stride):
            for i in range(start, start + stride):
                a, b = row[i], row[i + stride]
                row[i], row[i + stride] = a + b, a - b
        stride *= 2
    return row


@BOTH
@pytest.mark.parametrize("width", WIDTHS)
def test_rotation_of_the_identity_is_the_walsh_hadamard_matrix(rotate: Rotation, width: int) -> None:
    expected = torch.from_numpy(hadamard_matrix(width).astype(np.float32))
    assert torch.equal(rotate(torch.eye(width), width), expected)


@BOTH
@pytest.mark.parametrize("width", WIDTHS)
def test_rotating_twice_multiplies_by_the_width(rotate: Rotation, width: int) -> None:
    # Small integers: every sum is exact, so that H·H = width·I holds to the last bit.
    generator = torch.Generator().manual_seed(1)
    values = torch.randint(-9, 10, (3, 2 * width), generator=generator).float()
    assert torch.equal(rotate(rotate(values, width), width), width * values)


@BOTH
@pytest.mark.parametrize("width", WIDTHS)
def test_sums_are_taken_in_the_documented_order(rotate: Rotation, width: int) -> None:
    values = random_rows(2, 3 * width)
    expected = torch.from_numpy(np.stack([by_hand(row, width) for row in values.numpy()]))
    assert same_bits(rotate(values, width), expected)


def test_another_order_of_the_sums_would_be_noticed() -> None:
    values = random_rows(2, 128)
    product = values @ torch.from_numpy(hadamard_matrix(128).astype(np.float32))
    assert torch.allclose(hadamard(values, 128), product, rtol=1e-3, atol=1e-1)
    assert not same_bits(hadamard(values, 128), product)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.integers(0, 5), st.integers(0, 3), st.integers(0, 10), st.integers(0, 1000))
def test_numba_rotation_equals_the_reference(rows: int, groups: int, width_log2: int, seed: int) -> None:
    width = 2**width_log2
    values = random_rows(rows, groups * width, seed)
    assert same_bits(cpu.hadamard(values, width), hadamard(values, width))


def test_numba_rotation_equals_the_reference_at_the_widest_width() -> None:
    values = random_rows(2, 2**15)
    assert same_bits(cpu.hadamard(values, 2**15), hadamard(values, 2**15))


@pytest.mark.parametrize("width", [2, 8, 64])
def test_rotation_does_not_depend_on_the_number_of_threads(
    width: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = random_rows(5, 7 * width)
    monkeypatch.setattr(cpu, "_ROWS_PER_TASK_WEIGHTS", 21)  # no multiple of any width
    assert same_bits(cpu.hadamard(values, width), hadamard(values, width))


@BOTH
def test_rotation_leaves_its_input_alone_and_reads_any_strides(rotate: Rotation) -> None:
    values = random_rows(8, 16)
    before = values.clone()
    transposed = rotate(values.T, 8)
    assert torch.equal(values, before)
    assert same_bits(transposed, rotate(values.T.contiguous(), 8))


@pytest.mark.parametrize(
    ("columns", "limit", "width"),
    [
        (0, 128, 1),
        (1, 128, 1),
        (7, 128, 1),
        (12, 128, 4),
        (96, 128, 32),
        (384, 128, 128),
        (384, 64, 64),
        (4096, 8192, 4096),
    ],
)
def test_widest_rotation_is_the_largest_power_of_two_that_divides(
    columns: int, limit: int, width: int
) -> None:
    assert widest_rotation(columns, limit) == width
    assert DEFAULT_WIDTH == 128 and widest_rotation(4096) == 128


@pytest.mark.parametrize(("width", "columns"), [(1, 7), (2, 6), (128, 384), (2**15, 2**16), (4, 0)])
def test_a_width_that_tiles_the_row_passes(width: int, columns: int) -> None:
    check_width(width, columns, "layer.weight")


@pytest.mark.parametrize(
    ("width", "columns", "advice"),
    [(0, 8, 8), (-2, 8, 8), (3, 9, 1), (4, 6, 2), (2**16, 2**16, 128), (12, 24, 8)],
)
def test_a_width_that_does_not_tile_the_row_names_tensor_and_remedy(
    width: int, columns: int, advice: int
) -> None:
    with pytest.raises(OptionError) as caught:
        check_width(width, columns, "layer.weight")
    assert str(caught.value) == (
        "layer.weight: the rotation width must be a power of two up to 32768 that divides "
        f"its {columns} columns, found {width}; use {advice} or 1 (none)"
    )
