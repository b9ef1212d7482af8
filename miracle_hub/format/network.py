"""A whole network's stream as a string of bytes: one message for all its tensors.

FORMAT.md, "Network", has its fields and limits. Names and shapes are those of the module that the file is
loaded into: a CRC-32 of them says whether it is the right one.
"""

import struct
import zlib
from dataclasses import dataclass

from miracle_hub.code import Code, SplitCode, StreamCode
from miracle_hub.errors import FormatError, OptionError, TruncatedPayloadError
from miracle_hub.format import frame
from miracle_hub.format.spec import TensorSpec
from miracle_hub.format.varint import encode_varint, read_varint

MAGIC = b"MRCN"
# 1 has one code, 2 has two.
VERSION = 2
_TRAILER = struct.Struct("<IQ")
_FRAME = frame.Frame(MAGIC, (1, VERSION), "network stream", _TRAILER.size)
_MAX_TENSORS = 1 << 16
_MAX_VALUES = 1 << 32
_ONE_CODE = (("L", 1, 24), ("k", 1, 24), ("V", 1, 256), ("a seed", 0, 2**64 - 1))
_TWO_CODES = (*_ONE_CODE, ("a number of values", 1, _MAX_VALUES), ("k", 1, 24), ("V", 1, 256))


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

    code: StreamCode
    tensors: tuple[SharedSpec, ...]
    digest: int = 0

    @property
    def n_values(self) -> int:
        """Of the stream: those of all tensors."""
        return sum(tensor.n_values for tensor in self.tensors)


def encode_network(header: NetworkHeader, scales: bytes, message: bytes) -> bytes:
    """Header, scales and message as one string; `decode_network` reads it back."""
    is_split = isinstance(header.code, SplitCode)
    numbers = [*_numbers_of(header.code), len(header.tensors)]
    for tensor in header.tensors:
        numbers += [tensor.sharing, tensor.n_values] if tensor.sharing else [0]
    rest = b"".join(map(encode_varint, numbers))
    rest += _TRAILER.pack(structure(header.tensors), header.digest) + scales + message
    return _FRAME.seal(rest, 2 if is_split else 1)


def _numbers_of(code: StreamCode) -> list[int]:
    """L, k, V and seed; then, of two codes, the values of the first, and k and V of the second."""
    if isinstance(code, SplitCode):
        return [*_numbers_of(code.first), code.n_first, code.rest.step_bits, code.rest.step_weights]
    return [code.window_bits, code.step_bits, code.step_weights, code.seed]


def _code_of(numbers: list[int], where: str) -> StreamCode:
    """The mirror of `_numbers_of`.

    Raises:
        FormatError: no code has such numbers.
    """
    window, _, _, seed, *others = numbers
    try:
        first = Code(*numbers[:4])
        if not others:
            return first
        n_first, step, weights = others
        return SplitCode(first, n_first, Code(window, step, weights, seed))
    except OptionError as error:
        raise FormatError(f"{where}: expected a possible code, found {error}; the file is damaged") from None


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
    code, n_tensors, position = read_start(data, where)
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
    return _body(data, position, code, tuple(found), where)


def read_start(data: bytes, where: str) -> tuple[StreamCode, int, int]:
    """What a string says without its module: its code, how many tensors, and where it goes on.

    Raises:
        FormatError: and its subclasses: the CRC-32 of all its bytes is another, or a number is out of range.
    """
    version, position, numbers = _FRAME.check(data, where), frame.SIZE, []
    for name, low, high in _ONE_CODE if version == 1 else _TWO_CODES:
        number, position = read_varint(data, position, name, (low, high), where)
        numbers.append(number)
    code = _code_of(numbers, where)
    n_tensors, position = read_varint(data, position, "a number of tensors", (1, _MAX_TENSORS), where)
    return code, n_tensors, position


def _body(
    data: bytes, position: int, code: StreamCode, tensors: tuple[SharedSpec, ...], where: str
) -> tuple[NetworkHeader, bytes, bytes]:
    if position + _TRAILER.size > len(data):
        raise TruncatedPayloadError(
            f"{where}: byte {position}: expected {_TRAILER.size} more bytes of header, found "
            f"{len(data) - position}; the file is truncated or damaged: download it again"
        )
    expected, digest = _TRAILER.unpack_from(data, position)
    _check_tensors(tensors, expected, where)
    header = NetworkHeader(code, tensors, digest)
    _check_split(header, where)
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


def _check_split(header: NetworkHeader, where: str) -> None:
    """
    Raises:
        FormatError: the second of two codes has no values.
    """
    if min(n for n, _ in header.code.segments(header.n_values)) < 1:
        raise FormatError(
            f"{where}: expected values for each of two codes, found {header.n_values} in all of which the "
            f"first has {header.code.segments(header.n_values)[0][0]}; the file is damaged: download it again"
        )


def structure(tensors: tuple[SharedSpec, ...]) -> int:
    """CRC-32 of the names, dtypes and shapes of tensors."""
    lines = (f"{t.name} {t.dtype} {'×'.join(map(str, t.shape))}\n" for t in tensors)
    return zlib.crc32("".join(lines).encode())
