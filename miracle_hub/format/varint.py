"""Varints: unsigned LEB128 in shortest form (FORMAT.md, "Conventions")."""

from miracle_hub.errors import FormatError


def encode_varint(number: int) -> bytes:
    """A number of 0 or more as bytes; `read_varint` reads it back."""
    out = bytearray()
    while number >= 0x80:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def read_varint(data: bytes, start: int, what: str, limits: tuple[int, int], where: str) -> tuple[int, int]:
    """The number that starts at byte `start`, and the byte after it.

    Args:
        limits: the least and the largest number that may be there.
        where: the tensor or file, for messages.

    Raises:
        FormatError: there is none, or one out of limits, or not in the shortest form.
    """
    number, shift, position = 0, 0, start
    while True:
        if position >= len(data) or shift > 63:
            raise _error(f"{what} as a varint", "no end of it", position, where)
        byte = data[position]
        position += 1
        number |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            break
    if byte == 0 and shift > 7:
        raise _error(f"{what} in the shortest form", f"{number} in {shift // 7} bytes", start, where)
    if not limits[0] <= number <= limits[1]:
        raise _error(f"{what} from {limits[0]} to {limits[1]}", number, start, where)
    return number, position


def _error(expected: str, found: object, position: int, where: str) -> FormatError:
    return FormatError(
        f"{where}: byte {position} of the payload header: expected {expected}, found {found}; the file is "
        "damaged or was not written by miracle-hub"
    )
