"""The encoders' own noise: uniform and Gumbel draws from counters. It is no part of the format."""

from ._triton import tl, triton
from .candidates import philox

# The fourth word of the counter says whose noise it is; candidates have 0 and permutations 1 (FORMAT.md of
# miracle-hub), the noise of variational weights 2.
SLIDE = tl.constexpr(3)
SELECT_TILE = tl.constexpr(4)
SELECT_SPLIT = tl.constexpr(5)
SELECT_CANDIDATE = tl.constexpr(6)


@triton.jit
def uniform(seed, first, second, third, DOMAIN: tl.constexpr):
    """Draws inside (0, 1), one per counter (first, second, third, DOMAIN); `first` gives the shape."""
    zero = first.to(tl.int64) * 0
    second, third, domain = (zero + second).to(tl.uint32), (zero + third).to(tl.uint32), zero + DOMAIN
    word, _, _, _ = philox(first.to(tl.uint32), second, third, domain.to(tl.uint32), seed)
    # 23 bits and a half are as many as float32 holds: the largest draw stays below 1.
    return ((word >> 9).to(tl.float32) + 0.5) * (1.0 / (1 << 23))


@triton.jit
def gumbel(seed, first, second, third, DOMAIN: tl.constexpr):
    """Standard Gumbel draws: the largest of log-weights plus these is a draw in proportion to the weights."""
    return -tl.log(-tl.log(uniform(seed, first, second, third, DOMAIN)))
