"""A whole network's stream as a string of bytes: one message for all its tensors.

FORMAT.md, "Network", has its fields and limits. Names and shapes are those of the module that the file is
loaded into: a CRC-32 of them says whether it is the right one.
"""

import struct
import zlib
from dataclasses import dataclass

from miracle_hub.code import Code
from miracle_hub.errors import FormatError, OptionError, TruncatedPayloadError
from miracle_hub.format import frame
from miracle_hub.format.spec import TensorSpec
from miracle_hub.format.varint import encode_varint, read_varint

MAGIC = b"MRCN"
VERSION = 1
_TRAILER = struct.Struct("<IQ")
_FRAME = frame.Frame(MAGIC, VERSION, "network stream", _TRAILER.size)
_MAX_TENSORS = 1 << 16
_MAX_VALUES = 1 << 32


@dataclass(frozen=True)
class SharedSpec(TensorSpec):
    """One tensor of the network, as the module has it, and how its weights share values.

    Attributes:
        sharing: kind of sharing, a number; `n_values` are as many as weights if it is 0.
    """

    sharing: int
    n_values: int


@dataclass(frozen=True)
class NetworkHeader:
    """Everything a decoder must know besides scales and message."""

    code: Code
    tensors: tuple[SharedSpec, ...]
    digest: int = 0

    @property
    def n_values(self) -> int:
        """Of the stream: those of all tensors."""
        return sum(tensor.n_values for tensor in self.tensors)


def encode_network(header: NetworkHeader, scales: bytes, message: bytes) -> bytes:
    """Header, scales and message as one string; `decode_network` reads it back."""
    code = header.code
    numbers = [code.window_bits, code.step_bits, code.step_weights, code.seed, len(header.tensors)]
    for tensor in header.tensors:
        numbers += [tensor.sharing, tensor.n_values] if tensor.sharing else [0]
    rest = b"".join(map(encode_varint, numbers))
    rest += _TRAILER.pack(structure(header.tensors), header.digest) + scales + message
    return _FRAME.seal(rest)


def decode_network(
    data: bytes, tensors: tuple[SharedSpec, ...], where: str
) -> tuple[NetworkHeader, bytes, bytes]:
    """Header, scales and message of a string, checked against a module and against its own length.

    Args:
        tensors: those of the module; how they share values is read from the string.
        where: the file's name, for messages.

    Raises:
        FormatError: and its subclasses, for every way in which the string can be wrong.
    """
    numbers, n_tensors, position = read_start(data, where)
    if n_tensors != len(tensors):
        raise FormatError(
            f"{where}: expected a stream of the module's {len(tensors)} coded tensors, found one of "
            f"{n_tensors}; load it into the module that it was made from"
        )
    found = []
    for tensor in tensors:
        kind, position = read_varint(data, position, f"{tensor.name}: a kind of sharing", (0, 2), where)
        n_values, what = tensor.n_weights, f"{tensor.name}: a number of values"
        if kind:
            n_values, position = read_varint(data, position, what, (1, _MAX_VALUES), where)
        found.append(SharedSpec(tensor.name, tensor.dtype, tensor.shape, kind, n_values))
    return _body(data, position, numbers, tuple(found), where)


def read_start(data: bytes, where: str) -> tuple[list[int], int, int]:
    """What a string says without its module: L, k, V and seed, how many tensors, and where it goes on.

    Raises:
        FormatError: and its subclasses: the CRC-32 of all its bytes is another, or a number is out of range.
    """
    _FRAME.check(data, where)
    position, numbers = frame.SIZE, []
    for name, low, high in (("L", 1, 24), ("k", 1, 24), ("V", 1, 256), ("a seed", 0, 2**64 - 1)):
        number, position = read_varint(data, position, name, (low, high), where)
        numbers.append(number)
    n_tensors, position = read_varint(data, position, "a number of tensors", (1, _MAX_TENSORS), where)
    return numbers, n_tensors, position


def _body(
    data: bytes, position: int, numbers: list[int], tensors: tuple[SharedSpec, ...], where: str
) -> tuple[NetworkHeader, bytes, bytes]:
    if position + _TRAILER.size > len(data):
        raise TruncatedPayloadError(
            f"{where}: byte {position}: expected {_TRAILER.size} more bytes of header, found "
            f"{len(data) - position}; the file is truncated or damaged: download it again"
        )
    expected, digest = _TRAILER.unpack_from(data, position)
    _check_tensors(tensors, expected, where)
    try:
        header = NetworkHeader(Code(*numbers), tensors, digest)
    except OptionError as error:
        raise FormatError(f"{where}: expected a possible code, found {error}; the file is damaged") from None
    scales = position + _TRAILER.size
    message = scales + 2 * len(tensors)
    length = message + header.code.message_bytes(header.n_values)
    if length != len(data):
        raise TruncatedPayloadError(
            f"{where}: the header announces {length} bytes, found {len(data)}; the file is truncated or "
            "damaged: download it again"
        )
    return header, data[scales:message], data[message:]


def _check_tensors(tensors: tuple[SharedSpec, ...], expected: int, where: str) -> None:
    """The module first: sizes that do not fit another one are no damage."""
    if expected != structure(tensors):
        raise FormatError(
            f"{where}: the module's coded tensors have other names, dtypes or shapes than those of the file; "
            "load it into the module that it was made from"
        )
    for tensor in tensors:
        if tensor.n_values > tensor.n_weights:
            raise FormatError(
                f"{where}: {tensor.name}: expected at most {tensor.n_weights} values for its weights, found "
                f"{tensor.n_values}; the file is damaged: download it again"
            )
    total = sum(tensor.n_values for tensor in tensors)
    if not 1 <= total <= _MAX_VALUES:
        raise FormatError(
            f"{where}: expected 1 to {_MAX_VALUES} values in all tensors, found {total}; a stream cannot "
            "hold this module"
        )


def structure(tensors: tuple[SharedSpec, ...]) -> int:
    """CRC-32 of the names, dtypes and shapes of tensors."""
    lines = (f"{t.name} {t.dtype} {'×'.join(map(str, t.shape))}\n" for t in tensors)
    return zlib.crc32("".join(lines).encode())
