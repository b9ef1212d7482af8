"""Certificates of language models: what the next token costs at most, from a sample and the size of the file.

The model's predictions are mixed with a uniform guess, so that no token can cost more than a known number: of
a vocabulary of V tokens, one of probability p costs -ln((1 - α)·p + α/V) nats, from a = -ln(1 - α + α/V) to
b = ln(V/α). Let Y = (cost - a)/(b - a), in [0, 1]; n tokens; and M the mean over them of the expectation of Y
for a token that is drawn anew, given all that came before it. With probability 1 - δ

    M ≤ (1 - exp(mean ln(1 - λ·Y) - nats/n)) / λ            (coding/bounds.py has the proof)

    fitted     for all files, all α of `ALPHAS` and all λ of `BETS` at once:
                   nats = bits · ln 2 + ln(|ALPHAS|·|BETS|/δ)
    held-out   for one model that was neither made nor chosen with a view to the tokens:
                   nats = ln(|ALPHAS|·|BETS|/δ)

by a union, as in codec/certificate.py: α and λ may be chosen last, with a view to the tokens. What is bounded
is the mean cost of a next token in the contexts of the sample, a + (b - a)·M. Nothing is assumed of how the
tokens came about: they may depend on each other in any way. (Where a source copies texts, the expectation
knows that too; copies say nothing of other texts, so that the larger bound counts, with them or without.)

Source: Lotfi et al. 2024 (arXiv:2407.18158) for tokens as data, martingales and smoothing, with Azuma's
inequality on b - a; Finzi et al. 2025 (arXiv:2504.15208) for bounds that know the spread of costs. The bet is
one inequality below both Azuma's and Catoni's that knows the spread.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Real
from pathlib import Path

import torch
from jaxtyping import Bool, Float64
from torch import Tensor

from miracle_hub.codec.certificate import check_count, check_delta, check_fitted, size_and_sha256
from miracle_hub.coding.bounds import betting_bound, description_bits
from miracle_hub.errors import DataError, OptionError

# Shares of the uniform guess, and bets. Choices: neighbors are so near that the best of them loses little,
# and all pairs cost ln 744 = 6.6 nats of the numerator.
ALPHAS = tuple(2.0 ** (-i / 2) for i in range(1, 25))
BETS = tuple(1 / (1 + math.exp(-i / 2)) for i in range(-18, 13))
_CHOSEN_ON = 4096  # tokens that α and λ are chosen on, which need not be the best ones; a choice, for speed
_CHUNK = 1 << 14  # tokens at a time: a choice that bounds memory


@dataclass(frozen=True)
class TokenCertificate:
    """A bound on what the next token costs one language model. See this module for what it says.

    Attributes:
        tokens: that were predicted, each once.
        vocabulary: tokens that the model chooses among.
        n_bytes: of all files that hold its weights, whole.
        fitted: the tokens may have been used to make or choose the model; False promises that they were not.
        alpha: share of the uniform guess in the predictions.
        bet: λ.
        nats_per_token: mean cost of the tokens, with the uniform guess mixed in.
        mean_log: mean of ln(1 - λ·Y).
        delta: chance that the bound is wrong; chosen before.
        sha256: of the files, one after the other.
        texts: that the tokens are of, and `repeated` how many of these repeat an earlier one.
        window: tokens that a prediction and its context can have together; 0 for any number.
    """

    tokens: int
    vocabulary: int
    n_bytes: int
    fitted: bool
    alpha: float
    bet: float
    nats_per_token: float
    mean_log: float
    delta: float = 0.05
    sha256: str = ""
    texts: int = 1
    repeated: int = 0
    window: int = 0

    def __post_init__(self) -> None:
        """
        Raises:
            DataError: there are no tokens.
            OptionError: a number is impossible.
        """
        check_delta(self.delta)
        check_fitted(self.fitted)
        check_count("tokens", self.tokens, None)
        if self.tokens < 1:
            raise DataError(
                f"certificate: expected at least one token to predict, found {self.tokens}; give longer texts"
            )
        for name, low in (("vocabulary", 2), ("n_bytes", 1), ("texts", 1)):
            check_count(name, getattr(self, name), low)
        check_count("repeated", self.repeated, 0, self.texts)
        check_count("window", self.window, 0)
        for name, grid in (("alpha", ALPHAS), ("bet", BETS)):
            if getattr(self, name) not in grid:
                raise OptionError(
                    f"certificate: {name}: expected one of {name.upper()}S of codec/token_certificate.py, "
                    f"which the bound is a union over, found {getattr(self, name)!r}; take one of these"
                )
        self._check_costs()

    def _check_costs(self) -> None:
        (low, high), lost = self.range_nats, math.log1p(-self.bet)
        for name, least, most in (("nats_per_token", low, high), ("mean_log", lost, 0.0)):
            found, room = getattr(self, name), 1e-9 * (most - least)
            if (
                isinstance(found, bool)
                or not isinstance(found, Real)
                or not (least - room <= float(found) <= most + room)
            ):
                raise OptionError(
                    f"certificate: {name}: expected {least:.6g} to {most:.6g}, found {found!r}; count again"
                )

    @property
    def range_nats(self) -> tuple[float, float]:
        """What a token costs at least and at most."""
        return cost_range(self.alpha, self.vocabulary)

    @property
    def description_bits(self) -> int:
        """What the choice of the model cost: its files' bits if it may depend on the tokens, else none."""
        return description_bits(int(self.n_bytes)) if self.fitted else 0

    @property
    def bound(self) -> float:
        """The next token costs at most this many nats in the mean, with probability 1 - delta."""
        nats = _nats(self.n_bytes, self.fitted, self.delta) / self.tokens
        return _bound(self.range_nats, self.bet, self.mean_log, nats)

    @property
    def bits_per_token(self) -> float:
        """The bound in bits."""
        return self.bound / math.log(2)

    @property
    def is_vacuous(self) -> bool:
        """No better than a uniform guess, which costs ln(vocabulary) nats anywhere."""
        return self.bound >= math.log(self.vocabulary)

    @property
    def statement(self) -> str:
        """The bound, what it rests on, and what must be true for it to hold, for people. Rounded up."""
        kind = f"Bound from {self.tokens:,} held-out tokens"
        fixed = "the model was neither made nor chosen with a view to them (to choose among N: delta / N)"
        if self.fitted:
            kind = f"Occam bound from the {self.tokens:,} tokens that it may be fitted to"
            kind += f" and its {self.description_bits:,} bits"
            fixed = "architecture, tokenizer and decoder were fixed without them"
        kind += f" in windows of {self.window:,}" if self.window else ""
        vacuous = "Vacuous. " if self.is_vacuous else ""
        return (
            f"{vacuous}With probability {1 - self.delta:.10g}, the next token costs at most "
            f"{_up(self.bound)} nats ({_up(self.bits_per_token)} bits) in the mean (guessing: "
            f"{math.log(self.vocabulary):.4f} nats). {kind}, at {self.nats_per_token:.4f} nats each with a "
            f"uniform guess mixed in by {self.alpha:.4g}: {self._formula}. {self._repetitions}The mean is "
            "over the contexts of these tokens, and of each over the token that may come next, given all "
            f"before it. It holds for tokens of any origin if {fixed}."
        )

    @property
    def _formula(self) -> str:
        low, high = self.range_nats
        nats = f"ln({len(ALPHAS) * len(BETS)}/{self.delta:g})"
        nats = f"({self.description_bits} ln 2 + {nats})" if self.fitted else nats
        exponent = f"{self.mean_log:.6g} - {nats} / {self.tokens}"
        return f"{low:.4f} + {high - low:.4f} (1 - exp({exponent})) / {self.bet:.4g}"

    @property
    def _repetitions(self) -> str:
        if not self.repeated:
            return ""
        return (
            f"{self.repeated:,} of the {self.texts:,} texts repeat earlier ones; copies are no evidence, so "
            "this is the larger one of the bounds of all of them and of the distinct ones. "
        )


def cost_range(alpha: float, vocabulary: int) -> tuple[float, float]:
    """Nats that a token costs at least and at most, if predictions are mixed with a uniform guess."""
    return -math.log(1 - alpha + alpha / vocabulary), math.log(vocabulary / alpha)


def _nats(n_bytes: int, fitted: bool, delta: float) -> float:
    """The numerator of the bound: what the choice of file, α and λ cost, and confidence."""
    bits = description_bits(int(n_bytes)) if fitted else 0
    return bits * math.log(2) + math.log(len(ALPHAS) * len(BETS)) - math.log(delta)


def _bound(range_nats: tuple[float, float], bet: float, mean_log: float, nats: float) -> float:
    low, high = range_nats
    return low + (high - low) * betting_bound(mean_log, bet, nats)


def _up(number: float) -> str:
    return f"{math.ceil(1e4 * number) / 1e4:.4f}"


def token_certificate_of_files(
    files: Sequence[Path],
    probabilities: Float64[Tensor, " tokens"],
    is_repeated: Bool[Tensor, " tokens"],
    vocabulary: int,
    *,
    fitted: bool,
    delta: float,
    texts: int = 1,
    repeated: int = 0,
    window: int = 0,
) -> TokenCertificate:
    """The certificate of the language model that files hold.

    Args:
        probabilities: that the model gave to the tokens that came; NaN counts as 0.
        is_repeated: which of them are of texts that repeat an earlier one.

    Raises:
        DataError, OptionError: what `TokenCertificate` raises.
    """
    n_bytes, sha256 = size_and_sha256(files)
    whole = (n_bytes, fitted, delta, sha256)
    p = probabilities.double().nan_to_num(0.0).clamp(0.0, 1.0)
    found = [_best(p, vocabulary, *whole)]
    if bool(is_repeated.any()):
        found.append(_best(p[~is_repeated], vocabulary, *whole))
    larger = max(found, key=lambda certificate: certificate.bound)
    return replace(larger, texts=texts, repeated=repeated, window=window)


def _best(
    p: Tensor, vocabulary: int, n_bytes: int, fitted: bool, delta: float, sha256: str
) -> TokenCertificate:
    """The bound of the share and the bet that are best for some of the tokens, evenly chosen.

    Raises:
        DataError: there are no tokens.
    """
    if not len(p):
        raise DataError("certificate: expected at least one token to predict, found 0; give longer texts")

    some, nats = p[:: -(-len(p) // _CHOSEN_ON)], _nats(n_bytes, fitted, delta) / len(p)
    tried = [
        (_bound(cost_range(alpha, vocabulary), bet, log, nats), alpha, bet)
        for alpha in ALPHAS
        for bet, log in zip(BETS, _means(some, alpha, BETS, vocabulary)[1], strict=True)
    ]
    _, alpha, bet = min(tried)
    cost, (log,) = _means(p, alpha, [bet], vocabulary)
    return TokenCertificate(len(p), vocabulary, n_bytes, fitted, alpha, bet, cost, log, delta, sha256)


def _means(p: Tensor, alpha: float, bets: Sequence[float], vocabulary: int) -> tuple[float, list[float]]:
    """Mean cost, and mean ln(1 - λ·Y) for every bet."""
    (low, high), chosen = cost_range(alpha, vocabulary), torch.tensor(bets).double()
    logs, total = torch.zeros_like(chosen), 0.0
    for some in p.split(_CHUNK):
        nats = -torch.log((1 - alpha) * some + alpha / vocabulary)
        share = ((nats - low) / (high - low)).clamp(0.0, 1.0)
        logs += torch.log1p(-chosen * share[:, None]).sum(0)
        total += float(nats.sum())
    return total / len(p), (logs / len(p)).tolist()
