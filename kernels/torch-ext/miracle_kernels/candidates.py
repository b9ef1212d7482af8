"""Seeded candidates inside a kernel, and the same in torch: the code's one source of randomness.

    half[8·g + i] = i-th 16-bit half of Philox4x32-10(key = seed, counter = (state, g, stream_id, domain))

the low half of each output word first. The quantile table turns halves into normal draws.
"""

from typing import Union

import torch
from torch import Tensor

from ._triton import tl, triton

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF
_MULTIPLIER0, _MULTIPLIER1 = tl.constexpr(_MULTIPLIERS[0]), tl.constexpr(_MULTIPLIERS[1])
_WEYL0, _WEYL1 = tl.constexpr(_WEYL[0]), tl.constexpr(_WEYL[1])


@triton.jit
def philox(first, second, third, fourth, seed):
    """Four words uint32 of the counters (first, second, third, fourth), each `[*shape]` uint32.

    A product of 64 bits is one instruction, its two halves by themselves are two: 40 instructions, not the
    60 of tl.philox (sm_90).
    """
    key = tl.cast(seed, tl.uint64)
    low, high = key.to(tl.uint32), (key >> 32).to(tl.uint32)
    for _ in tl.static_range(10):  # pyright: ignore[reportGeneralTypeIssues]
        one, other = first.to(tl.uint64) * _MULTIPLIER0, third.to(tl.uint64) * _MULTIPLIER1
        first, third = (other >> 32).to(tl.uint32) ^ second ^ low, (one >> 32).to(tl.uint32) ^ fourth ^ high
        second, fourth = other.to(tl.uint32), one.to(tl.uint32)
        low, high = low + _WEYL0, high + _WEYL1
    return first, second, third, fourth


@triton.jit
def philox_halves(first, second, third, fourth, seed):
    """uint32 halves `[8, n]` of the counters (first, second, third, fourth), each `[n]` uint32.

    The eight of a counter lie in one thread so, as they come: joined behind each other, Triton would pass
    them between threads, through shared memory.
    """
    w0, w1, w2, w3 = philox(first, second, third, fourth, seed)
    half = tl.arange(0, 8)[:, None]
    low = tl.where(half < 2, w0[None, :], w1[None, :])
    word = tl.where(half < 4, low, tl.where(half < 6, w2[None, :], w3[None, :]))
    return (word >> (half % 2 * 16).to(tl.uint32)) & 0xFFFF


def philox_halves_torch(counter: tuple[Tensor, Union[int, Tensor], int, int], seed: int) -> Tensor:
    """int64 `[n, 8]`, the reference of `philox_halves` for varying words `[n]`.

    Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", section 4.
    """
    c0, c1, c2, c3 = (counter[0].long() * 0 + word for word in counter)
    key0, key1 = seed & _WORD, seed >> 32 & _WORD
    for _ in range(10):
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1 = (p1 >> 32) & _WORD ^ c1 ^ key0, p1 & _WORD
        c2, c3 = (p0 >> 32) & _WORD ^ c3 ^ key1, p0 & _WORD
        key0, key1 = (key0 + _WEYL[0]) & _WORD, (key1 + _WEYL[1]) & _WORD
    words = torch.stack((c0, c1, c2, c3), dim=1)
    return torch.stack((words & 0xFFFF, words >> 16), dim=2).flatten(1)
