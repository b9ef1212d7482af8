"""The thin payload: a difference to a base as the product of two thin factors, and what that leaves.

FORMAT.md, "Thin payload", has its fields and limits; this module reads and writes what is around its
payloads.
"""

import math
import struct
from dataclasses import dataclass

from miracle_hub.code import MAX_DIMENSIONS
from miracle_hub.errors import FormatError
from miracle_hub.format import frame
from miracle_hub.format.payload import DTYPES, Header, decode_header
from miracle_hub.format.varint import encode_varint, read_varint

MAGIC = b"MRCT"
VERSION = 1
# Two factors of 2 bits and rank 1 stand for 10,000 weights per byte in matrices of 40,000 × 40,000. A reader
# compares the shape with the base's, which has as many weights, before it makes any.
WEIGHTS_PER_BYTE = 1 << 14
_MAX_WEIGHTS = 1 << 40
_TRAILER = struct.Struct("<fQ")
_FRAME = frame.Frame(MAGIC, (VERSION,), "thin payload", _TRAILER.size + 4)


@dataclass(frozen=True)
class ThinHeader:
    """What a decoder must know of a difference besides the payloads of its parts.

    Attributes:
        dtype: of the sum with the base.
        shape: of the tensor, two dimensions or more.
        relative_error: as in a payload's header.
        digest: of the float32 weights.
    """

    dtype: str
    shape: tuple[int, ...]
    relative_error: float
    digest: int

    @property
    def rows(self) -> int:
        """Of the matrix that the factors make up."""
        return self.shape[0]

    @property
    def columns(self) -> int:
        """Of that matrix."""
        return math.prod(self.shape[1:])


@dataclass(frozen=True)
class Parts:
    """Three payloads: the factors [rank, rows] and [rank, columns], and what their product leaves, a
    difference in the tensor's shape, which may be missing.
    """

    left: bytes
    right: bytes
    rest: bytes = b""


def encode_thin(header: ThinHeader, parts: Parts) -> bytes:
    """Header and parts as one payload; `decode_thin` reads it back."""
    return _FRAME.seal(
        _before(header, len(parts.left), len(parts.right)) + parts.left + parts.right + parts.rest
    )


def _before(header: ThinHeader, n_left: int, n_right: int) -> bytes:
    numbers = [DTYPES.index(header.dtype), len(header.shape), *header.shape, n_left, n_right]
    return b"".join(map(encode_varint, numbers)) + _TRAILER.pack(header.relative_error, header.digest)


def thin_bytes(shape: tuple[int, ...], n_left: int, n_right: int) -> int:
    """Of all that is before the parts, two of which are so long."""
    return frame.SIZE + len(_before(ThinHeader("F32", shape, 0.0, 0), n_left, n_right))


def decode_thin(data: bytes, where: str) -> tuple[ThinHeader, Parts]:
    """Header and parts, whose headers are checked.

    Args:
        data: the whole payload.
        where: the tensor's name, for messages.

    Raises:
        FormatError: and its subclasses, for every way in which the payload can be wrong but its digests.
    """
    _FRAME.check(data, where)
    at = frame.SIZE

    def varint(what: str, low: int, high: int) -> int:
        nonlocal at
        number, at = read_varint(data, at, what, (low, high), where)
        return number

    dtype = DTYPES[varint("a dtype", 0, len(DTYPES) - 1)]
    n_dimensions = varint("a number of dimensions", 2, MAX_DIMENSIONS)
    shape = tuple(varint("a dimension", 1, _MAX_WEIGHTS) for _ in range(n_dimensions))
    n_left, n_right = (varint(f"the length of the {side} factor", 1, len(data)) for side in ("left", "right"))
    start = at + _TRAILER.size
    if start + n_left + n_right > len(data):
        raise _defect(where, at, f"factors of {n_left} and {n_right} bytes", f"{len(data) - at} bytes in all")
    error, digest = _TRAILER.unpack_from(data, at)
    if not 0 <= error < math.inf:
        raise _defect(where, at, "a relative squared error of 0 or more", error)
    if math.prod(shape) > min(_MAX_WEIGHTS, WEIGHTS_PER_BYTE * len(data)):
        raise _defect(where, at, f"at most {WEIGHTS_PER_BYTE} weights for each of {len(data)} bytes", shape)
    header = ThinHeader(dtype, shape, error, digest)
    middle, end = start + n_left, start + n_left + n_right
    parts = Parts(data[start:middle], data[middle:end], data[end:])
    _check(header, parts, start, where)
    return header, parts


def _check(header: ThinHeader, parts: Parts, start: int, where: str) -> None:
    """
    Raises:
        FormatError: and its subclasses: the parts do not fit each other.
    """
    left, right = (decode_header(part, where)[0] for part in (parts.left, parts.right))
    rank = left.shape[0] if left.shape else 0
    wanted = ((rank, header.rows), (rank, header.columns))
    if (left.shape, right.shape) != wanted or left.is_difference or right.is_difference:
        found = f"shapes {list(left.shape)} and {list(right.shape)}"
        raise _defect(where, start, f"weights of shapes {list(wanted[0])} and {list(wanted[1])}", found)
    if not parts.rest:
        return
    rest: Header = decode_header(parts.rest, where)[0]
    if rest.shape != header.shape or not rest.is_difference:
        raise _defect(
            where, start, f"a difference of shape {list(header.shape)}", f"shape {list(rest.shape)}"
        )


def _defect(where: str, at: int, expected: str, found: object) -> FormatError:
    return FormatError(
        f"{where}: byte {at} of the thin payload: expected {expected}, found {found}; the file is damaged or "
        "was not written by miracle-hub"
    )
