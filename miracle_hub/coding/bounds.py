"""How far a risk may lie above what a sample shows: inverse kl, a bet, and bits of a description.

Both are pure numbers; codec/certificate.py says what they certify, and under which assumptions.
"""

import math

_HALVINGS = 100  # of the bracket; near 0 there are too many floats to go on until two are adjacent


def bernoulli_kl(q: float, p: float) -> float:
    """kl(q ‖ p) = q·ln(q/p) + (1 - q)·ln((1 - q)/(1 - p)) in nats, for 0 ≤ q ≤ 1 and 0 < p < 1."""
    wrong = q * (math.log(q) - math.log(p)) if q > 0 else 0.0
    right = (1 - q) * (math.log1p(-q) - math.log1p(-p)) if q < 1 else 0.0
    return wrong + right


def inverse_kl(q: float, nats: float) -> float:
    """The greatest p in [q, 1] with kl(q ‖ p) ≤ nats, rounded up.

    By Chernoff's bound the share q̂ of errors among n independent examples obeys, for a classifier of risk R
    that was fixed before them,

        P( R > inverse_kl(q̂, nats) ) ≤ exp(-n · nats)

    Source: Langford 2005, "Tutorial on practical prediction theory for classification", section 3.
    """
    low, high = q, 1.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        if bernoulli_kl(q, middle) <= nats:
            low = middle
        else:
            high = middle
    return high


def betting_bound(mean_log: float, bet: float, nats: float) -> float:
    """The bound on a mean of expectations that a bet makes: (1 - exp(mean_log - nats)) / bet, at most 1.

    For numbers Y_1 … Y_n in [0, 1], whatever they depend on, let M be the mean of their expectations, each
    given all that came before it. For a bet λ in (0, 1) that was fixed before them,

        P( M > betting_bound(mean log(1 - λ·Y_i), λ, nats) ) ≤ exp(-n · nats)

    Proof: the product of (1 - λ·Y_i) / (1 - λ·E[Y_i | past]) has expectation 1, a factor at a time from the
    last one on. By Markov's inequality it exceeds exp(n·nats) with probability exp(-n·nats) at most; else
    Σ log(1 - λ·Y_i) - n·nats ≤ Σ log(1 - λ·E[Y_i | past]) ≤ n·log(1 - λ·M), the last by Jensen's. Since
    log(1 - λ·y) ≥ y·log(1 - λ), it is never above Catoni's bound of the same λ, nor that above Azuma's.

    Args:
        mean_log: mean of log(1 - λ·Y_i).
        bet: λ.

    Source: Waudby-Smith and Ramdas 2023 (arXiv:2010.09686), bets; Catoni 2007 (arXiv:0712.0248).
    """
    return min(1.0, -math.expm1(mean_log - nats) / bet)


def description_bits(n_bytes: int) -> int:
    """Bits of a string of bytes in a prefix-free code: its length (Elias delta), then the string.

    Hence Σ 2^(-bits) over all strings of at least one byte is at most 1, which a union over them needs.

    Source: Elias 1975, "Universal codeword sets and representations of the integers".
    """
    length = n_bytes.bit_length()
    return 8 * n_bytes + (length - 1) + 2 * (length.bit_length() - 1) + 1
