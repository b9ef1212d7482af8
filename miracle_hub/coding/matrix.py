"""A coded matrix: consecutive bands of rows, one stream each, and how they become weights."""

from dataclasses import dataclass

from torch import Tensor

from miracle_hub.coding.order import stream_order
from miracle_hub.config import Code


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

    def order(self, rows: int, code: Code) -> Tensor | None:
        """Row-major position of every stream element, or None where that is the identity."""
        return stream_order(rows, self.columns, self.band_columns, self.permuted, code)
