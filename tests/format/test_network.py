"""A network's stream as bytes: a round trip, the documented bytes, and a named error for every defect."""

import struct
import time
import zlib
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from miracle_hub.code import Code
from miracle_hub.errors import (
    ChecksumError,
    FormatError,
    TruncatedPayloadError,
    UnsupportedVersionError,
)
from miracle_hub.format.network import NetworkHeader, SharedSpec, decode_network, encode_network
from tests.limits import AT_ONCE_SECONDS

TENSORS = (
    SharedSpec("fc.weight", "BF16", (6, 50), 1, 10),
    SharedSpec("fc.bias", "F32", (6,), 0, 6),
    SharedSpec("scale", "F16", (), 2, 1),
)
HEADER = NetworkHeader(Code(8, 2, 1, seed=300), TENSORS, digest=7)
# 17 values: 6 + 2·17 = 40 bits.
SCALES, MESSAGE = bytes(range(6)), bytes(range(5))
STREAM = encode_network(HEADER, SCALES, MESSAGE)
# L, k, V, seed, number of tensors, kind and values, kind, kind and values
NUMBERS = [8, 2, 1, 300, 3, 1, 10, 0, 2, 1]
# Of the first byte behind the fixed fields and the numbers, of which the seed takes two.
END = 9 + 11
CRC = zlib.crc32("fc.weight BF16 6×50\nfc.bias F32 6\nscale F16 \n".encode())


def varint(number: int) -> bytes:
    low, rest = number & 127, number >> 7
    return bytes([low | 128]) + varint(rest) if rest else bytes([low])


def sealed(rest: bytes, version: int = 1) -> bytes:
    """Magic, version and a right checksum in front of whatever was made up."""
    return b"MRCN" + bytes([version]) + zlib.crc32(rest).to_bytes(4, "little") + rest


def made_up(numbers: list[int], crc: int = CRC, rest: bytes = SCALES + MESSAGE) -> bytes:
    return sealed(b"".join(map(varint, numbers)) + struct.pack("<IQ", crc, 7) + rest)


def defect(
    data: bytes, tensors: tuple[SharedSpec, ...] = TENSORS, kind: type[FormatError] = FormatError
) -> str:
    with pytest.raises(FormatError) as raised:
        decode_network(data, tensors, "net")
    assert type(raised.value) is kind
    return str(raised.value)


def of_module(header: NetworkHeader) -> tuple[SharedSpec, ...]:
    """What the reader knows: names, dtypes and shapes; not how values are shared."""
    return tuple(replace(tensor, sharing=0, n_values=tensor.n_weights) for tensor in header.tensors)


@st.composite
def headers(draw: st.DrawFn) -> NetworkHeader:
    tensors = []
    for i in range(draw(st.integers(1, 12))):
        shape = tuple(draw(st.lists(st.integers(1, 9), max_size=4)))
        spec = SharedSpec(
            draw(st.text(max_size=8)) + str(i), draw(st.sampled_from(["F32", "BF16"])), shape, 0, 0
        )
        kind = draw(st.integers(0, 2))
        values = draw(st.integers(1, spec.n_weights)) if kind else spec.n_weights
        tensors.append(replace(spec, sharing=kind, n_values=values))
    window = draw(st.integers(1, 24))
    seed = draw(st.integers(0, 2**64 - 1))
    code = Code(window, draw(st.integers(1, window)), draw(st.integers(1, 256)), seed)
    return NetworkHeader(code, tuple(tensors), draw(st.integers(0, 2**64 - 1)))


@given(headers())
@settings(deadline=None, max_examples=150, derandomize=True, database=None)
def test_every_stream_survives_its_bytes(header: NetworkHeader) -> None:
    scales = bytes(range(2 * len(header.tensors)))
    message = b"\xa5" * header.code.message_bytes(header.n_values)
    data = encode_network(header, scales, message)
    assert decode_network(data, of_module(header), "n") == (header, scales, message)


def test_the_bytes_are_the_documented_ones() -> None:
    numbers = bytes([8, 2, 1, 0xAC, 0x02, 3, 1, 10, 0, 2, 1])
    rest = numbers + CRC.to_bytes(4, "little") + bytes([7, 0, 0, 0, 0, 0, 0, 0]) + SCALES + MESSAGE
    assert STREAM == b"MRCN\x01" + zlib.crc32(rest).to_bytes(4, "little") + rest
    assert STREAM == made_up(NUMBERS)


def test_large_numbers_take_several_bytes_low_bits_first() -> None:
    tensors = (replace(TENSORS[0], n_values=299),)
    code = Code(24, 1, 256, seed=2**64 - 1)
    numbers = bytes.fromhex("18 01 8002" + "ff" * 9 + "01" + "01 01 ab02")
    assert encode_network(NetworkHeader(code, tensors), b"", b"")[9:].startswith(numbers)


def test_every_flipped_bit_is_noticed() -> None:
    for position in range(8 * len(STREAM)):
        flipped = bytearray(STREAM)
        flipped[position // 8] ^= 1 << position % 8
        with pytest.raises(FormatError, match=r"^net: "):
            decode_network(bytes(flipped), TENSORS, "net")


def test_every_truncation_and_any_trailing_bytes_are_noticed() -> None:
    for length in range(len(STREAM)):
        kind = TruncatedPayloadError if length < 21 else ChecksumError
        assert "truncated" in defect(STREAM[:length], kind=kind)
    for extra in (b"\0", STREAM):
        assert "truncated or damaged" in defect(STREAM + extra, kind=ChecksumError)


def test_every_truncation_behind_a_right_checksum_is_noticed() -> None:
    for length in range(12, len(STREAM) - 9):
        with pytest.raises(FormatError, match=r"^net: .*(download it again|found no end of it)"):
            decode_network(sealed(STREAM[9 : 9 + length]), TENSORS, "net")


def test_a_short_stream_says_how_many_bytes_it_has() -> None:
    assert defect(b"MRCN\x01", kind=TruncatedPayloadError) == (
        "net: a network stream has at least 21 bytes, found 5; the file is truncated: download it again"
    )


def test_a_stream_of_the_wrong_length_says_both_lengths() -> None:
    for rest in (SCALES + MESSAGE[:-1], SCALES + MESSAGE + b"\0"):
        found = defect(made_up(NUMBERS, rest=rest), kind=TruncatedPayloadError)
        assert found == (
            f"net: the header announces 43 bytes, found {32 + len(rest)}; the file is truncated or "
            "damaged: download it again"
        )


def test_a_header_without_its_end_says_what_is_missing() -> None:
    data = sealed(STREAM[9 : END + 11])
    assert defect(data, kind=TruncatedPayloadError) == (
        "net: byte 20: expected 12 more bytes of header, found 11; the file is truncated or "
        "damaged: download it again"
    )


def test_a_wrong_checksum_says_both() -> None:
    data = STREAM[:5] + bytes(4) + STREAM[9:]
    found = zlib.crc32(STREAM[9:])
    assert defect(data, kind=ChecksumError) == (
        f"net: bytes 9 to {len(STREAM)} of the network stream: expected CRC-32 00000000, found {found:08x}; "
        "the file is truncated or damaged: download it again"
    )


@pytest.mark.parametrize(("magic", "version"), [(b"MRCL", 1), (b"\0\0\0\0", 1), (b"MRCN", 0)])
def test_other_bytes_in_front_are_no_stream(magic: bytes, version: int) -> None:
    expected = (4, "format version 1 or 2", 0) if magic == b"MRCN" else (0, "the magic b'MRCN'", magic)
    at, wanted, found = expected
    assert defect(magic + bytes([version]) + STREAM[5:]) == (
        f"net: byte {at} of the network stream header: expected {wanted}, found {found}; the file is damaged "
        "or was not written by miracle-hub"
    )


@pytest.mark.parametrize("version", [3, 255])
def test_a_newer_version_says_how_to_upgrade(version: int) -> None:
    found = defect(sealed(STREAM[9:], version), kind=UnsupportedVersionError)
    assert found == (
        f"net: this miracle-hub reads network stream version 1 or 2, found {version}; upgrade: "
        "pip install -U miracle-hub"
    )


@pytest.mark.parametrize(
    ("at", "number", "expected"),
    [
        (0, 0, "byte 9 of the payload header: expected L from 1 to 24, found 0"),
        (0, 25, "byte 9 of the payload header: expected L from 1 to 24, found 25"),
        (1, 0, "byte 10 of the payload header: expected k from 1 to 24, found 0"),
        (2, 257, "byte 11 of the payload header: expected V from 1 to 256, found 257"),
        (3, 2**64, f"byte 12 of the payload header: expected a seed from 0 to {2**64 - 1}, found {2**64}"),
        (4, 0, "byte 14 of the payload header: expected a number of tensors from 1 to 65536, found 0"),
        (
            4,
            2**17,
            "byte 14 of the payload header: expected a number of tensors from 1 to 65536, found 131072",
        ),
        (5, 3, "byte 15 of the payload header: expected fc.weight: a kind of sharing from 0 to 2, found 3"),
        (6, 0, "byte 16 of the payload header: expected fc.weight: a number of values from 1 to 4294967296,"),
        (8, 9, "byte 18 of the payload header: expected scale: a kind of sharing from 0 to 2, found 9"),
    ],
)
def test_a_number_out_of_range_is_named_with_its_byte(at: int, number: int, expected: str) -> None:
    found = defect(made_up(NUMBERS[:at] + [number] + NUMBERS[at + 1 :]))
    assert found.startswith(f"net: {expected}")
    assert found.endswith("; the file is damaged or was not written by miracle-hub")


@pytest.mark.parametrize("at", range(len(NUMBERS)))
def test_a_number_in_more_bytes_than_it_needs_is_refused(at: int) -> None:
    parts = [varint(number) for number in NUMBERS]
    longer = parts[at][:-1] + bytes([parts[at][-1] | 128, 0])
    data = sealed(b"".join([*parts[:at], longer, *parts[at + 1 :]]) + bytes(40))
    start = 9 + len(b"".join(parts[:at]))
    assert f"byte {start} of the payload header: expected " in defect(data)
    assert f"in the shortest form, found {NUMBERS[at]} in {len(longer)} bytes; " in defect(data)


def test_a_number_without_an_end_is_refused() -> None:
    """Ten bytes are as many as 64 bits can take."""
    found = defect(sealed(b"\xff" * 40))
    assert found.startswith("net: byte 19 of the payload header: expected L as a varint, found no end of it")
    assert "expected a seed as a varint, found no end of it" in defect(sealed(bytes([8, 2, 1]) + b"\x80" * 9))


def test_a_step_longer_than_its_window_is_no_code() -> None:
    assert defect(made_up([2, 3, *NUMBERS[2:]])) == (
        "net: expected a possible code, found code: step_bits must be an integer from 1 to 2, found "
        "3; choose another value; the file is damaged"
    )


def test_a_module_of_more_or_fewer_tensors_is_another_one() -> None:
    for tensors in (TENSORS[:2], (*TENSORS, TENSORS[1])):
        assert defect(STREAM, tensors) == (
            f"net: expected a stream of the module's {len(tensors)} coded tensors, found one of 3; "
            "load it into the module that it was made from"
        )


@pytest.mark.parametrize(
    ("at", "change"),
    [
        (0, {"name": "fc.weights"}),
        (1, {"name": ""}),
        (1, {"dtype": "F16"}),
        (0, {"shape": (50, 6)}),
        (0, {"shape": (300,)}),
        (0, {"shape": (3,)}),  # fewer weights than the stream has values
        (1, {"shape": (6, 1)}),
        (2, {"shape": (1,)}),
        (2, {"shape": (0,)}),
        (2, {"shape": (2**40, 2**40)}),
    ],
)
def test_a_module_of_other_names_dtypes_or_shapes_is_another_one(at: int, change: dict) -> None:
    """It is the module that is wrong here: no reader may call the file damaged."""
    tensors = [*TENSORS]
    tensors[at] = replace(tensors[at], **change)
    assert defect(STREAM, tuple(tensors)) == (
        "net: the module's coded tensors have other names, dtypes or shapes than those of the file; "
        "load it into the module that it was made from"
    )


def test_tensors_in_another_order_are_another_module() -> None:
    assert "other names, dtypes or shapes" in defect(STREAM, (TENSORS[1], TENSORS[0], TENSORS[2]))


def test_more_values_than_weights_are_refused() -> None:
    assert defect(made_up([*NUMBERS[:6], 301, *NUMBERS[7:]])) == (
        "net: fc.weight: expected at most 300 values for its weights, found 301; the file is damaged: "
        "download it again"
    )


@pytest.mark.parametrize("n_weights", [0, 2**32 + 1, 2**80])
def test_no_values_and_more_than_a_stream_can_hold_are_refused_at_once(n_weights: int) -> None:
    tensors = (SharedSpec("w", "F32", (n_weights,), 0, n_weights),)
    started = time.process_time()
    crc = zlib.crc32(f"w F32 {n_weights}\n".encode())
    assert defect(made_up([1, 1, 256, 0, 1, 0], crc), tensors) == (
        f"net: expected 1 to 4294967296 values in all tensors, found {n_weights}; a stream cannot "
        "hold this module"
    )
    assert time.process_time() - started < AT_ONCE_SECONDS


def test_a_huge_tensor_in_a_small_file_is_refused_at_once() -> None:
    """The most values per byte: V = 256 and one bit per step."""
    tensors = (SharedSpec("w", "F32", (2**32,), 0, 2**32),)
    started = time.process_time()
    data = made_up([1, 1, 256, 0, 1, 0], zlib.crc32(f"w F32 {2**32}\n".encode()))
    assert "the header announces 2097182 bytes, found 39" in defect(data, tensors, TruncatedPayloadError)
    assert time.process_time() - started < AT_ONCE_SECONDS


@given(st.binary(max_size=200))
@settings(deadline=None, max_examples=300, derandomize=True, database=None)
def test_arbitrary_bytes_behind_a_right_checksum_give_a_named_error(rest: bytes) -> None:
    with pytest.raises(FormatError, match="^n: "):
        decode_network(sealed(rest), TENSORS, "n")


@given(st.lists(st.integers(0, 2**64), min_size=5, max_size=14))
@settings(deadline=None, max_examples=300, derandomize=True, database=None)
def test_arbitrary_numbers_behind_right_checksums_give_a_named_error(numbers: list[int]) -> None:
    with pytest.raises(FormatError, match="^n: "):
        decode_network(made_up(numbers), TENSORS, "n")
