"""A tensor as a matrix, and a coded matrix: bands of rows, one stream each, and how they become weights."""

import math
from dataclasses import dataclass

from torch import Tensor

from miracle_hub.code import Code
from miracle_hub.coding.order import stream_order
from miracle_hub.coding.rotation import widest_rotation

# Sizes are met by the row: one of 64 rows at the next rate (a quarter more bits) is 0.4 % of a tensor.
FEWEST_ROWS = 64
_SHORTEST_ROW = 128
_LONGEST_CUT_ROW = 1024
# Rows this long always have their own scale: it costs at most 1/8 bit per weight. Choosing by the
# squared error alone kept one scale for half of MiniLM's matrices, and Spearman (STS-B dev) fell
# from 80.5 to 77.7 at 1.1 bits/weight: a channel matters by its own size. Shorter rows get
# whichever gives the smaller error at equal size.
ROW_SCALE_COLUMNS = 128


@dataclass(frozen=True)
class CodedRows:
    """Rows that share a stream.

    Attributes:
        scales: bfloat16 `[rows]` or `[1]`, each 0 or within [2⁻⁶⁴, 2⁶⁴].
        message: uint8 `[code.message_bytes(rows · columns)]`.
    """

    rows: int
    code: Code
    scales: Tensor
    message: Tensor


@dataclass(frozen=True)
class MatrixLayout:
    """What all rows of a matrix share; `rotation` 1 and `band_columns` 0 mean none."""

    columns: int
    rotation: int = 1
    band_columns: int = 0
    permuted: bool = False

    @property
    def is_banded(self) -> bool:
        """Whether rows lie in pieces, a piece in every band of columns, and are in order inside the bands."""
        return not self.permuted and 0 < self.band_columns < self.columns

    def order(self, rows: int, code: Code) -> Tensor | None:
        """Row-major position of every stream element, or None where that is the identity."""
        return stream_order(rows, self.columns, self.band_columns, self.permuted, code)


def matrix_columns(shape: tuple[int, ...]) -> int:
    """Columns of a tensor's matrix view: all but the first dimension, or the last of stacked matrices.

    Convolutions (out, in, height, width) have one row per output channel; a stack of matrices, such
    as experts (experts, in, out) or position embeddings (1, positions, width), has one row per
    last-dimension vector, so that scales stay local. Vectors and matrices of few rows are cut up.
    """
    stacked = len(shape) == 3 and min(shape[1:]) >= 32
    columns = shape[-1] if stacked or len(shape) == 1 else math.prod(shape[1:])
    n_weights = math.prod(shape)
    if n_weights // columns >= FEWEST_ROWS:
        return columns
    widths = range(_SHORTEST_ROW, min(_LONGEST_CUT_ROW, n_weights // FEWEST_ROWS) + 1)
    cuts = [width for width in widths if columns % width == 0]
    return max(cuts, key=lambda width: (widest_rotation(width), width), default=columns)
