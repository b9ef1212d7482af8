"""A payload that is wrong behind a right checksum: named errors, and never other weights."""

import tracemalloc
import zlib

import numpy as np
import pytest
import torch
from torch import Tensor

from miracle_hub.code import Code
from miracle_hub.codec.trellis import decode_payload, encode_tensor
from miracle_hub.errors import ChecksumError, FormatError, MiracleError, TruncatedPayloadError
from miracle_hub.format.payload import Header, Segment, decode_header, encode_header

WEIGHTS = torch.randn(5, 9, generator=torch.Generator().manual_seed(0))
SEGMENTS = [Segment(2, Code(6, 3, 2), True), Segment(3, Code(5, 2, 1), False)]
PAYLOAD = encode_tensor(WEIGHTS, SEGMENTS, 1, where="w")
START = decode_header(PAYLOAD, "w")[1]


def as_tensor(payload: bytes) -> Tensor:
    return torch.frombuffer(bytearray(payload), dtype=torch.uint8)


def sealed(payload: bytes) -> bytes:
    return payload[:5] + zlib.crc32(payload[9:]).to_bytes(4, "little") + payload[9:]


def changed(position: int, value: bytes) -> Tensor:
    return as_tensor(sealed(PAYLOAD[:position] + value + PAYLOAD[position + len(value) :]))


def with_scale(at: int, bits: int) -> Tensor:
    return changed(START + 2 * at, bits.to_bytes(2, "little"))


@pytest.mark.parametrize(
    ("bits", "found"),
    [
        (0x7F80, "inf"),
        (0xFF80, "-inf"),
        (0x7FC0, "nan"),
        (0x7F81, "nan"),
        (0xFFFF, "nan"),
        (0x8000, "-0"),
        (0xBF80, "-1"),
        (0x0001, "9.18355e-41"),
        (0x1F7F, "5.39984e-20"),
        (0x5F81, "1.85909e+19"),
    ],
)
def test_a_scale_that_the_format_forbids_is_named_with_its_byte(bits: int, found: str) -> None:
    with pytest.raises(FormatError) as raised:
        decode_payload(with_scale(2, bits), "layer.weight")
    assert str(raised.value) == (
        f"layer.weight: scale 2 at byte {START + 4} of the payload: expected 0 or a number from 2^-64 to "
        f"2^64, found {found}; the file is damaged: download it again"
    )


@pytest.mark.parametrize("bits", [0x0000, 0x1F80, 0x3F80, 0x5F80])
def test_the_smallest_and_largest_scales_are_read(bits: int) -> None:
    weights, _ = decode_payload(with_scale(1, bits), "w", verify=False)
    assert bool(torch.isfinite(weights).all())


@pytest.mark.parametrize("segment", [0, 1])
def test_padding_that_is_not_zero_is_named_with_its_byte(segment: int) -> None:
    header, _ = decode_header(PAYLOAD, "w")
    end = START + 2 * header.n_scales + sum(header.message_bytes[: segment + 1])
    code, rows = SEGMENTS[segment].code, SEGMENTS[segment].rows
    unused = -code.message_bits(rows * 9) % 8
    assert unused > 0
    last = PAYLOAD[end - 1] | 1 << unused - 1
    with pytest.raises(FormatError) as raised:
        decode_payload(changed(end - 1, bytes([last])), "layer.weight")
    assert str(raised.value) == (
        f"layer.weight: byte {end - 1} of the payload: expected the last {unused} bits of a message to be "
        f"0, found {last:08b}; the file is damaged: download it again"
    )


def test_a_wrong_digest_names_the_tensor_and_both_digests() -> None:
    right = decode_header(PAYLOAD, "w")[0].digest
    damaged = changed(START - 8, bytes(8))
    with pytest.raises(ChecksumError) as raised:
        decode_payload(damaged, "layer.weight")
    assert str(raised.value) == (
        f"layer.weight: the decoded weights have digest {right:016x}, the header promises "
        "0000000000000000; the payload is damaged: download the file again"
    )
    weights, _ = decode_payload(damaged, "layer.weight", verify=False)
    assert torch.equal(weights, decode_payload(as_tensor(PAYLOAD), "w")[0])


def test_no_flipped_bit_gives_other_weights_even_behind_a_right_checksum() -> None:
    right = decode_payload(as_tensor(PAYLOAD), "w")[0].flatten().view(torch.int32)
    silent = 0
    for position in range(8 * 9, 8 * len(PAYLOAD)):
        flipped = bytearray(PAYLOAD)
        flipped[position // 8] ^= 1 << position % 8
        try:
            weights, _ = decode_payload(as_tensor(sealed(bytes(flipped))), "w")
        except MiracleError as error:
            assert isinstance(error, FormatError) and str(error).startswith("w: ")
        else:
            assert torch.equal(weights.flatten().view(torch.int32), right)
            silent += 1
    # dtype, band columns wider than the matrix, step bits of no consequence, relative error.
    assert silent < 50


def test_no_flipped_bit_of_a_whole_payload_decodes() -> None:
    for position in range(8 * len(PAYLOAD)):
        flipped = bytearray(PAYLOAD)
        flipped[position // 8] ^= 1 << position % 8
        with pytest.raises(FormatError, match="^w: "):
            decode_payload(as_tensor(bytes(flipped)), "w")


def test_no_truncated_payload_decodes() -> None:
    for length in range(len(PAYLOAD)):
        with pytest.raises(FormatError, match="^w: .*truncated"):
            decode_payload(as_tensor(PAYLOAD[:length]), "w") if length else decode_payload(
                torch.zeros(0, dtype=torch.uint8), "w"
            )


def test_a_decompression_bomb_is_refused_before_anything_is_allocated() -> None:
    header = Header("F32", (1 << 20, 1 << 20), 1 << 20, 1, (Segment(1 << 20, Code(1, 1, 256), False),))
    bomb = as_tensor(sealed(encode_header(header) + bytes(1000)))
    tracemalloc.start()
    try:
        with pytest.raises(TruncatedPayloadError, match="announces a payload of 536,?870,?9"):
            decode_payload(bomb, "w")
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_one_byte_of_message_never_stands_for_more_than_2048_weights() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        window = int(rng.integers(1, 25))
        code = Code(window, int(rng.integers(1, window + 1)), int(rng.integers(1, 257)))
        n_weights = int(rng.integers(1, 10**9))
        assert n_weights <= 2048 * code.message_bytes(n_weights)
