"""Philox4x32-10, the counter-based generator of Random123, in exact integer arithmetic.

The definition of the project's randomness: every other implementation must equal it.
"""

from jaxtyping import Int64
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_WORD = 0xFFFFFFFF


def _multiply(factor: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a 32 × 32 bit product; int64 wraps, its bits stay right."""
    product = word * factor
    return (product >> 32) & _WORD, product & _WORD


def philox4x32(
    counter: tuple[Int64[Tensor, " n"], int | Int64[Tensor, " n"], int, int], seed: int
) -> tuple[Int64[Tensor, " n"], ...]:
    """The four 32-bit output words of each counter, as int64 in [0, 2³²).

    Args:
        counter: four words, low word first; the first one varies.
        seed: 64 bits; the key is (low word, high word).

    Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", section 4.
    """
    first = counter[0]
    c0, c1, c2, c3 = (first * 0 + word for word in counter)
    key0, key1 = seed & _WORD, seed >> 32
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(_MULTIPLIERS[0], c0)
        high1, low1 = _multiply(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ key0, low1, high0 ^ c3 ^ key1, low0
        key0, key1 = (key0 + _WEYL[0]) & _WORD, (key1 + _WEYL[1]) & _WORD
    return c0, c1, c2, c3
