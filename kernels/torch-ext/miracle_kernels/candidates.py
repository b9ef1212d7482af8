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


@triton.jit
def philox_halves(first, second, third, fourth, seed):
    """uint32 halves `[*shape, 8]` of the counters (first, second, third, fourth), each `[*shape]` uint32."""
    w0, w1, w2, w3 = tl.philox(seed, first, second, third, fourth)
    # join adds a last dimension of 2: this order makes the flat index 4·(w div 2) + 2·(w mod 2) + half.
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    return tl.join(words & 0xFFFF, words >> 16)


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
