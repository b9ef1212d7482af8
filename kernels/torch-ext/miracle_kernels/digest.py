"""The digest of decoded weights inside a kernel, and the same in torch: a 64-bit sum in any order.

x_i    = i · 0x9E3779B97F4A7C15 + bits(w_i)
digest = Σ_i splitmix64_finalizer(x_i)               everything modulo 2^64
"""

# What Triton's language means by these operators is not what its stubs say.
# pyright: reportAssignmentType=false

import torch
from torch import Tensor

from ._triton import tl, triton

_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB
# Bounds the int64 copies: 8 bytes per element, several at a time.
_CHUNK = 1 << 22


@triton.jit
def mixed_words(weights, positions):
    """uint64 terms of the digest of float32 weights at int64 positions."""
    GOLDEN: tl.constexpr = 0x9E3779B97F4A7C15
    MIX_1: tl.constexpr = 0xBF58476D1CE4E5B9
    MIX_2: tl.constexpr = 0x94D049BB133111EB
    words = weights.to(tl.uint32, bitcast=True).to(tl.uint64)
    x = positions.to(tl.uint64) * GOLDEN + words
    x = (x ^ (x >> 30)) * MIX_1
    x = (x ^ (x >> 27)) * MIX_2
    return x ^ (x >> 31)


def digest_torch(values: Tensor, first_index: int = 0) -> Tensor:
    """The digest of float32 values, in row-major order from `first_index` on, as a signed int64 `[]`.

    Source: the finalizer is that of splitmix64 (Steele et al. 2014).
    """
    flat = values.reshape(-1)
    total = torch.zeros((), dtype=torch.int64, device=values.device)
    for start in range(0, flat.numel(), _CHUNK):
        words = flat[start : start + _CHUNK].view(torch.int32).long() & 0xFFFFFFFF
        first = start + first_index
        index = torch.arange(first, first + words.numel(), device=values.device)
        x = index * _signed(_GOLDEN) + words
        x = (x ^ _shift_right(x, 30)) * _signed(_MIX_1)
        x = (x ^ _shift_right(x, 27)) * _signed(_MIX_2)
        total = total + (x ^ _shift_right(x, 31)).sum()
    return total


def _signed(word: int) -> int:
    return word - 2**64 if word >= 2**63 else word


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift of int64 words (torch shifts arithmetically)."""
    return (x >> bits) & (2 ** (64 - bits) - 1)
