"""float32 → a kernel's output dtype, round to nearest even everywhere."""

from ._triton import INTERPRETED, tl, triton

# Triton's interpreter truncates where every GPU rounds; there the rounding is done on the words.
_ON_WORDS = tl.constexpr(INTERPRETED)


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """A float32 tensor in `dtype` (float32, bfloat16 or float16)."""
    if _ON_WORDS and dtype == tl.bfloat16:
        word = x.to(tl.uint32, bitcast=True)
        word = (word + 0x7FFF + ((word >> 16) & 1)) >> 16
        return word.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(dtype)
