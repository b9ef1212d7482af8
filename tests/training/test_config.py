"""Options of a variational fine-tuning: what a budget buys, and what is refused."""

import math
from typing import Any

import pytest

from miracle_hub.code import MAX_STEP_WEIGHTS, Code
from miracle_hub.errors import BudgetError, MiracleError, OptionError
from miracle_hub.training.config import VariationalConfig

EXACTLY_ONE = "budget: expected exactly one of bits_per_weight, size, rate and message_bits"


@pytest.mark.parametrize(("bits", "blocks", "weights"), [(12_420, 621, 40), (24_840, 1242, 20)])
def test_blocks_of_the_papers_lenet_are_the_papers(bits: int, blocks: int, weights: int) -> None:
    """Havasi et al. 2019, table 1: 1.52 kB and 3.03 kB for 24,830 values in blocks of 20 bits."""
    config = VariationalConfig(message_bits=bits, streams="network", code="block", window_bits=20)
    code = config.code_for(24_830, "LeNet-5")
    assert (code.steps(24_830), code.step_weights, code.step_bits) == (blocks, weights, 20)
    assert code.message_bits(24_830) == bits


def sliding_codes(window_bits: int) -> list[Code]:
    """Every code that a sliding stream may get."""
    steps = range(1, min(4, window_bits) + 1)
    codes = [Code(window_bits, k, v, 7) for k in steps for v in range(1, 257) if math.gcd(k, v) == 1]
    return codes + [Code(window_bits, k, 1, 7) for k in range(1, min(8, window_bits) + 1)]


@pytest.mark.parametrize("n_values", [1, 17, 1000, 24_830])
@pytest.mark.parametrize("rate", [0.05, 0.5, 1.0, 2.7, 6.0])
@pytest.mark.parametrize("window_bits", [3, 14])
def test_a_sliding_code_has_the_highest_rate_whose_message_is_within_the_bits(
    n_values: int, rate: float, window_bits: int
) -> None:
    bits = max(1, int(rate * n_values))
    config = VariationalConfig(message_bits=bits, streams="network", window_bits=window_bits, seed=7)
    fitting = [code for code in sliding_codes(window_bits) if code.message_bits(n_values) <= bits]
    if not fitting:
        with pytest.raises(BudgetError, match=f"^w: {bits} bits for {n_values} values are"):
            config.code_for(n_values, "w")
        return
    found = config.code_for(n_values, "w")
    assert found in fitting
    assert found.rate == max(code.rate for code in fitting)


@pytest.mark.parametrize("rate", [0.05, 0.5, 1.0, 2.7, 6.0])
@pytest.mark.parametrize("window_bits", [3, 14])
def test_the_rate_is_that_of_a_long_message(rate: float, window_bits: int) -> None:
    """Else the L - k bits of the first window would cost a whole step of the ladder, 1 → 4/5."""
    config = VariationalConfig(rate=rate, window_bits=window_bits, seed=7)
    rates = [code.rate for code in sliding_codes(window_bits) if code.rate <= rate]
    assert config.code_for(1000, "w").rate == max(rates)


@pytest.mark.parametrize("n_values", [1, 17, 1000])
@pytest.mark.parametrize("rate", [0.06, 0.5, 1.0, 12.0])
def test_a_block_code_has_as_many_blocks_as_the_budget_pays_for(n_values: int, rate: float) -> None:
    config = VariationalConfig(rate=rate, code="block", window_bits=12)
    n_blocks = int(rate * n_values) // 12
    if n_blocks == 0 or n_values > n_blocks * MAX_STEP_WEIGHTS:
        with pytest.raises(BudgetError, match="are less than a block code with windows of 12 bits"):
            config.code_for(n_values, "w")
        return
    code = config.code_for(n_values, "w")
    assert code.overlap_bits == 0 and code.message_bits(n_values) <= int(rate * n_values)
    # One value less per block would cost more blocks than the budget pays for.
    assert code.step_weights == 1 or -(-n_values // (code.step_weights - 1)) > n_blocks


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, BudgetError, f"{EXACTLY_ONE}, found none; give one of them"),
        (
            {"rate": 1.0, "message_bits": 9},
            BudgetError,
            f"{EXACTLY_ONE}, found rate and message_bits; give one of them",
        ),
        (
            {"message_bits": 9},
            BudgetError,
            "message_bits: expected streams='network', whose message they are of, found 'tensor'; ",
        ),
        (
            {"message_bits": 9.5, "streams": "network"},
            BudgetError,
            "message_bits: expected a positive whole number, found 9.5; ",
        ),
        (
            {"message_bits": 0, "streams": "network"},
            BudgetError,
            "message_bits: expected a positive whole number, found 0; ",
        ),
        (
            {"bits_per_weight": 64},
            BudgetError,
            "bits_per_weight: expected a number above 0 and below 64, found 64; ",
        ),
        ({"size": "much"}, OptionError, "size: expected a positive number of bytes such as 5.5MB, "),
        (
            {"target_modules": "layer.(1"},
            OptionError,
            "target_modules: expected a regular expression, found 'layer.(1' (missing ), unterminated ",
        ),
        (
            {"exclude_modules": 5},
            OptionError,
            "exclude_modules: expected a list of names or a regular expression, found 5; write ['name'] ",
        ),
        (
            {"rate": 0.0},
            BudgetError,
            "rate: expected more than 0 and at most 24 bits per coded value, found 0.0; ",
        ),
        (
            {"rate": float("nan")},
            BudgetError,
            "rate: expected more than 0 and at most 24 bits per coded value, ",
        ),
        (
            {"rate": 24.5},
            BudgetError,
            "rate: expected more than 0 and at most 24 bits per coded value, found 24.5; ",
        ),
        (
            {"rate": "1"},
            BudgetError,
            "rate: expected more than 0 and at most 24 bits per coded value, found '1'; choose another value",
        ),
        (
            {"window_bits": 0},
            BudgetError,
            "window_bits: expected 1 to 24 bits per block or window, found 0; choose another value",
        ),
        (
            {"window_bits": 25},
            BudgetError,
            "window_bits: expected 1 to 24 bits per block or window, found 25; ",
        ),
        (
            {"window_bits": 8.0},
            BudgetError,
            "window_bits: expected 1 to 24 bits per block or window, found 8.0; ",
        ),
        (
            {"kl_block_weights": 0},
            OptionError,
            "kl_block_weights: expected 1 to 1024, found 0; ",
        ),
        (
            {"kl_block_weights": 1025},
            OptionError,
            "kl_block_weights: expected 1 to 1024, found 1025",
        ),
        ({"code": "huffman"}, OptionError, "code: expected one of ('sliding', 'block'), found 'huffman'"),
        (
            {"parametrization": "mean"},
            OptionError,
            "parametrization: expected one of ('mean-kl', 'mean-var', 'test-channel'), found 'mean'",
        ),
        ({"streams": "layer"}, OptionError, "streams: expected one of ('tensor', 'network'), found 'layer'"),
        ({"selection": "first"}, OptionError, "selection: expected one of ('best', 'sample'), found 'first'"),
        (
            {"sharing_kind": "none"},
            OptionError,
            "sharing_kind: expected one of ('hash', 'tile'), found 'none'",
        ),
        (
            {"sharing": {"w": 0.5}, "streams": "network"},
            OptionError,
            "sharing: expected a factor of 1 or more for 'w', found 0.5; leave out what is not shared",
        ),
        (
            {"sharing": {"w": "2"}, "streams": "network"},
            OptionError,
            "sharing: expected a factor of 1 or more for 'w', found '2'; ",
        ),
        (
            {"sharing": {"w": 2}},
            OptionError,
            "sharing: expected streams='network', found 'tensor', whose files cannot say which weights share",
        ),
        ({"beta": 0.0}, OptionError, "beta: expected a positive number, found 0.0"),
        (
            {"beta_rate": -1.0},
            OptionError,
            "beta_rate: expected a positive number, found -1.0",
        ),
    ],
    ids=str,
)
def test_options_that_cannot_be_are_refused(
    options: dict[str, Any], error: type[MiracleError], message: str
) -> None:
    budgets = {"rate", "message_bits", "bits_per_weight", "size"}
    budget = {} if budgets & options.keys() or not options else {"rate": 1.0}
    with pytest.raises(error) as raised:
        VariationalConfig(**{**budget, **options})
    assert str(raised.value).startswith(message)


def test_a_budget_that_values_cannot_use_is_refused() -> None:
    config = VariationalConfig(message_bits=1000, streams="network")
    with pytest.raises(
        BudgetError, match="^3 tensors: 1000 bits for 41 values are more than 24 bits for each; "
    ):
        config.code_for(41, "3 tensors")
    with pytest.raises(BudgetError) as raised:
        VariationalConfig(message_bits=13, streams="network").code_for(13, "head.bias")
    assert str(raised.value) == (
        "head.bias: 13 bits for 13 values are less than a sliding code with windows of 14 bits and at most "
        "256 values per step can use; raise the budget, share weights, or choose shorter windows"
    )
