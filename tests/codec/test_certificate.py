"""Certificates hold as often as they say, where risks are known; a bound that forgets the choice does not."""

import hashlib
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from miracle_hub.code import Code
from miracle_hub.codec.certificate import Certificate, certificate_of_files
from miracle_hub.coding.reference import candidates
from miracle_hub.errors import DataError, OptionError

DRAWS, EXAMPLES, INPUTS, DELTA = 1000, 60, 30, 0.1
# Linear classifiers whose weights are the 256 candidates of a file of one byte.
NETWORKS = candidates(torch.arange(256), Code(8, 8, INPUTS))
TEACHER = torch.zeros(INPUTS).index_fill(0, torch.tensor(0), 1.0)


def risks(noise: float) -> Tensor:
    """Of every network, exactly: labels are the teacher's, flipped with chance `noise`. `[256]`"""
    angles = torch.acos(NETWORKS @ TEACHER / NETWORKS.norm(dim=1))
    return noise + (1 - 2 * noise) * angles / math.pi


def errors(noise: float, generator: torch.Generator) -> Tensor:
    """Of every network on one sample. `[256]`"""
    x = torch.randn(EXAMPLES, INPUTS, generator=generator)
    flipped = torch.rand(EXAMPLES, 1, generator=generator) < noise
    labels = (x @ TEACHER > 0)[:, None] ^ flipped
    return ((x @ NETWORKS.T > 0) ^ labels).sum(0)


def failures(noise: float, *, fitted: bool, fresh: bool) -> float:
    """How often the risk of the network with the fewest errors on a sample is above its bound.

    `fresh`: the bound is made from another sample than the one that the network was chosen on.
    """
    generator = torch.Generator().manual_seed(0)
    bounds = torch.tensor([Certificate(k, EXAMPLES, 2, 1, fitted, DELTA).bound for k in range(EXAMPLES + 1)])
    n_failures = 0
    for _ in range(DRAWS):
        found = errors(noise, generator)
        chosen = int(found.argmin())
        seen = errors(noise, generator) if fresh else found
        n_failures += int(risks(noise)[chosen] > bounds[seen[chosen]])
    return n_failures / DRAWS


@pytest.mark.parametrize("noise", [0.5, 0.1], ids=["coins", "teacher"])
def test_the_bound_of_a_fitted_network_holds_as_often_as_promised(noise: float) -> None:
    assert failures(noise, fitted=True, fresh=False) <= DELTA


def test_the_bound_without_the_files_bits_fails_for_a_fitted_network() -> None:
    """Labels are coins, so that every risk is ½; 256 networks are enough for one that seems far better."""
    assert failures(0.5, fitted=False, fresh=False) > 0.9


@pytest.mark.parametrize("noise", [0.5, 0.1], ids=["coins", "teacher"])
def test_the_bound_of_held_out_examples_holds_as_often_as_promised(noise: float) -> None:
    assert failures(noise, fitted=False, fresh=True) <= DELTA


def test_a_lenet_of_1650_bytes_has_a_certificate_that_says_something() -> None:
    """0.5 % of MNIST's training images wrong."""
    lenet = Certificate(errors=300, examples=60_000, classes=10, n_bytes=1650, fitted=True)
    assert lenet.description_bits == 8 * 1650 + 17
    assert 0.15 < lenet.bound < 0.18 and not lenet.is_vacuous
    assert replace(lenet, n_bytes=33_000).bound > 0.9 and replace(lenet, n_bytes=33_000).is_vacuous
    assert replace(lenet, fitted=False).bound < 0.006 and replace(lenet, fitted=False).description_bits == 0


def test_a_smaller_delta_makes_a_larger_bound() -> None:
    for fitted in (True, False):
        certificate = Certificate(3, 200, 2, 10, fitted)
        assert certificate.bound < replace(certificate, delta=1e-6).bound


def percent(risk: float) -> str:
    """Rounded up."""
    return f"{math.ceil(1e4 * risk) / 100:.2f}"


def test_the_statement_of_a_fitted_network_has_the_inequality_and_what_it_assumes() -> None:
    certificate = Certificate(errors=300, examples=60_000, classes=10, n_bytes=1650, fitted=True)
    assert certificate.statement == (
        f"With probability 0.95, the error is at most {percent(certificate.bound)} % (guessing: 90 %). "
        "Occam bound from the 60,000 examples that it may be fitted to, 300 of them wrong, and its "
        "13,217 bits: kl(300/60000 ‖ error) ≤ (13217 ln 2 + ln(1/0.05)) / 60000. It holds if the "
        "examples are independent draws from one distribution and architecture, classes, tokenizer and "
        "decoder were fixed without them."
    )


def test_the_statement_of_held_out_examples_has_no_bits_and_what_it_assumes() -> None:
    certificate = Certificate(errors=70, examples=10_000, classes=10, n_bytes=1650, fitted=False, delta=0.01)
    assert certificate.statement == (
        f"With probability 0.99, the error is at most {percent(certificate.bound)} % (guessing: 90 %). "
        "Bound from 10,000 held-out examples, 70 of them wrong: kl(70/10000 ‖ error) ≤ ln(1/0.01) / "
        "10000. It holds if the examples are independent draws from one distribution and the network was "
        "neither made nor chosen with a view to them (to choose among N: delta / N)."
    )


def test_a_bound_no_better_than_guessing_is_called_vacuous() -> None:
    certificate = Certificate(errors=0, examples=100, classes=2, n_bytes=1000, fitted=True)
    assert certificate.is_vacuous
    assert certificate.statement.startswith(
        "Vacuous. With probability 0.95, the error is at most 100.00 % (guessing: 50 %)."
    )


def test_all_bytes_of_all_files_are_counted_and_identified(tmp_path: Path) -> None:
    files = [tmp_path / "a", tmp_path / "b"]
    files[0].write_bytes(b"one")
    files[1].write_bytes(b"three")
    certificate = certificate_of_files(files, 1, 10, 2, fitted=True, delta=0.05)
    assert certificate == Certificate(1, 10, 2, 8, True, 0.05, hashlib.sha256(b"onethree").hexdigest())


@pytest.mark.parametrize("delta", [0.0, 1.0, -0.1, 95.0, math.nan])
def test_a_delta_that_is_no_chance_is_refused(delta: float) -> None:
    with pytest.raises(OptionError, match="delta: expected a probability above 0 and below 1, found"):
        Certificate(1, 10, 2, 8, True, delta)


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ((-1, 10, 2, 8), "errors: expected 0 to 10, found -1"),
        ((11, 10, 2, 8), "errors: expected 0 to 10, found 11"),
        ((1, 10, 1, 8), "classes: expected at least 2, found 1"),
        ((1, 10, 2, 0), "n_bytes: expected at least 1, found 0"),
    ],
)
def test_impossible_counts_are_refused(counts: tuple[int, int, int, int], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Certificate(*counts, fitted=True)


def test_no_examples_certify_nothing() -> None:
    with pytest.raises(DataError, match="at least one example, found 0"):
        Certificate(0, 0, 2, 8, fitted=True)
