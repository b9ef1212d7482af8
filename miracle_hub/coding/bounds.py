"""How far the risk of a classifier may lie above its share of errors: inverse kl, and bits of a description.

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


def description_bits(n_bytes: int) -> int:
    """Bits of a string of bytes in a prefix-free code: its length (Elias delta), then the string.

    Hence Σ 2^(-bits) over all strings of at least one byte is at most 1, which a union over them needs.

    Source: Elias 1975, "Universal codeword sets and representations of the integers".
    """
    length = n_bytes.bit_length()
    return 8 * n_bytes + (length - 1) + 2 * (length.bit_length() - 1) + 1
