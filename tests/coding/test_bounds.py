"""Inverse kl against closed forms and 50 digits; lengths of descriptions against Kraft's inequality."""

import math
from typing import Any

import mpmath
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom

from miracle_hub.coding.bounds import bernoulli_kl, description_bits, inverse_kl

shares = st.floats(0, 1)
nats = st.floats(1e-6, 50)


def precise_kl(q: float, p: float) -> Any:
    with mpmath.workdps(50):
        a, b = mpmath.mpf(q), mpmath.mpf(p)
        wrong = a * mpmath.log(a / b) if q else mpmath.mpf(0)
        return wrong + ((1 - a) * mpmath.log((1 - a) / (1 - b)) if q < 1 else 0)


@given(nats)
def test_without_errors_the_bound_is_in_closed_form(c: float) -> None:
    assert math.isclose(inverse_kl(0.0, c), -math.expm1(-c), rel_tol=1e-12)


@given(nats)
def test_with_errors_only_nothing_is_certain(c: float) -> None:
    assert inverse_kl(1.0, c) == 1.0


@given(shares, nats)
def test_it_inverts_kl_to_all_its_digits_and_from_above(q: float, c: float) -> None:
    p = inverse_kl(q, c)
    assert q <= p <= 1
    slack = 1e-15 * (1 + 1 / (1 - p)) if p < 1 else 0  # kl is rounded, steeply so near 1
    assert p == 1 or precise_kl(q, p) >= c - slack
    below = p * (1 - 1e-6)
    assert below <= q or precise_kl(q, below) <= c


@given(shares, shares, nats, nats)
def test_more_errors_and_more_bits_never_lower_the_bound(q: float, r: float, c: float, d: float) -> None:
    assert inverse_kl(min(q, r), c) <= inverse_kl(max(q, r), c)
    assert inverse_kl(q, min(c, d)) <= inverse_kl(q, max(c, d))


@given(shares, st.floats(0.001, 0.999))
def test_kl_is_that_of_50_digits_and_above_pinskers_bound(q: float, p: float) -> None:
    assert abs(bernoulli_kl(q, p) - precise_kl(q, p)) < 1e-14
    assert bernoulli_kl(q, p) >= 2 * (q - p) ** 2 - 1e-14


@pytest.mark.parametrize("n", [1, 7, 60, 1000])
def test_the_chance_of_an_error_count_below_the_bound_is_what_was_promised(n: int) -> None:
    """The exact chance, over all counts, that R > bound: at most exp(-n · nats), and not by far less."""
    for delta in (0.3, 0.05, 1e-6):
        bounds = [inverse_kl(k / n, -math.log(delta) / n) for k in range(n + 1)]
        wrong = [
            binom.cdf(sum(b < risk for b in bounds) - 1, n, risk) for risk in (0.01, 0.1, 0.37, 0.5, 0.9)
        ]
        assert max(wrong) <= delta
        assert n < 60 or delta < 1e-3 or max(wrong) > delta / 20


def test_all_descriptions_together_have_a_weight_of_one_at_most() -> None:
    """Kraft: 256^n strings of n bytes weigh 2^(8n - bits) together; beyond 2^20 bytes, by powers of two."""
    exact = math.fsum(2.0 ** (8 * n - description_bits(n)) for n in range(1, 2**20))
    tail = math.fsum(2.0 ** (e + 8 * 2**e - description_bits(2**e)) for e in range(20, 50))
    assert 0.9 < exact + tail <= 1


def test_a_length_costs_few_bits() -> None:
    assert [description_bits(n) - 8 * n for n in (1, 2, 3, 4, 255, 1650)] == [1, 4, 4, 5, 14, 17]
