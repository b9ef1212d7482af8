"""The KL that posteriors say they have is that of the Gaussians that are coded, and is paid for."""

import math
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributions import Normal, kl_divergence

from miracle_hub.code import Code
from miracle_hub.training.blocks import MAX_BLOCK_WEIGHTS, Budget, budget_of
from miracle_hub.training.coder import CodingOptions, code_model
from miracle_hub.training.config import PARAMETRIZATIONS, VariationalConfig
from miracle_hub.training.convert import make_variational
from miracle_hub.training.journal import Journal
from miracle_hub.training.stream import Stream

from .networks import posterior_of, streams_of


def exact(stream: Stream) -> torch.Tensor:
    """KL of every block in nats, by torch in float64, of what would be coded."""
    mean, variance = (x.double() for x in stream.moments())
    each = kl_divergence(Normal(mean, variance.sqrt()), Normal(0.0, 1.0))
    return stream.budget.sums(each)


def vector(n: int, scale: float = 0.1, **options: Any) -> nn.Module:
    """A variational model of one vector of weights."""
    model = nn.Linear(n, 1, bias=False)
    generator = torch.Generator().manual_seed(0)
    model.weight.data.copy_(scale * torch.randn(1, n, generator=generator))
    return make_variational(model, VariationalConfig(**{"target_modules": "all", **options}))


@pytest.mark.parametrize("kind", PARAMETRIZATIONS)
@pytest.mark.parametrize(
    ("rate", "window"), [(0.05, 14), (1.0, 14), (8.0, 16), (12, 12), (19, 19), (20, 20), (24, 24)]
)
def test_the_kl_of_blocks_is_that_of_the_gaussians_that_are_coded(
    kind: str, rate: float, window: int
) -> None:
    """Up to the largest rate there is, in blocks of which the last has a third of the others' values."""
    code = "sliding" if rate <= 8 else "block"
    model = vector(
        176 if code == "sliding" else 5, parametrization=kind, rate=rate, window_bits=window, code=code
    )
    (stream,) = streams_of(model)
    torch.testing.assert_close(stream.kl_nats().detach().double(), exact(stream), rtol=1e-5, atol=1e-5)


def test_a_budget_above_nineteen_bits_per_value_is_met_by_variances_alone() -> None:
    """A variance of 1e-12, the least that there used to be, stands for 19 bits where means have nothing."""
    model = vector(8, parametrization="mean-kl", rate=24, window_bits=24, code="block")
    (stream,) = streams_of(model)
    with torch.no_grad():
        posterior_of(stream).tau.zero_()
    assert float(stream.moments()[1].max()) < 1e-14
    torch.testing.assert_close(exact(stream), torch.full((8,), 24 * math.log(2)).double(), rtol=1e-5, atol=0)


@given(
    n_values=st.one_of(st.integers(1, 2000), st.integers(1, 10**6)),
    rate=st.sampled_from([0.02, 0.1, 0.5, 1.0, 3.0, 6.0, 8.0]),
    window=st.sampled_from([8, 12, 14, 20]),
    wanted=st.sampled_from([1, 16, 64, 128, 1024]),
    code=st.sampled_from(["sliding", "block"]),
)
@settings(max_examples=200, deadline=None, derandomize=True)
def test_all_blocks_together_have_the_bits_of_the_message(
    n_values: int, rate: float, window: int, wanted: int, code: str
) -> None:
    """Of the block code exactly; else a hundredth more at most, or the first window's bits less."""
    config = VariationalConfig(rate=rate, window_bits=window, code=code, kl_block_weights=wanted)
    assume(rate * n_values > 4 * window and rate * 200 > window)  # or the budget allows no message
    made = config.code_for(n_values, "w")
    budget, message = budget_of(made, n_values, wanted), made.message_bits(n_values)
    assert isinstance(budget, Budget)
    bits = budget.n_blocks(n_values) * budget.block_kl_nats / math.log(2)
    assert 0.999 * message - made.overlap_bits <= bits <= message * (1 if code == "block" else 1.01) + 1e-6
    assert budget.block_weights <= MAX_BLOCK_WEIGHTS and budget.block_weights % made.step_weights == 0


@pytest.mark.parametrize(("n_values", "wanted", "bits", "window"), [(1047, 1024, 1, 8), (162, 128, 3, 12)])
def test_a_short_last_block_takes_no_bits_that_nobody_pays_for(
    n_values: int, wanted: int, bits: int, window: int
) -> None:
    """The first used to be two blocks of 768: 46 % more KL than message bits; the second 16 % more."""
    code = Code(window, bits, 1)
    budget = budget_of(code, n_values, wanted)
    assert isinstance(budget, Budget)
    assert budget.n_blocks(n_values) * budget.block_kl_nats / math.log(2) <= code.message_bits(n_values)
    assert budget.kl_nats == pytest.approx(bits * math.log(2))


@pytest.mark.parametrize("kind", PARAMETRIZATIONS)
def test_the_journal_has_the_kl_of_a_short_last_block(kind: str) -> None:
    model = vector(162, parametrization=kind, rate=3.0, window_bits=6)
    (stream,) = streams_of(model)
    stream_kl = exact(stream) / math.log(2)
    stream.begin_coding()
    expected = float(exact(stream).sum()) / math.log(2)
    journal = Journal()
    code_model(model, journal=journal, options=CodingOptions(groups=1), progress=False)
    assert sum(row.kl_bits for row in journal.rows) == pytest.approx(expected, rel=1e-5)
    if kind == "mean-kl":
        assert float(stream_kl.sum()) <= stream.code.message_bits(162)
