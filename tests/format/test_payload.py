"""The payload's header: a round trip, its exact bytes, and a named error for every defect."""

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
    OptionError,
    TruncatedPayloadError,
    UnsupportedVersionError,
)
from miracle_hub.format.payload import (
    DTYPES,
    Header,
    Segment,
    decode_header,
    encode_header,
    encode_payload,
)
from tests.limits import AT_ONCE_SECONDS

HEADER = Header("F32", (6, 48), 48, 16, (Segment(6, Code(8, 2, 1), True),), 0, False, 0.5, 7)
# dtype, dimensions, columns, band columns, permuted, log2(width), seed, stream_id, segments;
# then rows, L, k, V, scales per row
NUMBERS = [0, 2, 6, 48, 48, 0, 0, 4, 0, 0, 1, 6, 8, 2, 1, 1]


def body(header: Header) -> bytes:
    return bytes(2 * header.n_scales + sum(header.message_bytes))


def varint(number: int) -> bytes:
    low, rest = number & 127, number >> 7
    return bytes([low | 128]) + varint(rest) if rest else bytes([low])


def sealed(rest: bytes, version: int = 1) -> bytes:
    """Magic, version and a right checksum in front of whatever was made up."""
    return b"MRCL" + bytes([version]) + zlib.crc32(rest).to_bytes(4, "little") + rest


def made_up(numbers: list[int], error: float = 0.5, rest: bytes = b"") -> bytes:
    return sealed(b"".join(map(varint, numbers)) + struct.pack("<fQ", error, 7) + rest)


def defect(data: bytes) -> str:
    with pytest.raises(FormatError) as raised:
        decode_header(data, "layer.weight")
    assert type(raised.value) is FormatError
    return str(raised.value)


@st.composite
def codes(draw: st.DrawFn, seed: int, stream_id: int) -> Code:
    window = draw(st.integers(1, 24))
    return Code(window, draw(st.integers(1, window)), draw(st.integers(1, 256)), seed, stream_id)


@st.composite
def headers(draw: st.DrawFn) -> Header:
    seed, stream_id = draw(st.integers(0, 2**64 - 1)), draw(st.integers(0, 2**32 - 1))
    rows = draw(st.lists(st.integers(1, 50), min_size=1, max_size=64))
    inner = draw(st.lists(st.integers(1, 9), max_size=7))
    columns = 1
    for dimension in inner:
        columns *= dimension
    segments = tuple(Segment(n, draw(codes(seed, stream_id)), draw(st.booleans())) for n in rows)
    return Header(
        dtype=draw(st.sampled_from(DTYPES)),
        shape=(sum(rows), *inner),
        columns=columns,
        rotation=draw(st.sampled_from([1 << i for i in range(16) if columns % (1 << i) == 0])),
        segments=segments,
        band_columns=draw(st.integers(0, 2**40)),
        permuted=draw(st.booleans()),
        relative_error=draw(st.floats(0, 2**100, width=32)),
        digest=draw(st.integers(0, 2**64 - 1)),
    )


@given(headers())
@settings(deadline=None, max_examples=150, derandomize=True)
def test_every_header_survives_its_bytes(header: Header) -> None:
    payload = encode_payload(header, body(header))
    assert decode_header(payload, "w") == (header, len(encode_header(header)))
    assert header.payload_bytes == len(payload)


def test_the_bytes_of_a_header_are_the_documented_ones() -> None:
    payload = encode_payload(HEADER, body(HEADER))
    numbers = bytes([0, 2, 6, 48, 48, 0, 0, 4, 0, 0, 1, 6, 8, 2, 1, 1])
    rest = numbers + bytes.fromhex("0000003f 0700000000000000") + bytes(12 + 73)
    assert payload == b"MRCL\x01" + zlib.crc32(rest).to_bytes(4, "little") + rest


def test_large_numbers_take_several_bytes_low_bits_first() -> None:
    code = Code(24, 1, 256, seed=2**64 - 1, stream_id=300)
    header = encode_header(replace(HEADER, segments=(Segment(6, code, False),)))
    assert bytes.fromhex("ff" * 9 + "01" + "ac02") in header
    assert bytes([6, 24, 1, 0x80, 0x02, 0]) in header


def test_every_flipped_bit_is_noticed() -> None:
    payload = encode_payload(HEADER, body(HEADER))
    for position in range(8 * len(payload)):
        flipped = bytearray(payload)
        flipped[position // 8] ^= 1 << position % 8
        with pytest.raises(FormatError, match=r"^layer\.weight: "):
            decode_header(bytes(flipped), "layer.weight")


def test_every_truncation_and_any_trailing_bytes_are_noticed() -> None:
    payload = encode_payload(HEADER, body(HEADER))
    for length in range(len(payload)):
        kind = TruncatedPayloadError if length < 21 else ChecksumError
        with pytest.raises(kind, match="truncated"):
            decode_header(payload[:length], "w")
    for extra in (b"\0", payload):
        with pytest.raises(ChecksumError):
            decode_header(payload + extra, "w")


def test_a_short_payload_says_how_many_bytes_it_has() -> None:
    with pytest.raises(TruncatedPayloadError) as raised:
        decode_header(b"MRCL\x01", "layer.weight")
    assert str(raised.value) == (
        "layer.weight: a payload has at least 21 bytes, found 5; the file is truncated: download it again"
    )


def test_a_payload_of_the_wrong_length_says_both_lengths() -> None:
    for n_bytes, found in ((84, 121), (86, 123), (0, 37)):
        with pytest.raises(TruncatedPayloadError) as raised:
            decode_header(made_up(NUMBERS, rest=bytes(n_bytes)), "layer.weight")
        assert str(raised.value) == (
            f"layer.weight: the header announces a payload of 122 bytes, found {found}; "
            "the file is truncated or damaged: download it again"
        )


def test_a_damaged_byte_names_both_checksums() -> None:
    payload = bytearray(made_up(NUMBERS, rest=bytes(85)))
    payload[5:9] = b"\x01\x02\x03\x04"
    found = zlib.crc32(bytes(payload[9:]))
    with pytest.raises(ChecksumError) as raised:
        decode_header(bytes(payload), "layer.weight")
    assert str(raised.value) == (
        "layer.weight: bytes 9 to 122 of the payload: expected CRC-32 04030201, found "
        f"{found:08x}; the file is truncated or damaged: download it again"
    )


def test_a_newer_version_says_to_upgrade() -> None:
    with pytest.raises(UnsupportedVersionError) as raised:
        decode_header(sealed(bytes(40), version=3), "layer.weight")
    assert str(raised.value) == (
        "layer.weight: this miracle-hub reads payload version 1 or 2, found 3; upgrade: "
        "pip install -U miracle-hub"
    )


def test_version_zero_never_existed() -> None:
    assert defect(sealed(bytes(40), version=0)).startswith(
        "layer.weight: byte 4 of the payload header: expected format version 1 or 2, found 0; "
    )


def test_another_magic_says_what_was_expected() -> None:
    assert defect(b"MRCK" + made_up(NUMBERS)[4:]) == (
        "layer.weight: byte 0 of the payload header: expected the magic b'MRCL', found b'MRCK'; "
        "the file is damaged or was not written by miracle-hub"
    )


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        (0, 4, "byte 9 of the payload header: expected a dtype from 0 to 3, found 4"),
        (1, 9, "byte 10 of the payload header: expected a number of dimensions from 0 to 8, found 9"),
        (2, 0, "byte 11 of the payload header: expected a dimension from 1 to 1099511627776, found 0"),
        (3, 2**40 + 1, "expected a dimension from 1 to 1099511627776, found 1099511627777"),
        (4, 0, "expected a number of columns from 1 to 1099511627776, found 0"),
        (5, 2**41, "expected band columns from 0 to 1099511627776, found 2199023255552"),
        (6, 2, "expected permuted from 0 to 1, found 2"),
        (7, 16, "expected log2 of the rotation width from 0 to 15, found 16"),
        (8, 2**64, "expected a seed from 0 to 18446744073709551615, found 18446744073709551616"),
        (9, 2**32, "expected a stream_id from 0 to 4294967295, found 4294967296"),
        (10, 0, "expected a number of segments from 1 to 64, found 0"),
        (10, 65, "expected a number of segments from 1 to 64, found 65"),
        (11, 0, "expected a number of rows from 1 to 1099511627776, found 0"),
        (12, 0, "expected L from 1 to 256, found 0"),
        (12, 25, "expected a possible code, found code: window_bits must be an integer from 1 to 24"),
        (13, 9, "expected a possible code, found code: step_bits must be an integer from 1 to 8"),
        (14, 0, "expected V from 1 to 256, found 0"),
        (14, 257, "expected V from 1 to 256, found 257"),
        (15, 2, "expected scales per row from 0 to 1, found 2"),
    ],
)
def test_a_number_out_of_range_is_named_with_its_range(field: int, value: int, expected: str) -> None:
    numbers = NUMBERS[:field] + [value] + NUMBERS[field + 1 :]
    assert expected in defect(made_up(numbers, rest=bytes(85)))


@pytest.mark.parametrize("field", range(len(NUMBERS)))
def test_a_number_in_more_bytes_than_it_needs_is_refused(field: int) -> None:
    parts = [varint(number) for number in NUMBERS]
    parts[field] = bytes([parts[field][0] | 128, 0])
    message = defect(sealed(b"".join(parts) + bytes(97)))
    assert "in the shortest form, found" in message and f"byte {9 + field} " in message


def test_a_number_without_an_end_is_refused() -> None:
    expected = "layer.weight: byte 19 of the payload header: expected a dtype as a varint, found no end of it"
    assert defect(sealed(b"\xff" * 40)).startswith(expected)
    assert "as a varint, found no end of it" in defect(sealed(bytes(NUMBERS[:8]) + b"\xff" * 5))


def test_a_header_that_ends_before_its_digest_is_refused() -> None:
    message = defect(sealed(bytes(NUMBERS)))
    assert "byte 25 of the payload header: expected relative error and digest, found the end" in message


@pytest.mark.parametrize("error", [-1.0, float("nan"), float("inf"), float("-inf")])
def test_an_impossible_relative_error_is_refused(error: float) -> None:
    message = defect(made_up(NUMBERS, error=error, rest=bytes(85)))
    assert f"expected a relative squared error of 0 or more, found {error}" in message


def test_rows_that_do_not_fill_the_shape_are_refused() -> None:
    numbers = NUMBERS[:11] + [5] + NUMBERS[12:]
    assert "expected 5 rows × 48 columns to fill the shape, found (6, 48)" in defect(made_up(numbers))


def test_a_rotation_that_does_not_divide_the_columns_is_refused() -> None:
    numbers = NUMBERS[:7] + [5] + NUMBERS[8:]
    assert "expected a rotation width that divides 48 columns, found 32" in defect(made_up(numbers))


def test_a_scalar_header_may_announce_one_weight_only() -> None:
    numbers = [0, 0, 1, 0, 0, 0, 0, 0, 1, 1, 8, 8, 1, 0]
    header, _ = decode_header(made_up(numbers, rest=bytes(3)), "w")
    assert header.shape == () and header.n_weights == 1


@pytest.mark.parametrize(
    "numbers",
    [
        [0, 1, 2**40, 2**40, 0, 0, 0, 0, 0, 1, 1, 1, 1, 256, 0],
        [0, 2, 2**40, 1, 1, 0, 0, 0, 0, 0, 1, 2**40, 24, 24, 1, 1],
        [0, 8, *[2**5] * 8, 2**20, 0, 0, 0, 0, 0, 1, 2**20, 8, 1, 256, 1],
    ],
)
def test_a_huge_shape_in_a_small_file_is_refused_at_once(numbers: list[int]) -> None:
    started = time.process_time()
    with pytest.raises(TruncatedPayloadError, match="the header announces a payload of"):
        decode_header(made_up(numbers, rest=bytes(1000)), "w")
    assert time.process_time() - started < AT_ONCE_SECONDS


def test_more_weights_than_the_format_allows_are_refused() -> None:
    numbers = [0, 2, 2**40, 2, 2, 0, 0, 0, 0, 0, 1, 2**40, 1, 1, 256, 0]
    assert "to fill the shape, found (1099511627776, 2)" in defect(made_up(numbers))
    many = [0, 8, *[2**40] * 8, 2**40, 0, 0, 0, 0, 0, 1, 1, 1, 1, 256, 0]
    assert "to fill the shape" in defect(made_up(many))


def test_segments_of_different_streams_cannot_share_a_payload() -> None:
    segments = (Segment(3, Code(8, 2, 1, seed=1), True), Segment(3, Code(8, 2, 1, seed=2), True))
    with pytest.raises(
        OptionError, match="1 to 64 segments of one seed and stream_id, found 2 segments of 2"
    ):
        encode_header(replace(HEADER, segments=segments))
    with pytest.raises(OptionError, match="found 65 segments of 1"):
        encode_header(replace(HEADER, segments=segments[:1] * 65))


@given(st.binary(max_size=200))
@settings(deadline=None, max_examples=300, derandomize=True)
def test_arbitrary_bytes_behind_a_right_checksum_give_a_named_error(rest: bytes) -> None:
    try:
        decode_header(sealed(rest), "w")
    except FormatError:
        pass
