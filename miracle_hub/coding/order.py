"""The order in which a matrix is read into a stream: bands of columns, then an optional permutation."""

import torch
from jaxtyping import Int64
from torch import Tensor

from miracle_hub.coding.philox import philox4x32
from miracle_hub.config import Code


def banded_order(rows: int, columns: int, band_columns: int) -> Int64[Tensor, " n"]:
    """Row-major positions in reading order: band by band, rows inside a band, columns inside a row.

    Args:
        band_columns: width of a band; 0 means one band, which is plain row-major order. The
            last band is narrower when the width does not divide the columns.
    """
    positions = torch.arange(rows * columns).view(rows, columns)
    bands = positions.split(band_columns or max(columns, 1), dim=1)
    return torch.cat([band.flatten() for band in bands])


def permutation(n: int, code: Code) -> Int64[Tensor, " n"]:
    """A pseudo-random permutation: indices sorted by the first two Philox words of (i, 0, stream_id, 1).

    The 64-bit keys are compared as unsigned numbers (second word high); equal keys keep their order.
    """
    low, high, _, _ = philox4x32((torch.arange(n), 0, code.stream_id, 1), code.seed)
    keys = (high - 2**31) * 2**32 + low
    return torch.sort(keys, stable=True).indices


def stream_order(
    rows: int, columns: int, band_columns: int, permuted: bool, code: Code
) -> Int64[Tensor, " n"] | None:
    """Row-major position of every stream element, or None where that is the identity."""
    if not permuted and (band_columns == 0 or band_columns >= columns):
        return None
    order = banded_order(rows, columns, band_columns)
    return order[permutation(order.numel(), code)] if permuted else order
