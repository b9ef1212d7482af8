"""The code's integers: their ranges, the exact words of a refusal, and the length of a message."""

from dataclasses import FrozenInstanceError
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from miracle_hub.code import Code
from miracle_hub.errors import OptionError

VALID: dict[str, Any] = {"window_bits": 8, "step_bits": 2, "step_weights": 1, "seed": 0, "stream_id": 0}


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("window_bits", 2, 24),  # not below step_bits
        ("step_bits", 1, 8),
        ("step_weights", 1, 256),
        ("seed", 0, 2**64 - 1),
        ("stream_id", 0, 2**32 - 1),
    ],
)
def test_both_ends_of_every_range_are_valid(name: str, low: int, high: int) -> None:
    for value in (low, high):
        assert getattr(Code(**VALID | {name: value}), name) == value


@pytest.mark.parametrize(
    ("name", "value", "low", "high"),
    [
        ("window_bits", 0, 1, 24),
        ("window_bits", 25, 1, 24),
        ("window_bits", 8.0, 1, 24),
        ("step_bits", 0, 1, 8),
        ("step_bits", 9, 1, 8),
        ("step_weights", 0, 1, 256),
        ("step_weights", 257, 1, 256),
        ("step_weights", "1", 1, 256),
        ("seed", -1, 0, 2**64 - 1),
        ("seed", 2**64, 0, 2**64 - 1),
        ("stream_id", -1, 0, 2**32 - 1),
        ("stream_id", 2**32, 0, 2**32 - 1),
        ("stream_id", None, 0, 2**32 - 1),
    ],
)
def test_a_value_out_of_range_is_named_with_its_range(name: str, value: Any, low: int, high: int) -> None:
    with pytest.raises(OptionError) as caught:
        Code(**VALID | {name: value})
    assert str(caught.value) == (
        f"code: {name} must be an integer from {low} to {high}, found {value!r}; choose another value"
    )


@pytest.mark.parametrize(
    ("code", "n", "bits"),
    [
        (Code(12, 2, 1), 100, 10 + 200),
        (Code(12, 2, 1), 1, 12),
        (Code(16, 16, 8), 64, 128),
        (Code(16, 16, 8), 65, 144),
        (Code(10, 3, 4), 9, 7 + 9),
        (Code(24, 24, 256), 1, 24),
        (Code(10, 3, 4), 0, 0),
        (Code(16, 16, 8), 0, 0),
    ],
)
def test_message_has_the_overlap_and_step_bits_per_step(code: Code, n: int, bits: int) -> None:
    assert code.message_bits(n) == bits
    assert code.message_bytes(n) == (bits + 7) // 8


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(st.integers(1, 24), st.data())
def test_the_last_window_ends_with_the_message(window_bits: int, data: st.DataObject) -> None:
    code = Code(window_bits, data.draw(st.integers(1, window_bits)), data.draw(st.integers(1, 256)))
    n = data.draw(st.integers(1, 10**6))
    last_step = (n - 1) // code.step_weights
    assert code.steps(n) == last_step + 1
    assert code.message_bits(n) == code.step_bits * last_step + code.window_bits
    assert 0 <= 8 * code.message_bytes(n) - code.message_bits(n) < 8


def test_block_codes_do_not_overlap_and_the_rate_is_bits_per_weight() -> None:
    assert Code(16, 16, 8).overlap_bits == 0 and Code(12, 5, 2).overlap_bits == 7
    assert Code(16, 16, 8).rate == 2.0 and Code(12, 1, 4).rate == 0.25


def test_a_code_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        setattr(Code(8, 2, 1), "seed", 1)  # noqa: B010
