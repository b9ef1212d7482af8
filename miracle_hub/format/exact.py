"""The exact payload: one tensor of any dtype as fewer bytes, every bit of it kept.

FORMAT.md, "Exact payload", has its fields and limits; this module reads and writes its header.
"""

import math
import struct
from dataclasses import dataclass

from miracle_hub.code import MAX_DIMENSIONS
from miracle_hub.errors import FormatError
from miracle_hub.format import frame
from miracle_hub.format.spec import item_bits
from miracle_hub.format.varint import encode_varint, read_varint

MAGIC = b"MRCX"
VERSION = 1
# Position in this tuple is the number in the file: append only.
DTYPES = (
    *("F32", "BF16", "F16", "F64", "I64", "I32", "I16", "I8", "U8", "BOOL", "U64", "U32", "U16"),
    *("F8_E4M3", "F8_E5M2", "F8_E8M0", "C64"),
)
# A byte then stands for no more weights than one of a trellis's payload does.
WEIGHTS_PER_BYTE = 2048
# Indices then have 16 bits at most, and the sorted words are a small part of what they save.
MOST_WORDS = 1 << 16
_MAX_WEIGHTS = 1 << 40
PALETTE, DEFLATED_PALETTE, DEFLATED_PLANES, DEFLATED_DIFFERENCES = range(4)
_DIGEST = struct.Struct("<Q")
_FRAME = frame.Frame(MAGIC, (VERSION,), "exact payload", _DIGEST.size + 3)


@dataclass(frozen=True)
class ExactHeader:
    """What a decoder must know of one tensor.

    Attributes:
        form: how its words are written: one of the four above.
        n_words: different ones that it holds, listed in the payload; 0 where they are not.
    """

    dtype: str
    shape: tuple[int, ...]
    form: int
    n_words: int = 0
    digest: int = 0

    @property
    def n_weights(self) -> int:
        """How many numbers it holds; 1 for a scalar."""
        return math.prod(self.shape)

    @property
    def item_bytes(self) -> int:
        """Of one number."""
        return item_bits(self.dtype) // 8

    @property
    def index_bits(self) -> int:
        """Of the place of a word in the list."""
        return max(1, (self.n_words - 1).bit_length())

    @property
    def body_bytes(self) -> int:
        """Of indices, or of planes, before they are deflated."""
        if self.n_words:
            return -(-self.n_weights * self.index_bits // 8)
        return self.n_weights * self.item_bytes


def encode_exact(header: ExactHeader, words: bytes, body: bytes) -> bytes:
    """Header, the list of words and the body as one payload, as long as a reader wants it at least."""
    numbers = [DTYPES.index(header.dtype), len(header.shape), *header.shape, header.form]
    numbers += [header.n_words] if header.form in (PALETTE, DEFLATED_PALETTE) else []
    rest = b"".join(map(encode_varint, numbers)) + _DIGEST.pack(header.digest) + words + body
    return _FRAME.seal(rest.ljust(least_bytes(header) - frame.SIZE, b"\0"))


def least_bytes(header: ExactHeader) -> int:
    """Of a payload: a shorter one is filled with zero bytes."""
    return -(-header.n_weights // WEIGHTS_PER_BYTE)


def decode_exact(data: bytes, where: str) -> tuple[ExactHeader, int]:
    """The header at the start of `data` and its length; nothing is inflated.

    Args:
        data: the whole payload.
        where: the tensor's name, for messages.

    Raises:
        FormatError: and its subclasses: it is damaged, or stands for more than its length allows.
    """
    _FRAME.check(data, where)
    reader = _Reader(data, where)
    header = reader.header()
    if header.n_weights > WEIGHTS_PER_BYTE * len(data):
        raise reader.fail(
            f"at most {WEIGHTS_PER_BYTE} weights for each of {len(data)} bytes", f"shape {list(header.shape)}"
        )
    least = reader.position + header.n_words * header.item_bytes
    least += header.body_bytes if header.form == PALETTE else 0
    if len(data) < least:
        raise reader.fail(f"{least} bytes or more", len(data))
    return header, reader.position


class _Reader:
    """A cursor over an untrusted header."""

    def __init__(self, data: bytes, where: str) -> None:
        self.data, self.where, self.position = data, where, frame.SIZE

    def fail(self, expected: str, found: object) -> FormatError:
        return FormatError(
            f"{self.where}: byte {self.position} of the exact payload: expected {expected}, found {found}; "
            "the file is damaged or was not written by miracle-hub"
        )

    def varint(self, what: str, low: int, high: int) -> int:
        number, self.position = read_varint(self.data, self.position, what, (low, high), self.where)
        return number

    def header(self) -> ExactHeader:
        dtype = DTYPES[self.varint("a dtype", 0, len(DTYPES) - 1)]
        n_dimensions = self.varint("a number of dimensions", 0, MAX_DIMENSIONS)
        shape = tuple(self.varint("a dimension", 1, _MAX_WEIGHTS) for _ in range(n_dimensions))
        if math.prod(shape) > _MAX_WEIGHTS:
            raise self.fail(f"at most {_MAX_WEIGHTS} weights", f"shape {list(shape)}")
        form = self.varint("a form", 0, DEFLATED_DIFFERENCES)
        listed = form in (PALETTE, DEFLATED_PALETTE)
        n_words = self.varint("a number of words", 1, MOST_WORDS) if listed else 0
        if self.position + _DIGEST.size > len(self.data):
            raise self.fail("a digest", "the end of the payload")
        (digest,) = _DIGEST.unpack_from(self.data, self.position)
        self.position += _DIGEST.size
        return ExactHeader(dtype, shape, form, n_words, digest)
