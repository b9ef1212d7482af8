"""A network's stream of two codes as bytes: version 2, which files of one code do not become."""

import struct
import zlib
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from miracle_hub.code import Code, SplitCode
from miracle_hub.errors import FormatError, OptionError, TruncatedPayloadError
from miracle_hub.format.network import NetworkHeader, SharedSpec, decode_network, encode_network

TENSORS = (SharedSpec("fc.weight", "BF16", (6, 50), 1, 10), SharedSpec("fc.bias", "F32", (6,), 0, 6))
FIRST, REST = Code(8, 2, 1, seed=300), Code(8, 3, 2, seed=300)
HEADER = NetworkHeader(SplitCode(FIRST, 5, REST), TENSORS, digest=7)
# 5 values: 6 + 2·5 = 16 bits; 11 values: 5 + 3·6 = 23 bits.
SCALES, MESSAGE = bytes(range(4)), bytes(range(5))
STREAM = encode_network(HEADER, SCALES, MESSAGE)
CRC = zlib.crc32("fc.weight BF16 6×50\nfc.bias F32 6\n".encode())
# L, k, V, seed in two bytes; values of the first code, k, V of the second; number of tensors, kinds, values
NUMBERS = bytes([8, 2, 1, 0xAC, 0x02, 5, 3, 2, 2, 1, 10, 0])


def sealed(numbers: bytes, rest: bytes = SCALES + MESSAGE) -> bytes:
    whole = numbers + struct.pack("<IQ", CRC, 7) + rest
    return b"MRCN\x02" + zlib.crc32(whole).to_bytes(4, "little") + whole


def of_module(header: NetworkHeader) -> tuple[SharedSpec, ...]:
    return tuple(replace(tensor, sharing=0, n_values=tensor.n_weights) for tensor in header.tensors)


def defect(data: bytes, kind: type[FormatError] = FormatError) -> str:
    with pytest.raises(FormatError) as raised:
        decode_network(data, of_module(HEADER), "net")
    assert type(raised.value) is kind
    return str(raised.value)


def test_the_bytes_are_the_documented_ones() -> None:
    assert STREAM == sealed(NUMBERS)
    assert encode_network(replace(HEADER, code=FIRST), b"", b"")[4] == 1


@given(st.data())
@settings(deadline=None, max_examples=80, derandomize=True, database=None)
def test_every_stream_survives_its_bytes(data: st.DataObject) -> None:
    window, seed = data.draw(st.integers(1, 24)), data.draw(st.integers(0, 2**64 - 1))
    first, rest = (
        Code(window, data.draw(st.integers(1, window)), data.draw(st.integers(1, 256)), seed) for _ in "ab"
    )
    n_values = data.draw(st.integers(2, 700))
    tensors = (SharedSpec("w", "F32", (n_values,), 0, n_values),)
    header = NetworkHeader(SplitCode(first, data.draw(st.integers(1, n_values - 1)), rest), tensors, 9)
    message = b"\xa5" * header.code.message_bytes(n_values)
    assert decode_network(encode_network(header, b"ab", message), tensors, "n") == (header, b"ab", message)


def test_every_flipped_bit_and_every_truncation_is_noticed() -> None:
    for position in range(8 * len(STREAM)):
        flipped = bytearray(STREAM)
        flipped[position // 8] ^= 1 << position % 8
        with pytest.raises(FormatError, match=r"^net: "):
            decode_network(bytes(flipped), of_module(HEADER), "net")
    for length in range(len(STREAM)):
        with pytest.raises(FormatError, match=r"^net: "):
            decode_network(STREAM[:length], of_module(HEADER), "net")


@pytest.mark.parametrize("n_first", [16, 17, 127])
def test_a_second_code_without_values_is_refused(n_first: int) -> None:
    assert defect(sealed(NUMBERS[:5] + bytes([n_first]) + NUMBERS[6:])) == (
        "net: expected values for each of two codes, found 16 in all of which the first has "
        f"{n_first}; the file is damaged: download it again"
    )


@pytest.mark.parametrize(
    ("at", "number", "expected"),
    [
        (5, 0, "byte 14 of the payload header: expected a number of values from 1 to 4294967296, found 0"),
        (6, 25, "byte 15 of the payload header: expected k from 1 to 24, found 25"),
        (7, 0, "byte 16 of the payload header: expected V from 1 to 256, found 0"),
        (6, 9, "expected a possible code, found code: step_bits must be an integer from 1 to 8, found 9"),
    ],
)
def test_a_number_of_the_second_code_out_of_range_is_named(at: int, number: int, expected: str) -> None:
    assert defect(sealed(NUMBERS[:at] + bytes([number]) + NUMBERS[at + 1 :])).startswith(f"net: {expected}")


def test_a_stream_of_the_wrong_length_says_both_lengths() -> None:
    for rest in (SCALES + MESSAGE[:-1], SCALES + MESSAGE + b"\0"):
        assert defect(sealed(NUMBERS, rest), TruncatedPayloadError) == (
            f"net: the header announces 42 bytes, found {33 + len(rest)}; the file is truncated or damaged: "
            "download it again"
        )


@pytest.mark.parametrize("rest", [replace(REST, window_bits=9), replace(REST, seed=1)])
def test_two_codes_of_one_stream_have_one_window_and_one_seed(rest: Code) -> None:
    with pytest.raises(OptionError, match="^code: expected two codes of one window, seed and stream_id"):
        SplitCode(FIRST, 5, rest)
    with pytest.raises(OptionError, match="the first of one value or more"):
        SplitCode(FIRST, 0, REST)
