"""Philox4x32-10: the published known answers, and its numba twin."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from miracle_hub.coding import cpu
from miracle_hub.coding.philox import philox4x32

WORDS = st.integers(0, 2**32 - 1)

# Random123 (Salmon et al. 2011), examples/kat_vectors, "philox4x32 10": counter, key, output.
KNOWN_ANSWERS = {
    "zero": (
        "00000000 00000000 00000000 00000000",
        "00000000 00000000",
        "6627e8d5 e169c58d bc57ac4c 9b00dbd8",
    ),
    "ones": (
        "ffffffff ffffffff ffffffff ffffffff",
        "ffffffff ffffffff",
        "408f276d 41c83b0e a20bc7c6 6d5451fd",
    ),
    "pi": ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
}


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def reference_words(counter: list[int], seed: int) -> list[int]:
    c0, c1, c2, c3 = counter
    return [int(word) for word in philox4x32((torch.tensor([c0]), c1, c2, c3), seed)]


def numba_words(state: int, group: int, stream_id: int, seed: int) -> list[int]:
    halves = np.empty(8, np.uint16)
    cpu.philox_halves(state, group, stream_id, seed & 0xFFFFFFFF, seed >> 32, halves)
    return [int(low) | int(high) << 16 for low, high in halves.reshape(4, 2)]


@pytest.mark.parametrize("name", KNOWN_ANSWERS)
def test_reference_gives_the_known_answers_of_random123(name: str) -> None:
    counter, key, answer = map(words, KNOWN_ANSWERS[name])
    assert reference_words(counter, key[0] | key[1] << 32) == answer


def test_numba_twin_gives_the_known_answer_at_zero() -> None:
    assert numba_words(0, 0, 0, 0) == words(KNOWN_ANSWERS["zero"][2])


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(WORDS, WORDS, WORDS, st.integers(0, 2**64 - 1))
def test_numba_twin_equals_the_reference(state: int, group: int, stream_id: int, seed: int) -> None:
    assert numba_words(state, group, stream_id, seed) == reference_words([state, group, stream_id, 0], seed)


def test_a_vector_of_counters_gives_what_each_counter_gives_alone() -> None:
    states = torch.tensor([0, 1, 2**31, 2**32 - 1])
    together = torch.stack(philox4x32((states, 5, 6, 7), 2**63 + 1), dim=1)
    alone = [reference_words([int(state), 5, 6, 7], 2**63 + 1) for state in states]
    assert together.tolist() == alone


def test_the_second_counter_word_may_vary_too() -> None:
    states, groups = torch.tensor([3, 3, 9]), torch.tensor([0, 1, 2])
    together = torch.stack(philox4x32((states, groups, 1, 0), 8), dim=1)
    assert together.tolist() == [reference_words([s, g, 1, 0], 8) for s, g in ((3, 0), (3, 1), (9, 2))]
