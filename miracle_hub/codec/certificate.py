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

Source: Zhou et al. 2019 (arXiv:1804.05862) and Lotfi et al. 2022 (arXiv:2211.13609), bounds by compressed
size; Langford 2005, "Tutorial on practical prediction theory for classification", the Occam bound.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

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
    """

    errors: int
    examples: int
    classes: int
    n_bytes: int
    fitted: bool
    delta: float = 0.05
    sha256: str = ""

    def __post_init__(self) -> None:
        """
        Raises:
            DataError: there are no examples.
            OptionError: a number is impossible.
        """
        check_delta(self.delta)
        if self.examples < 1:
            raise DataError(
                f"certificate: expected at least one example, found {self.examples}; look at the data"
            )
        for name, low, high in (("errors", 0, self.examples), ("classes", 2, None), ("n_bytes", 1, None)):
            if (found := getattr(self, name)) < low or (high is not None and found > high):
                wanted = f"at least {low}" if high is None else f"{low} to {high}"
                raise OptionError(f"certificate: {name}: expected {wanted}, found {found}; count again")

    @property
    def description_bits(self) -> int:
        """What the choice of the network cost: its files' bits if it may depend on the sample, else none."""
        return description_bits(self.n_bytes) if self.fitted else 0

    @property
    def bound(self) -> float:
        """The risk is at most this, with probability 1 - delta."""
        nats = self.description_bits * math.log(2) - math.log(self.delta)
        return inverse_kl(self.errors / self.examples, nats / self.examples)

    @property
    def is_vacuous(self) -> bool:
        """No better than answers drawn uniformly at random, whose risk is 1 - 1/classes anywhere."""
        return self.bound >= 1 - 1 / self.classes

    @property
    def statement(self) -> str:
        """The bound, what it rests on, and what must be true for it to hold, for people. Rounded up."""
        n, r = f"{self.examples:,}", f"{self.errors}/{self.examples}"
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
            f"{kind}kl({r} ‖ error) ≤ {nats} / {self.examples}. It holds if the examples are "
            f"independent draws from one distribution and {fixed}."
        )


def check_delta(delta: float) -> None:
    """
    Raises:
        OptionError: it is no probability that a bound can have.
    """
    if not 0 < delta < 1:
        raise OptionError(
            f"delta: expected a probability above 0 and below 1, found {delta}; 0.05 makes a bound that "
            "holds with probability 0.95"
        )


def certificate_of_files(
    files: Sequence[Path], errors: int, examples: int, classes: int, *, fitted: bool, delta: float
) -> Certificate:
    """The certificate of the network that files hold.

    Several files are one string: safetensors files end where their headers say, so that it can be cut again.

    Raises:
        DataError, OptionError: what `Certificate` raises.
    """
    n_bytes, checksum = 0, hashlib.sha256()
    for file in files:
        data = file.read_bytes()
        n_bytes += len(data)
        checksum.update(data)
    return Certificate(errors, examples, classes, n_bytes, fitted, delta, checksum.hexdigest())
