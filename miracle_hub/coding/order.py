"""The order in which a matrix is read into a stream: bands of columns, then an optional permutation.

FORMAT.md, "Order", is normative.
"""

import torch
from jaxtyping import Int64
from torch import Tensor

from miracle_hub.code import Code, StreamCode
from miracle_hub.coding.philox import philox4x32

# Counters per call of Philox, whose dozen temporaries then stay in the cache, whatever a file asks for.
_CHUNK = 1 << 16


def banded_order(rows: int, columns: int, band_columns: int) -> Int64[Tensor, " n"]:
    """Row-major positions in reading order: band by band, rows inside a band, columns inside a row.

    Args:
        band_columns: width of a band; 0 means one band, which is plain row-major order. The
            last band is narrower when the width does not divide the columns.
    """
    positions = torch.arange(rows * columns).view(rows, columns)
    width = band_columns or max(columns, 1)
    n_whole = columns // width
    # Whole bands by one transposition: with a tensor each, a small file of narrow bands filled the memory.
    whole = positions[:, : n_whole * width].unflatten(1, (n_whole, width)).transpose(0, 1)
    return torch.cat((whole.flatten(), positions[:, n_whole * width :].flatten()))


def permutation(n: int, code: StreamCode) -> Int64[Tensor, " n"]:
    """A pseudo-random permutation: indices sorted by the first two Philox words of (i, 0, stream_id, 1).

    The 64-bit keys are compared as unsigned numbers (second word high); equal keys keep their order.
    """
    keys = torch.empty(n, dtype=torch.int64)
    for chunk in torch.arange(n).split(_CHUNK):
        low, high, _, _ = philox4x32((chunk, 0, code.stream_id, 1), code.seed)
        keys[chunk] = (high - 2**31) * 2**32 + low
    return torch.sort(keys, stable=True).indices


def stream_order(
    rows: int, columns: int, band_columns: int, permuted: bool, code: Code
) -> Int64[Tensor, " n"] | None:
    """Row-major position of every stream element, or None where that is the identity."""
    if not permuted and (band_columns == 0 or band_columns >= columns):
        return None
    order = banded_order(rows, columns, band_columns)
    return order[permutation(order.numel(), code)] if permuted else order
