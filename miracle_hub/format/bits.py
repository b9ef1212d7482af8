"""The bits payload: what a tensor has beyond that of a base, every bit of it.

FORMAT.md, "Bits payload", has its fields and limits; this module reads and writes all but what is in pieces.
"""

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from miracle_hub.code import MAX_DIMENSIONS
from miracle_hub.errors import FormatError
from miracle_hub.format import frame
from miracle_hub.format.varint import encode_varint, read_varint

MAGIC = b"MRCB"
VERSION = 1
# Position in this tuple is the number in the file: append only.
DTYPES = ("F32", "BF16", "F16")
# Numbers of a piece, which is coded by itself, so that several are decoded at once.
PIECE = 1 << 20
# As of the payload: what bounds the memory that a file of a given length can make a reader take.
WEIGHTS_PER_BYTE = 2048
_MAX_WEIGHTS = 1 << 40
_DIGEST = struct.Struct("<Q")
_FRAME = frame.Frame(MAGIC, (VERSION,), "bits payload", _DIGEST.size + 4)


@dataclass(frozen=True)
class BitsHeader:
    """What a decoder must know of one tensor.

    Attributes:
        dtype, shape: of the tensor, and of the base's once it is cast.
        digest: of the bits of the tensor.
    """

    dtype: str
    shape: tuple[int, ...]
    digest: int

    @property
    def n_weights(self) -> int:
        """How many numbers it holds; 1 for a scalar."""
        return math.prod(self.shape)

    @property
    def n_pieces(self) -> int:
        """All of `PIECE` numbers but the last."""
        return -(-self.n_weights // PIECE)


# The two strings of a piece: what is coded by chances, and bits as they are.
Piece = tuple[bytes, bytes]


def encode_bits(header: BitsHeader, pieces: Sequence[Piece]) -> bytes:
    """Header and pieces as one payload, as long as readers want it at least; `decode_bits` is the mirror."""
    numbers = [DTYPES.index(header.dtype), len(header.shape), *header.shape]
    numbers += [len(string) for piece in pieces for string in piece]
    rest = b"".join(map(encode_varint, numbers)) + _DIGEST.pack(header.digest)
    rest += b"".join(string for piece in pieces for string in piece)
    return _FRAME.seal(rest.ljust(_least_bytes(header) - frame.SIZE, b"\0"))


def _least_bytes(header: BitsHeader) -> int:
    """Of a payload: a shorter one is filled with zero bytes."""
    return -(-header.n_weights // WEIGHTS_PER_BYTE)


def decode_bits(data: bytes, where: str) -> tuple[BitsHeader, list[Piece]]:
    """The header and the pieces, undecoded.

    Args:
        data: the whole payload.
        where: the tensor's name, for messages.

    Raises:
        FormatError: and its subclasses: it is damaged, or stands for more than its length allows.
    """
    _FRAME.check(data, where)
    number, at = read_varint(data, frame.SIZE, "a dtype", (0, len(DTYPES) - 1), where)
    n_dimensions, at = read_varint(data, at, "a number of dimensions", (0, MAX_DIMENSIONS), where)
    shape: list[int] = []
    for _ in range(n_dimensions):
        n, at = read_varint(data, at, "a dimension", (1, _MAX_WEIGHTS), where)
        shape.append(n)
    header = BitsHeader(DTYPES[number], tuple(shape), 0)
    if header.n_weights > min(_MAX_WEIGHTS, WEIGHTS_PER_BYTE * len(data)):
        raise _defect(where, at, f"at most {WEIGHTS_PER_BYTE} weights for each of {len(data)} bytes", shape)
    lengths: list[int] = []
    for _ in range(2 * header.n_pieces):
        n, at = read_varint(data, at, "a length", (0, len(data)), where)
        lengths.append(n)
    start = at + _DIGEST.size
    end = start + sum(lengths)
    if end > len(data):
        raise _defect(where, at, f"{end} bytes or more", len(data))
    if any(data[end:]) or len(data) != max(end, _least_bytes(header)):
        raise _defect(where, end, "the end, or zeros up to the least length", f"{len(data) - end} bytes")
    header = BitsHeader(header.dtype, header.shape, *_DIGEST.unpack_from(data, at))
    return header, _cut(data, start, lengths)


def _cut(data: bytes, start: int, lengths: Sequence[int]) -> list[Piece]:
    strings = []
    for length in lengths:
        strings.append(data[start : start + length])
        start += length
    return list(zip(strings[::2], strings[1::2], strict=True))


def _defect(where: str, at: int, expected: str, found: object) -> FormatError:
    return FormatError(
        f"{where}: byte {at} of the bits payload: expected {expected}, found {found}; the file is damaged or "
        "was not written by miracle-hub"
    )
