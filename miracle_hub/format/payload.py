"""The payload: one compressed tensor as a string of bytes that decodes alone.

FORMAT.md, "Payload", has its fields and limits; this module reads and writes its header.
"""

import math
import struct
from dataclasses import dataclass, replace

from miracle_hub.code import MAX_DIMENSIONS, MAX_WIDTH_LOG2, Code
from miracle_hub.errors import FormatError, OptionError, TruncatedPayloadError
from miracle_hub.format import frame
from miracle_hub.format.varint import encode_varint, read_varint

MAGIC = b"MRCL"
# The second is a difference: its weights are added to those of a base.
VERSION, DIFFERENCE_VERSION = 1, 2
# Position in this tuple is the number in the file: append only.
DTYPES = ("F32", "BF16", "F16", "F64")
SCALE_BYTES = 2  # bfloat16
_MAX_DIMENSIONS = MAX_DIMENSIONS
_MAX_SEGMENTS = 64
_MAX_WEIGHTS = 1 << 40
_TRAILER = struct.Struct("<fQ")
_FRAME = frame.Frame(MAGIC, (VERSION, DIFFERENCE_VERSION), "payload", _TRAILER.size)


@dataclass(frozen=True)
class Segment:
    """Consecutive rows that share one code and one stream."""

    rows: int
    code: Code
    row_scales: bool

    @property
    def n_scales(self) -> int:
        """How many follow the header for these rows."""
        return self.rows if self.row_scales else 1


@dataclass(frozen=True)
class Header:
    """Everything a decoder must know of one tensor besides its scales and messages.

    Attributes:
        is_difference: its weights are what a tensor has beyond that of a base; dtype is that of the sum.
    """

    dtype: str
    shape: tuple[int, ...]
    columns: int
    rotation: int
    segments: tuple[Segment, ...]
    band_columns: int = 0
    permuted: bool = False
    relative_error: float = 0.0
    digest: int = 0
    is_difference: bool = False

    @property
    def rows(self) -> int:
        """Of the matrix view, all segments together."""
        return sum(segment.rows for segment in self.segments)

    @property
    def n_weights(self) -> int:
        """That the segments stand for."""
        return self.rows * self.columns

    @property
    def n_scales(self) -> int:
        """Of all segments."""
        return sum(segment.n_scales for segment in self.segments)

    @property
    def message_bytes(self) -> tuple[int, ...]:
        """Length of each segment's message."""
        return tuple(s.code.message_bytes(s.rows * self.columns) for s in self.segments)

    @property
    def payload_bytes(self) -> int:
        """Exact length of the payload."""
        return len(encode_header(self)) + SCALE_BYTES * self.n_scales + sum(self.message_bytes)


def encode_payload(header: Header, body: bytes) -> bytes:
    """Header and body (scales and messages) as one payload; `decode_header` reads it back."""
    return _FRAME.seal(encode_header(header)[frame.SIZE :] + body, _version_of(header))


def _version_of(header: Header) -> int:
    return DIFFERENCE_VERSION if header.is_difference else VERSION


def encode_header(header: Header) -> bytes:
    """The header as if nothing followed it.

    Raises:
        OptionError: the segments cannot share a payload, or it has too many dimensions.
    """
    code = _shared_code(header.segments)
    if len(header.shape) > MAX_DIMENSIONS:
        raise OptionError(
            f"a payload has at most {MAX_DIMENSIONS} dimensions, found shape {list(header.shape)}; reshape "
            "the tensor, or leave it plain"
        )
    numbers = [DTYPES.index(header.dtype), len(header.shape), *header.shape]
    numbers += [header.columns, header.band_columns, int(header.permuted)]
    numbers += [header.rotation.bit_length() - 1, code.seed, code.stream_id, len(header.segments)]
    for segment in header.segments:
        code = segment.code
        numbers += [segment.rows, code.window_bits, code.step_bits, code.step_weights]
        numbers += [int(segment.row_scales)]
    trailer = _TRAILER.pack(header.relative_error, header.digest)
    return _FRAME.seal(b"".join(map(encode_varint, numbers)) + trailer, _version_of(header))


def _shared_code(segments: tuple[Segment, ...]) -> Code:
    """The first segment's code, whose seed and stream_id are those of all segments."""
    streams = {(segment.code.seed, segment.code.stream_id) for segment in segments}
    if len(streams) != 1 or len(segments) > _MAX_SEGMENTS:
        raise OptionError(
            f"a payload has 1 to {_MAX_SEGMENTS} segments of one seed and stream_id, found {len(segments)} "
            f"segments of {len(streams)}; code the rows as separate tensors"
        )
    return segments[0].code


def decode_header(data: bytes, where: str) -> tuple[Header, int]:
    """The header at the start of `data` and its length; checked against the length of `data`.

    Args:
        data: the whole payload.
        where: the tensor's name, for messages.

    Raises:
        FormatError: and its subclasses, for every way in which the payload can be wrong.
    """
    is_difference = _FRAME.check(data, where) == DIFFERENCE_VERSION
    reader = _Reader(data, where)
    header = replace(reader.header(), is_difference=is_difference)
    length = reader.position
    expected = length + SCALE_BYTES * header.n_scales + sum(header.message_bytes)
    if expected != len(data):
        raise TruncatedPayloadError(
            f"{where}: the header announces a payload of {expected} bytes, found {len(data)}; "
            "the file is truncated or damaged: download it again"
        )
    return header, length


class _Reader:
    """A cursor over an untrusted header."""

    def __init__(self, data: bytes, where: str) -> None:
        self.data, self.where, self.position = data, where, frame.SIZE

    def fail(self, expected: str, found: object) -> FormatError:
        return FormatError(
            f"{self.where}: byte {self.position} of the payload header: expected {expected}, "
            f"found {found}; the file is damaged or was not written by miracle-hub"
        )

    def varint(self, what: str, low: int, high: int) -> int:
        number, self.position = read_varint(self.data, self.position, what, (low, high), self.where)
        return number

    def header(self) -> Header:
        dtype = DTYPES[self.varint("a dtype", 0, len(DTYPES) - 1)]
        n_dimensions = self.varint("a number of dimensions", 0, _MAX_DIMENSIONS)
        shape = tuple(self.varint("a dimension", 1, _MAX_WEIGHTS) for _ in range(n_dimensions))
        columns = self.varint("a number of columns", 1, _MAX_WEIGHTS)
        band_columns = self.varint("band columns", 0, _MAX_WEIGHTS)
        permuted = bool(self.varint("permuted", 0, 1))
        rotation = 1 << self.varint("log2 of the rotation width", 0, MAX_WIDTH_LOG2)
        seed = self.varint("a seed", 0, 2**64 - 1)
        stream_id = self.varint("a stream_id", 0, 2**32 - 1)
        n_segments = self.varint("a number of segments", 1, _MAX_SEGMENTS)
        segments = tuple(self.segment(seed, stream_id) for _ in range(n_segments))
        if self.position + _TRAILER.size > len(self.data):
            raise self.fail("relative error and digest", "the end of the payload")
        error, digest = _TRAILER.unpack_from(self.data, self.position)
        if not 0 <= error < math.inf:
            raise self.fail("a relative squared error of 0 or more", error)
        self.position += _TRAILER.size
        header = Header(dtype, shape, columns, rotation, segments, band_columns, permuted, error, digest)
        self.check_shape(header)
        return header

    def segment(self, seed: int, stream_id: int) -> Segment:
        rows = self.varint("a number of rows", 1, _MAX_WEIGHTS)
        window, step, weights = (self.varint(name, 1, 256) for name in ("L", "k", "V"))
        row_scales = bool(self.varint("scales per row", 0, 1))
        try:
            return Segment(rows, Code(window, step, weights, seed, stream_id), row_scales)
        except OptionError as error:
            raise self.fail("a possible code", error) from None

    def check_shape(self, header: Header) -> None:
        n_weights = math.prod(header.shape)
        if n_weights != header.n_weights or n_weights > _MAX_WEIGHTS:
            raise self.fail(f"{header.rows} rows × {header.columns} columns to fill the shape", header.shape)
        if header.columns % header.rotation:
            raise self.fail(f"a rotation width that divides {header.columns} columns", header.rotation)
