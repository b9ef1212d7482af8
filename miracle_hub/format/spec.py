"""A tensor as the headers of files describe it: name, dtype, shape."""

import math
from dataclasses import dataclass

# All others (bytes, truth values, the many float8) have 8.
_ITEM_BITS = {"F64": 64, "I64": 64, "U64": 64, "C64": 64, "F32": 32, "I32": 32, "U32": 32}
_ITEM_BITS |= {"F16": 16, "BF16": 16, "I16": 16, "U16": 16, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4}


@dataclass(frozen=True)
class TensorSpec:
    """One tensor.

    Attributes:
        dtype: as safetensors spells it.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def n_weights(self) -> int:
        """How many numbers it holds; 1 for a scalar."""
        return math.prod(self.shape)

    @property
    def is_bytes(self) -> bool:
        """Whether it is a string of bytes (see `bytes_entry`): a payload, a network's stream, or plain."""
        return self.dtype == "U8" and len(self.shape) == 1

    @property
    def n_bytes(self) -> int:
        """Of its numbers, stored plainly."""
        return self.n_weights * item_bits(self.dtype) // 8


def item_bits(dtype: str) -> int:
    """Size of one number of a safetensors dtype."""
    return _ITEM_BITS.get(dtype, 8)


def bytes_entry(name: str, n_bytes: int) -> TensorSpec:
    """How a file holds a string of bytes: as a vector of them."""
    return TensorSpec(name, "U8", (n_bytes,))
