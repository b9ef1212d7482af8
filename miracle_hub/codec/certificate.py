"""Certificates: how often a classifier errs at most, from its errors on a sample and the size of its file.

Two bounds, for two relations between network and sample. Both hold with probability 1 - δ over the draw of n
independent examples from one distribution. R is the risk, the chance of an error on a further example of that
distribution; r is the share of errors on the sample.

    fitted     for all files at once, hence for the one that was chosen with a view to the sample (Occam):

                   kl(r ‖ R) ≤ (bits · ln 2 + ln(1/δ)) / n    where r < R

               `bits` is the length of the whole file in a prefix-free code. By Chernoff's bound this fails
               for one file with probability at most δ · 2^-bits; by Kraft's inequality these add up to at
               most δ. A file holds whatever may be chosen with a view to the sample: message, scales, plain
               tensors and, in its headers, the code's parameters, seed, order, sharing and rates.
    held-out   for one network that was neither made nor chosen with a view to the sample:

                   kl(r ‖ R) ≤ ln(1/δ) / n                    where r < R

No file pays for the architecture (config.json or the module), the classes, the tokenizer and its options, the
decoder (this package), δ, and which of the two bounds it is: fix them before the sample is seen. Training on
altered copies of the examples is fine; errors are counted on the examples themselves.

A decoded network is one classifier, not a distribution over classifiers, so no PAC-Bayes bound is needed: for
the point mass on a file it would be the first inequality with ln(2√n) added to its numerator. Inverting the
binomial tail itself instead of Chernoff's bound on it would be a little tighter.

Examples that repeat earlier ones, input and label, are what independent draws may give, or copies, which are
no evidence. A sample does not say which. So the bound is the larger one of all examples and of the distinct.

Source: Zhou et al. 2019 (arXiv:1804.05862) and Lotfi et al. 2022 (arXiv:2211.13609), bounds by compressed
size; Langford 2005, "Tutorial on practical prediction theory for classification", the Occam bound.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from miracle_hub.coding.bounds import description_bits, inverse_kl
from miracle_hub.errors import DataError, OptionError


@dataclass(frozen=True)
class Certificate:
    """A bound on the risk of one network, from counts. See this module for what it assumes.

    Attributes:
        errors: of the network on the sample.
        examples: of the sample, each counted once.
        classes: that it chooses among.
        n_bytes: of all files that hold its weights, whole.
        fitted: the sample may have been used to make or choose the network; False promises that it was not.
        delta: chance, over the draw of the sample, that the bound is wrong; chosen before.
        sha256: of the files, one after the other.
        repeated: examples that repeat an earlier one, and `repeated_errors` how many of them are errors.
    """

    errors: int
    examples: int
    classes: int
    n_bytes: int
    fitted: bool
    delta: float = 0.05
    sha256: str = ""
    repeated: int = field(default=0, compare=False)
    repeated_errors: int = field(default=0, compare=False)

    def __post_init__(self) -> None:
        """
        Raises:
            DataError: there are no examples.
            OptionError: a number is impossible.
        """
        check_delta(self.delta)
        check_fitted(self.fitted)
        check_count("examples", self.examples, None)
        if self.examples < 1:
            raise DataError(
                f"certificate: expected at least one example, found {self.examples}; look at the data"
            )
        check_count("errors", self.errors, 0, self.examples)
        check_count("classes", self.classes, 2)
        check_count("n_bytes", self.n_bytes, 1)
        check_count("repeated", self.repeated, 0, self.examples)
        most, right = min(self.errors, self.repeated), self.examples - self.errors
        check_count("repeated_errors", self.repeated_errors, max(0, self.repeated - right), most)

    @property
    def description_bits(self) -> int:
        """What the choice of the network cost: its files' bits if it may depend on the sample, else none."""
        return description_bits(int(self.n_bytes)) if self.fitted else 0

    @property
    def bound(self) -> float:
        """The risk is at most this, with probability 1 - delta."""
        return self._bound(*self._counted)

    @property
    def _counted(self) -> tuple[int, int]:
        """Errors and examples that the bound is of: all of them, or the distinct ones if that is more."""
        everything = (self.errors, self.examples)
        distinct = (self.errors - self.repeated_errors, self.examples - self.repeated)
        return max(everything, distinct, key=lambda counts: self._bound(*counts))

    def _bound(self, errors: int, examples: int) -> float:
        nats = self.description_bits * math.log(2) - math.log(self.delta)
        return inverse_kl(errors / examples, nats / examples) if examples else 1.0

    @property
    def is_vacuous(self) -> bool:
        """No better than answers drawn uniformly at random, whose risk is 1 - 1/classes anywhere."""
        return self.bound >= 1 - 1 / self.classes

    @property
    def statement(self) -> str:
        """The bound, what it rests on, and what must be true for it to hold, for people. Rounded up."""
        (errors, examples), n = self._counted, f"{self.examples:,}"
        if self.fitted:
            kind = (
                f"Occam bound from the {n} examples that it may be fitted to, {self.errors:,} of them wrong, "
            )
            kind += f"and its {self.description_bits:,} bits: "
            nats = f"({self.description_bits} ln 2 + ln(1/{self.delta:g}))"
            fixed = "architecture, classes, tokenizer and decoder were fixed without them"
        else:
            kind = f"Bound from {n} held-out examples, {self.errors:,} of them wrong: "
            nats = f"ln(1/{self.delta:g})"
            fixed = (
                "the network was neither made nor chosen with a view to them (to choose among N: delta / N)"
            )
        risk = f"{math.ceil(1e4 * self.bound) / 100:.2f} % (guessing: {100 - 100 / self.classes:.4g} %)"
        vacuous = "Vacuous. " if self.is_vacuous else ""
        return (
            f"{vacuous}With probability {1 - self.delta:.10g}, the error is at most {risk}. "
            f"{kind}kl({errors}/{examples} ‖ error) ≤ {nats} / {examples}. {self._repetitions}It holds if "
            f"the examples are independent draws from one distribution and {fixed}."
        )

    @property
    def _repetitions(self) -> str:
        """What examples that are there more than once mean for the bound."""
        if not self.repeated:
            return ""
        distinct, wrong = self.examples - self.repeated, self.errors - self.repeated_errors
        return (
            f"{self.repeated:,} of the examples repeat earlier ones, input and label; copies are no "
            "evidence, so this is the larger one of the bounds of all of them and of the "
            f"{distinct:,} distinct ones, {wrong:,} of them wrong. "
        )


def check_count(name: str, found: Any, low: int | None, high: int | None = None) -> None:
    """
    Raises:
        OptionError: it is no whole number, or out of range.
    """
    is_whole = isinstance(found, Integral) and not isinstance(found, bool)
    n = int(found) if is_whole else 0
    if not is_whole or (low is not None and n < low) or (high is not None and n > high):
        wanted = "a whole number" if low is None else f"at least {low}"
        wanted = wanted if high is None else f"{low} to {high}"
        raise OptionError(f"certificate: {name}: expected {wanted}, found {found!r}; count again")


def check_fitted(fitted: object) -> None:
    """
    Raises:
        OptionError: it is neither True nor False.
    """
    if not isinstance(fitted, bool):
        raise OptionError(
            "fitted: expected True (--fitted: the network may depend on the examples) or False (--held-out: "
            f"it does not), found {fitted!r}; say what the examples were used for"
        )


def check_delta(delta: Any) -> None:
    """
    Raises:
        OptionError: it is no probability that a bound can have.
    """
    if isinstance(delta, bool) or not isinstance(delta, Real) or not 0 < float(delta) < 1:
        raise OptionError(
            f"delta: expected a probability above 0 and below 1, found {delta}; 0.05 makes a bound that "
            "holds with probability 0.95"
        )


def certificate_of_files(
    files: Sequence[Path],
    errors: int,
    examples: int,
    classes: int,
    *,
    fitted: bool,
    delta: float,
    repeated: int = 0,
    repeated_errors: int = 0,
) -> Certificate:
    """The certificate of the network that files hold.

    Raises:
        DataError, OptionError: what `Certificate` raises.
    """
    counts, (n_bytes, sha256) = (errors, examples, classes), size_and_sha256(files)
    return Certificate(*counts, n_bytes, fitted, delta, sha256, repeated, repeated_errors)


def size_and_sha256(files: Sequence[Path]) -> tuple[int, str]:
    """Of files as one string: safetensors files end where their headers say, so that it can be cut again."""
    n_bytes, checksum = 0, hashlib.sha256()
    for file in files:
        data = file.read_bytes()
        n_bytes += len(data)
        checksum.update(data)
    return n_bytes, checksum.hexdigest()
