"""The rows payload: some rows of a difference to a base, as a payload of their own; all other rows are zero.

FORMAT.md, "Rows payload", has its fields and limits; this module reads and writes what is before the payload.
"""

import math
from dataclasses import dataclass

from miracle_hub.code import MAX_DIMENSIONS
from miracle_hub.errors import FormatError
from miracle_hub.format import frame
from miracle_hub.format.payload import Header, decode_header
from miracle_hub.format.varint import encode_varint, read_varint

MAGIC = b"MRCR"
VERSION = 1
# As of the payload: what bounds the memory that a file of a given length can make a reader take.
WEIGHTS_PER_BYTE = 2048
_MAX_WEIGHTS = 1 << 40
_FRAME = frame.Frame(MAGIC, (VERSION,), "rows payload", 3)


@dataclass(frozen=True)
class RowsHeader:
    """What a decoder must know of a difference besides the payload of its rows.

    Attributes:
        shape: of the whole tensor, two dimensions or more.
        rows: a bit for each row, of the first dimension: whether it is among the payload's.
        inner: the header of their payload, whose shape is [rows that are, columns].
        start: where that payload begins.
    """

    shape: tuple[int, ...]
    rows: bytes
    inner: Header
    start: int


def encode_rows(shape: tuple[int, ...], rows: bytes, inner: bytes) -> bytes:
    """Shape, a bit for each row and their payload as one payload; `decode_rows` reads it back."""
    numbers = [len(shape), *shape]
    return _FRAME.seal(b"".join(map(encode_varint, numbers)) + rows + inner)


def rows_bytes(shape: tuple[int, ...]) -> int:
    """Of all that is before the payload of the rows."""
    return frame.SIZE + len(b"".join(map(encode_varint, [len(shape), *shape]))) + -(-shape[0] // 8)


def decode_rows(data: bytes, where: str) -> RowsHeader:
    """What is before the payload of the rows, and that one's header.

    Args:
        data: the whole payload.
        where: the tensor's name, for messages.

    Raises:
        FormatError: and its subclasses, for every way in which the payload can be wrong.
    """
    _FRAME.check(data, where)
    n_dimensions, at = read_varint(data, frame.SIZE, "a number of dimensions", (2, MAX_DIMENSIONS), where)
    shape: list[int] = []
    for _ in range(n_dimensions):
        n, at = read_varint(data, at, "a dimension", (1, _MAX_WEIGHTS), where)
        shape.append(n)
    if math.prod(shape) > min(_MAX_WEIGHTS, WEIGHTS_PER_BYTE * len(data)):
        raise _defect(where, at, f"at most {WEIGHTS_PER_BYTE} weights for each of {len(data)} bytes", shape)
    end = at + -(-shape[0] // 8)
    bits = int.from_bytes(data[at:end], "little")
    if len(data) < end or bits >> shape[0] or not bits:
        raise _defect(
            where, at, f"a bit for each of {shape[0]} rows, some of them set, and no others", data[at:end][:8]
        )
    inner, _ = decode_header(data[end:], where)
    wanted = (bits.bit_count(), math.prod(shape[1:]))
    if inner.shape != wanted or not inner.is_difference:
        expected = f"a difference of shape {list(wanted)}"
        raise _defect(where, end, expected, f"shape {list(inner.shape)}")
    return RowsHeader(tuple(shape), data[at:end], inner, end)


def _defect(where: str, at: int, expected: str, found: object) -> FormatError:
    return FormatError(
        f"{where}: byte {at} of the rows payload: expected {expected}, found {found}; the file is damaged or "
        "was not written by miracle-hub"
    )
