"""Token-level bounds hold as often as they say where the source is known, and are below Azuma's."""

import hashlib
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from miracle_hub import TokenCertificate
from miracle_hub.codec.token_certificate import ALPHAS, BETS, cost_range, token_certificate_of_files
from miracle_hub.coding.bounds import bernoulli_kl, betting_bound
from miracle_hub.errors import DataError, OptionError

V, TOKENS, RUNS, DELTA = 8, 150, 120, 0.1
FILES = 256  # models, one for every file of one byte


def tables(seed: int, sharpness: float, n: int = 1) -> Tensor:
    """Random transition tables `[n, V, V]`."""
    generator = torch.Generator().manual_seed(seed)
    return (sharpness * torch.randn(n, V, V, generator=generator)).double().softmax(-1)


def sequences(source: Tensor) -> Tensor:
    """Tokens of a Markov source, `[runs, tokens + 1]`."""
    generator, found = torch.Generator().manual_seed(1), torch.zeros(RUNS, TOKENS + 1, dtype=torch.int64)
    for i in range(TOKENS):
        found[:, i + 1] = source[found[:, i]].multinomial(1, generator=generator)[:, 0]
    return found


def failures(source: Tensor, models: Tensor, folder: Path, *, fitted: bool) -> float:
    """How often what the next token costs the best model of a sample, in its contexts, is above its bound."""
    (folder / "f").write_bytes(b"x")
    n_failures = 0
    for run in sequences(source):
        contexts, came = run[:-1], run[1:]
        chosen = int(models[:, contexts, came].log().sum(1).argmax())
        p, none = models[chosen, contexts, came], torch.zeros(TOKENS, dtype=torch.bool)
        found = token_certificate_of_files([folder / "f"], p, none, V, fitted=fitted, delta=DELTA)
        mixed = (1 - found.alpha) * models[chosen] + found.alpha / V
        true = float(-(source[contexts] * mixed[contexts].log()).sum(1).mean())
        n_failures += true > found.bound
    return n_failures / RUNS


@pytest.mark.parametrize("sharpness", [0.0, 1.5], ids=["uniform source", "source with a pattern"])
def test_the_bound_of_a_fitted_model_holds_as_often_as_promised(sharpness: float, tmp_path: Path) -> None:
    """The best of 256 models, each a file of one byte."""
    models = tables(2, 1.0, FILES)
    assert failures(tables(0, sharpness)[0], models, tmp_path, fitted=True) <= DELTA


def test_the_bound_of_a_model_that_was_not_chosen_holds_as_often_as_promised(tmp_path: Path) -> None:
    source = tables(0, 1.5)[0]
    assert failures(source, source[None], tmp_path, fitted=False) <= DELTA


def test_a_bound_without_the_files_bits_fails_for_the_best_of_many_models(tmp_path: Path) -> None:
    """A control: models that have one row of the sample by heart, chosen with a view to it."""
    (tmp_path / "f").write_bytes(b"x")
    generator, fails = torch.Generator().manual_seed(3), 0
    for _ in range(20):
        came = torch.randint(2, (2**12, TOKENS), generator=generator)
        truth = torch.randint(2, (TOKENS,), generator=generator)
        hits = (came == truth).sum(1)
        p = torch.where(came[hits.argmax()] == truth, 0.75, 0.25).double()
        none = torch.zeros(TOKENS, dtype=torch.bool)
        options: dict[str, Any] = dict(fitted=False, delta=0.9)
        found = token_certificate_of_files([tmp_path / "f"], p, none, 2, **options)
        true = -0.5 * math.log(0.75) - 0.5 * math.log(0.25)  # of a coin that is guessed with 3/4
        nats = math.log(1 / 0.9)  # without the grid, to show what a union is for
        low, high = found.range_nats
        bare = low + (high - low) * betting_bound(found.mean_log, found.bet, nats / TOKENS)
        fails += bare < true
    assert fails > 2


@given(
    st.lists(st.floats(0, 1), min_size=1, max_size=60),
    st.sampled_from(BETS),
    st.floats(1e-6, 3),
)
@settings(max_examples=100, deadline=None, derandomize=True)
def test_a_bet_is_never_above_the_bound_of_a_coin_nor_below_the_mean(
    costs: list[float], bet: float, nats: float
) -> None:
    """log(1 - λ·y) ≥ y·log(1 - λ), with which it is Catoni's; and Jensen's inequality the other way."""
    y = np.array(costs)
    found = betting_bound(float(np.log1p(-bet * y).mean()), bet, nats)
    coin = betting_bound(float(y.mean() * math.log1p(-bet)), bet, nats)
    assert y.mean() * (1 - 1e-9) - 1e-12 <= found <= coin + 1e-12 <= 1 + 1e-9


def test_the_best_bet_on_coins_is_the_inverse_of_kl() -> None:
    """Catoni's bound at its best λ: kl(q ‖ p) = nats."""
    for q, nats in ((0.1, 0.05), (0.3, 0.2), (0.02, 1.0)):
        bound = min(betting_bound(q * math.log1p(-bet), bet, nats) for bet in BETS)
        assert nats <= bernoulli_kl(q, bound) <= 1.06 * nats


def certificate(folder: Path, p: Tensor, n_bytes: int = 100, *, fitted: bool = True, **options: Any) -> Any:
    (folder / "f").write_bytes(bytes(n_bytes))
    none = torch.zeros(len(p), dtype=torch.bool)
    given: dict[str, Any] = {"is_repeated": none, "vocabulary": 512, "delta": 0.05, **options}
    return token_certificate_of_files([folder / "f"], p, fitted=fitted, **given)


def probabilities(n: int) -> Tensor:
    return torch.rand(n, generator=torch.Generator().manual_seed(0)).double() ** 3


@pytest.mark.parametrize("n_bytes", [100, 3000])
@pytest.mark.parametrize("fitted", [True, False])
def test_the_bound_is_below_azumas_of_the_best_share(n_bytes: int, fitted: bool, tmp_path: Path) -> None:
    p = probabilities(20_000)
    found = certificate(tmp_path, p, n_bytes, fitted=fitted)
    nats = found.description_bits * math.log(2) + math.log(len(ALPHAS) / 0.05)
    azuma = []
    for alpha in ALPHAS:
        low, high = cost_range(alpha, 512)
        cost = -((1 - alpha) * p + alpha / 512).log().mean()
        azuma.append(float(cost) + (high - low) * math.sqrt(nats / (2 * len(p))))
    assert found.nats_per_token < found.bound < min(azuma) and not found.is_vacuous


def test_more_bytes_fewer_tokens_and_a_smaller_delta_make_a_larger_bound(tmp_path: Path) -> None:
    p = probabilities(20_000)
    base = certificate(tmp_path, p).bound
    assert base < certificate(tmp_path, p, 200).bound
    assert base < certificate(tmp_path, p[:10_000]).bound
    assert base < certificate(tmp_path, p, delta=1e-6).bound
    assert certificate(tmp_path, p, fitted=False).bound < base


def test_a_bound_no_better_than_guessing_is_called_vacuous(tmp_path: Path) -> None:
    found = certificate(tmp_path, probabilities(1000), 10_000)
    assert found.is_vacuous and found.bound >= math.log(512)
    assert found.statement.startswith("Vacuous. With probability 0.95, the next token costs at most 6.")
    assert "(guessing: 6.2383 nats)" in found.statement


def test_tokens_that_a_model_rules_out_cost_what_the_uniform_guess_gives_them(tmp_path: Path) -> None:
    """A probability of 0, or NaN, is no error and no infinite cost."""
    p = probabilities(1000)
    for bad in (0.0, math.nan):
        spoiled = torch.cat((p, torch.full((9,), bad, dtype=torch.float64)))
        found = certificate(tmp_path, spoiled, fitted=False)
        assert certificate(tmp_path, p, fitted=False).bound < found.bound < math.inf


def test_copies_of_texts_tighten_nothing(tmp_path: Path) -> None:
    p = probabilities(3000)
    once = certificate(tmp_path, p, fitted=False)
    again = torch.cat((torch.zeros(3000), torch.ones(6000))).bool()
    found = certificate(tmp_path, p.repeat(3), fitted=False, is_repeated=again, texts=9, repeated=6)
    assert found == replace(once, texts=9, repeated=6)
    assert "6 of the 9 texts repeat earlier ones; copies are no evidence" in found.statement


def test_the_statement_has_the_inequality_and_what_it_assumes(tmp_path: Path) -> None:
    found = certificate(tmp_path, probabilities(20_000))
    assert found.sha256 == hashlib.sha256(bytes(100)).hexdigest()
    low, high = found.range_nats
    up = math.ceil(1e4 * found.bound) / 1e4
    assert found.statement.startswith(f"With probability 0.95, the next token costs at most {up:.4f} nats (")
    assert (
        f"{low:.4f} + {high - low:.4f} (1 - exp({found.mean_log:.6g} - (811 ln 2 + ln(744/0.05)) / 20000)) / "
        f"{found.bet:.4g}. The mean is over the contexts of these tokens"
    ) in found.statement
    assert "architecture, tokenizer and decoder were fixed without them" in found.statement
    held_out = certificate(tmp_path, probabilities(20_000), fitted=False).statement
    assert "Bound from 20,000 held-out tokens" in held_out and "made nor chosen with a view to" in held_out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": 0}, "at least one token to predict, found 0"),
        ({"tokens": math.inf}, "tokens: expected a whole number, found inf"),
        ({"tokens": True}, "tokens: expected a whole number, found True"),
        ({"vocabulary": 1}, "vocabulary: expected at least 2, found 1"),
        ({"n_bytes": -1}, "n_bytes: expected at least 1, found -1"),
        ({"fitted": "no"}, "fitted: expected True"),
        ({"delta": 0}, "delta: expected a probability"),
        ({"alpha": 0.3}, "alpha: expected one of ALPHAS"),
        ({"bet": 0.3}, "bet: expected one of BETS"),
        ({"nats_per_token": math.nan}, "nats_per_token: expected"),
        ({"mean_log": 0.1}, "mean_log: expected"),
        ({"repeated": 2}, "repeated: expected 0 to 1, found 2"),
    ],
    ids=str,
)
def test_impossible_numbers_are_refused(change: dict[str, Any], message: str) -> None:
    sound: dict[str, Any] = dict(
        tokens=9, vocabulary=512, n_bytes=100, fitted=True, alpha=ALPHAS[3], bet=BETS[9], nats_per_token=2.0,
        mean_log=-0.001,
    )  # fmt: skip
    TokenCertificate(**sound)
    with pytest.raises((OptionError, DataError), match=message):
        TokenCertificate(**{**sound, **change})


def test_no_tokens_certify_nothing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="at least one token to predict, found 0"):
        certificate(tmp_path, probabilities(0))
