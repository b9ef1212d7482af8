"""The digest against plain integers, its numba twin, and what it must notice."""

import struct
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from miracle_hub.coding import cpu
from miracle_hub.coding import digest as module

SETTINGS = settings(max_examples=80, deadline=None, derandomize=True, database=None)
BOTH = pytest.mark.parametrize("digest", [module.digest, cpu.digest], ids=["reference", "cpu"])


def mixed(i: int, word: int) -> int:
    """One term of the digest in Python's own integers."""
    x = (i * 0x9E3779B97F4A7C15 + word) % 2**64
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return x ^ x >> 31


def by_hand(values: torch.Tensor) -> int:
    packed = struct.pack(f"<{values.numel()}f", *values.tolist())
    words = struct.unpack(f"<{values.numel()}I", packed)
    return sum(mixed(i, word) for i, word in enumerate(words)) % 2**64


def of_words(words: list[int]) -> torch.Tensor:
    return torch.from_numpy(np.array(words, np.uint32).view(np.float32).copy())


def test_the_finalizer_is_that_of_splitmix64() -> None:
    # First outputs of the public splitmix64.c at seed 0: term i has i·GOLDEN as its input.
    assert [mixed(i, 0) for i in (1, 2, 3)] == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


@BOTH
def test_digest_follows_the_formula(digest: Callable[[torch.Tensor], int]) -> None:
    values = torch.randn(1000, generator=torch.Generator().manual_seed(3))
    assert digest(values) == by_hand(values)
    assert digest(torch.zeros(2)) == 0xE220A8397B1DCDAF


@BOTH
def test_digest_of_nothing_is_zero(digest: Callable[[torch.Tensor], int]) -> None:
    assert digest(torch.zeros(0)) == 0


@SETTINGS
@given(st.lists(st.integers(0, 2**32 - 1), max_size=50))
def test_numba_digest_equals_the_reference_for_any_words(words: list[int]) -> None:
    # All words, so negative zeros, subnormals, infinities and NaNs too.
    values = of_words(words)
    expected = sum(mixed(i, word) for i, word in enumerate(words)) % 2**64
    assert cpu.digest(values) == module.digest(values) == expected


@BOTH
def test_any_single_changed_bit_changes_the_digest(digest: Callable[[torch.Tensor], int]) -> None:
    words = torch.randn(7, generator=torch.Generator().manual_seed(4)).numpy().view(np.uint32).tolist()
    digests = {digest(of_words(words))}
    for position in range(7):
        for bit in range(32):
            changed = words.copy()
            changed[position] ^= 1 << bit
            digests.add(digest(of_words(changed)))
    assert len(digests) == 1 + 7 * 32


@BOTH
def test_swapped_values_change_the_digest(digest: Callable[[torch.Tensor], int]) -> None:
    assert digest(torch.tensor([1.0, 2.0])) != digest(torch.tensor([2.0, 1.0]))
    assert digest(torch.tensor([0.0])) != digest(torch.tensor([-0.0]))


@pytest.mark.parametrize("size", [1, 7, 99, 100, 101, 1000])
def test_digest_does_not_depend_on_chunks_or_threads(
    size: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = torch.randn(100, generator=torch.Generator().manual_seed(5))
    monkeypatch.setattr(module, "_CHUNK", size)
    monkeypatch.setattr(cpu, "_ROWS_PER_TASK_WEIGHTS", size)
    assert module.digest(values) == cpu.digest(values) == by_hand(values)


def test_positions_beyond_32_bits_wrap_modulo_2_to_the_64() -> None:
    first = 2**40 + 3
    words = np.array([0, 1, 0xFFFFFFFF], np.uint32)
    found = int(cpu.digest_words(words, first))
    assert found == sum(mixed(first + i, int(word)) for i, word in enumerate(words)) % 2**64
