"""The reading order of a matrix: bands by hand, permutations against the golden decoder's Philox."""

import tracemalloc
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from miracle_hub.code import Code
from miracle_hub.coding.order import banded_order, permutation, stream_order

SETTINGS = settings(max_examples=60, deadline=None, derandomize=True, database=None)


def test_bands_of_two_columns_are_read_as_drawn_by_hand() -> None:
    #  0 1 | 2 3 | 4
    #  5 6 | 7 8 | 9
    assert banded_order(2, 5, 2).tolist() == [0, 1, 5, 6, 2, 3, 7, 8, 4, 9]


def test_bands_of_one_column_read_the_transposed_matrix() -> None:
    assert banded_order(3, 2, 1).tolist() == [0, 2, 4, 1, 3, 5]


@pytest.mark.parametrize("band_columns", [0, 4, 9])
def test_one_band_is_row_major_order(band_columns: int) -> None:
    assert banded_order(3, 4, band_columns).tolist() == list(range(12))
    assert stream_order(3, 4, band_columns, False, Code(8, 2, 1)) is None


@pytest.mark.parametrize(("rows", "columns"), [(0, 5), (5, 0), (0, 0)])
@pytest.mark.parametrize("band_columns", [0, 2])
def test_an_empty_matrix_has_an_empty_order(rows: int, columns: int, band_columns: int) -> None:
    assert banded_order(rows, columns, band_columns).shape == (0,)


def test_a_million_bands_cost_no_object_each() -> None:
    tracemalloc.start()
    try:
        assert banded_order(2, 1 << 19, 1)[:4].tolist() == [0, 1 << 19, 1, (1 << 19) + 1]
        assert tracemalloc.get_traced_memory()[1] < 1 << 16
    finally:
        tracemalloc.stop()


@SETTINGS
@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 15))
def test_every_position_is_read_once_and_bands_come_in_order(rows: int, columns: int, band: int) -> None:
    order = banded_order(rows, columns, band)
    assert sorted(order.tolist()) == list(range(rows * columns))
    keys = [((p % columns) // (band or columns), p // columns, p % columns) for p in order.tolist()]
    assert keys == sorted(keys)


@SETTINGS
@given(st.integers(0, 300), st.integers(0, 2**64 - 1), st.integers(0, 2**32 - 1))
def test_permutation_sorts_the_unsigned_philox_keys(
    golden_decoder: dict[str, Any], n: int, seed: int, stream_id: int
) -> None:
    found = permutation(n, Code(8, 2, 1, seed, stream_id)).tolist()
    assert sorted(found) == list(range(n))
    words = [
        golden_decoder["philox4x32"]((i, 0, stream_id, 1), (seed % 2**32, seed >> 32)).tolist()
        for i in range(n)
    ]
    assert found == sorted(range(n), key=lambda i: (words[i][1], words[i][0]))


def test_equal_keys_keep_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    def two_keys(counter: tuple[torch.Tensor, int, int, int], seed: int) -> tuple[torch.Tensor, ...]:
        return (counter[0] % 2, *(counter[0] * 0,) * 3)

    monkeypatch.setattr("miracle_hub.coding.order.philox4x32", two_keys)
    expected = [*range(0, 100, 2), *range(1, 100, 2)]
    assert permutation(100, Code(8, 2, 1)).tolist() == expected


def test_a_permutation_does_not_depend_on_how_it_is_chunked(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = permutation(50, Code(8, 2, 1, 7, 1))
    monkeypatch.setattr("miracle_hub.coding.order._CHUNK", 7)
    assert torch.equal(permutation(50, Code(8, 2, 1, 7, 1)), whole)


def test_golden_permutation() -> None:
    assert permutation(12, Code(8, 2, 1, 0x123456789ABCDEF0, 3)).tolist() == [
        6,
        2,
        5,
        11,
        10,
        9,
        4,
        3,
        8,
        1,
        0,
        7,
    ]


def test_seed_and_stream_id_choose_the_permutation_and_the_window_does_not() -> None:
    found = permutation(50, Code(8, 2, 1, 1, 1)).tolist()
    assert found == permutation(50, Code(12, 3, 7, 1, 1)).tolist()
    assert found != permutation(50, Code(8, 2, 1, 2, 1)).tolist()
    assert found != permutation(50, Code(8, 2, 1, 2**32 + 1, 1)).tolist()
    assert found != permutation(50, Code(8, 2, 1, 1, 2)).tolist()


@pytest.mark.parametrize("band_columns", [0, 2])
def test_a_permuted_stream_permutes_the_banded_order(band_columns: int) -> None:
    code = Code(8, 2, 1, 7)
    order = stream_order(4, 5, band_columns, True, code)
    assert order is not None
    banded = banded_order(4, 5, band_columns).tolist()
    assert order.tolist() == [banded[i] for i in permutation(20, code).tolist()]


def test_an_unpermuted_stream_is_read_in_bands() -> None:
    order = stream_order(2, 5, 2, False, Code(8, 2, 1))
    assert order is not None and order.tolist() == banded_order(2, 5, 2).tolist()
