"""Which codes streams get: what is asked for by rate or bits is used to 99 %, or what is used is said."""

import logging
from typing import Any

import pytest

from miracle_hub.code import SplitCode, StreamCode
from miracle_hub.training.codes import Unit, codes_of
from miracle_hub.training.config import VariationalConfig

OPTIONS: list[dict[str, Any]] = [
    {},
    {"window_bits": 8},
    {"code": "block", "window_bits": 12},
    {"code": "block", "window_bits": 20},
]


def of_network(n_values: int, **options: Any) -> tuple[StreamCode, int]:
    """The code of a network and the bits of its message."""
    unit = Unit("network", n_values)
    code = codes_of([unit], VariationalConfig(streams="network", **options))[unit.name]
    assert sum(n for n, _ in code.segments(n_values)) == n_values
    assert min(n for n, _ in code.segments(n_values)) >= 1
    return code, code.message_bits(n_values)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("n_values", [3_000, 10_900, 431_080])
def test_the_bits_of_a_message_are_used_to_99_percent_and_never_exceeded(
    n_values: int, options: dict[str, Any]
) -> None:
    low, high = 0.09, 7.9
    for i in range(40):
        bits = int(n_values * low * (high / low) ** (i / 39))
        code, used = of_network(n_values, message_bits=bits, **options)
        left = code.window_bits - 1 if "code" in options else 0  # less than a block
        assert min(0.99 * bits, bits - left) <= used <= bits


def test_the_message_of_10_883_bits_that_used_8_718_is_used_up() -> None:
    code, used = of_network(10_883, message_bits=10_883)
    assert isinstance(code, SplitCode) and 0.999 * 10_883 <= used <= 10_883
    assert (code.first.rate, code.rest.rate) == (1.0, 0.8) and code.n_first > 0.9 * 10_883


@pytest.mark.parametrize(("bits", "blocks", "weights"), [(12_420, 621, 40), (24_840, 1242, 20)])
def test_a_message_that_one_code_uses_up_has_one(bits: int, blocks: int, weights: int) -> None:
    code, used = of_network(24_830, message_bits=bits, code="block", window_bits=20)
    assert not isinstance(code, SplitCode) and (code.steps(24_830), code.step_weights) == (blocks, weights)
    assert used == bits


@pytest.mark.parametrize("rate", [0.93, 1.0, 1.2, 1.9, 3.7, 5.5])
def test_a_rate_is_the_mean_over_streams_the_small_first(rate: float) -> None:
    units = [Unit("a", 64 * 200, 64), Unit("b", 96 * 130, 130), Unit("c", 32 * 40, 32), Unit("d", 77)]
    codes = codes_of(units, VariationalConfig(rate=rate))
    sizes = {unit.name: unit.n_values for unit in units}
    by_stream = {
        name: sum(n * c.rate for n, c in code.segments(sizes[name])) / sizes[name]
        for name, code in codes.items()
    }
    mean = sum(by_stream[name] * n for name, n in sizes.items()) / sum(sizes.values())
    assert 0.99 * rate <= mean <= rate * (1 + 1e-9)
    in_order = [by_stream[name] for name in sorted(sizes, key=lambda name: sizes[name])]
    assert in_order == sorted(in_order, reverse=True)
    assert sum(isinstance(code, SplitCode) for code in codes.values()) <= 1
    for unit in units:
        code = codes[unit.name]
        assert not isinstance(code, SplitCode) or code.n_first % unit.row_values == 0


def test_bits_that_no_codes_use_up_are_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "miracle_hub"):
        _, used = of_network(5, message_bits=19, window_bits=14)
    assert used == 18
    assert caplog.messages == [
        "message_bits: of 19 bits for 5 values 18 are used: no two neighboring codes come nearer; other "
        "window_bits, or another budget, may be used up"
    ]
