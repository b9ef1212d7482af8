"""The digest of decoded values: a 64-bit sum that any device can compute in any order.

    x_i    = i · 0x9E3779B97F4A7C15 + bits(w_i)          bits: the float32 word as an unsigned number
    digest = Σ_i splitmix64_finalizer(x_i)               everything modulo 2^64

FORMAT.md, "Digest", is normative and says what a digest finds.
"""

import torch
from jaxtyping import Float32
from torch import Tensor

GOLDEN = 0x9E3779B97F4A7C15
MIX_1 = 0xBF58476D1CE4E5B9
MIX_2 = 0x94D049BB133111EB
_CHUNK = 1 << 20


def _signed(word: int) -> int:
    return word - 2**64 if word >= 2**63 else word


def _shift_right(x: Tensor, places: int) -> Tensor:
    """Logical shift of int64 words (torch shifts arithmetically)."""
    return (x >> places) & (2 ** (64 - places) - 1)


def digest(values: Float32[Tensor, " n"]) -> int:
    """The digest of float32 values in row-major order, in [0, 2⁶⁴).

    Source: the finalizer is that of splitmix64 (Steele et al. 2014, "Fast splittable
    pseudorandom number generators"); summing keyed words is our own use of it.
    """
    total = 0
    for start in range(0, values.numel(), _CHUNK):
        words = values[start : start + _CHUNK].contiguous().view(torch.int32).long() & 0xFFFFFFFF
        x = torch.arange(start, start + words.numel()) * _signed(GOLDEN) + words
        x = (x ^ _shift_right(x, 30)) * _signed(MIX_1)
        x = (x ^ _shift_right(x, 27)) * _signed(MIX_2)
        total += int((x ^ _shift_right(x, 31)).sum())
    return total % 2**64
