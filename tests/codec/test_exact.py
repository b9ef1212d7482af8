"""Exact payloads: every bit of every dtype comes back, in two decoders; hostile ones are refused unread."""

import hashlib
import json
import math
import runpy
import tracemalloc
import zlib
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from miracle_hub.codec import payloads
from miracle_hub.codec.dtypes import raw_bytes
from miracle_hub.codec.exact import EXACT, bits_digest, exact_payload
from miracle_hub.codec.rates import Choice, Option
from miracle_hub.coding.backend import choose
from miracle_hub.coding.digest import digest
from miracle_hub.errors import ChecksumError, FormatError, MiracleError, OptionError
from miracle_hub.format.exact import (
    DEFLATED_PALETTE,
    DEFLATED_PLANES,
    DTYPES,
    MAGIC,
    ExactHeader,
    decode_exact,
    encode_exact,
)
from miracle_hub.format.frame import Frame
from miracle_hub.format.spec import TensorSpec

GOLDEN = Path(__file__).parents[1] / "golden"
KEPT: dict[str, list[str]] = json.loads((GOLDEN / "exact.json").read_text(encoding="utf-8"))
SECOND = runpy.run_path(str(GOLDEN / "exact_decoder.py"))["decode"]
FLOATS = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn, torch.complex64]
OTHERS = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint64, torch.bool]


def entry(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def decoded(data: bytes) -> Tensor:
    payload = payloads.read(entry(data), "t")
    assert payload is not None and payload.facts.is_exact
    return payload.decode(choose("cpu"))


@pytest.mark.parametrize("name", KEPT)
def test_a_kept_payload_decodes_to_the_same_bits_in_both_decoders(name: str) -> None:
    data, content = bytes.fromhex(KEPT[name][0]), KEPT[name][1]
    dtype, shape, raw, _ = SECOND(data)
    assert f"{dtype} {shape} {hashlib.sha256(raw).hexdigest()}" == content
    if name != "exponent" or hasattr(torch, "float8_e8m0fnu"):
        found = decoded(data)
        assert raw_bytes(found) == raw and list(found.shape) == shape


def test_the_kept_payloads_have_every_form_and_dtype() -> None:
    headers = [decode_exact(bytes.fromhex(data), name)[0] for name, (data, _) in KEPT.items()]
    assert {header.form for header in headers} == {0, 1, 2, 3}
    assert {header.dtype for header in headers} == set(DTYPES)


@settings(max_examples=60, deadline=None)
@given(
    dtype=st.sampled_from(FLOATS + OTHERS),
    shape=st.lists(st.integers(1, 9), max_size=4),
    n_words=st.sampled_from([1, 2, 3, 100, 70_000]),
    seed=st.integers(0, 2**32),
)
def test_any_bits_come_back(dtype: torch.dtype, shape: list[int], n_words: int, seed: int) -> None:
    """NaN of every kind, minus zero and subnormals among them."""
    generator = torch.Generator().manual_seed(seed)
    n_bytes = math.prod(shape) * dtype.itemsize
    if dtype == torch.bool:
        tensor = torch.randint(0, 2, shape, generator=generator).bool()
    else:
        words = torch.randint(0, 256, (n_words, dtype.itemsize), generator=generator, dtype=torch.uint8)
        places = torch.randint(0, n_words, (n_bytes // dtype.itemsize,), generator=generator)
        tensor = words[places].flatten().view(dtype).view(shape)
    data = exact_payload(tensor)
    assert data is not None
    found = decoded(data)
    assert found.dtype == dtype and found.shape == tensor.shape and raw_bytes(found) == raw_bytes(tensor)
    assert SECOND(data)[2] == raw_bytes(tensor)


def test_masks_and_indices_take_a_small_part_of_their_bytes() -> None:
    mask, places = torch.tril(torch.ones(64, 64)), torch.arange(512)[None]
    sizes = [len(exact_payload(tensor) or b"") for tensor in (mask, places, torch.zeros(300, 300))]
    assert sizes[0] < 200 and sizes[1] < 60 and sizes[2] < 100


def test_the_digest_is_that_of_float32_words() -> None:
    values = torch.randn(50)
    assert bits_digest(raw_bytes(values)) == digest(values)


def test_what_the_format_has_not_is_no_payload() -> None:
    assert exact_payload(torch.zeros(0, 3)) is None and exact_payload(torch.zeros([1] * 9)) is None
    assert exact_payload(torch.zeros(3, dtype=torch.complex128)) is None
    choice = Choice(1, Option(None, 0, 0.0, "exact"))
    with pytest.raises(OptionError, match="found torch.complex128"):
        EXACT.encode(torch.zeros(3, dtype=torch.complex128), choice, "t", choose("cpu"))
    with pytest.raises(OptionError, match="of another codec"):
        EXACT.payload_bytes(TensorSpec("t", "F32", (3,)), choice)
    payload = payloads.read(entry(exact_payload(torch.ones(3, 3)) or b""), "t")
    assert payload is not None
    with pytest.raises(OptionError, match="load it dense"):
        payload.packed(None, "cpu")


def sealed(header: ExactHeader, words: bytes = b"", body: bytes = b"") -> bytes:
    return encode_exact(header, words, body)


def deflated(data: bytes) -> bytes:
    deflater = zlib.compressobj(9, zlib.DEFLATED, -15)
    return deflater.compress(data) + deflater.flush()


MASK = ExactHeader("F32", (4, 4), 0, 2, bits_digest(bytes(60) + b"\0\0\x80?"))
WORDS, BODY = b"\0\0\0\0\0\0\x80?", b"\0\1"
PLANES = ExactHeader("U8", (1000,), DEFLATED_PLANES)
ATTACKS = {
    "a number of words beyond the limit": (
        sealed(ExactHeader("F32", (4, 4), 0, 1 << 17), WORDS, BODY),
        "a number of words from 1 to 65536",
    ),
    "no words": (b"\0\1\4\0\0" + bytes(8), "a number of words from 1"),
    "a form that there is not": (b"\0\1\4\4" + bytes(9), "a form from 0 to 3"),
    "a dtype that there is not": (b"\x7f\1\4\2" + bytes(9), "a dtype from 0 to 16"),
    "nine dimensions": (b"\0\x09" + b"\1" * 9 + b"\2" + bytes(9), "a number of dimensions from 0 to 8"),
    "a dimension of zero": (b"\0\1\0\2" + bytes(9), "a dimension from 1"),
    "2^80 weights": (
        b"\0\2" + b"\x80\x80\x80\x80\x80\x40" * 2 + b"\2" + bytes(9),
        "a dimension from 1|at most",
    ),
    "a billion weights in no bytes": (
        b"\0\1\x80\x94\xeb\xdc\x03\2" + bytes(12),
        "at most 2048 weights for each of",
    ),
    "words cut off": (sealed(MASK, WORDS[:5]), r"\d+ bytes or more"),
    "places cut off": (sealed(MASK, WORDS, BODY[:1]), r"\d+ bytes or more"),
    "no digest": (b"\0\1\4\0\2" + bytes(6), "a digest"),
    "words that fall": (sealed(MASK, WORDS[4:] + WORDS[:4], BODY), "words that rise"),
    "places beyond the words": (
        sealed(ExactHeader("F32", (4,), 0, 3), WORDS + b"\1\0\x80?", b"\xff"),
        "places below 3, found 3",
    ),
    "padding that is not zero": (
        sealed(ExactHeader("F32", (4,), 0, 2), WORDS, b"\x0f"),
        "zero bits of padding",
    ),
    "bytes behind the body": (sealed(MASK, WORDS, BODY + b"\0"), "the end, or zeros up to the least length"),
    "no deflate stream": (sealed(PLANES, b"", b"\xff\xff\xff"), "a deflate stream"),
    "a stream cut off": (
        sealed(PLANES, b"", deflated(bytes(range(250)) * 4)[:-9]),
        "a deflate stream of 1000",
    ),
    "a stream too short": (sealed(PLANES, b"", deflated(bytes(999))), "a deflate stream of 1000"),
    "a bomb": (
        sealed(PLANES, b"", deflated(bytes(10**8))),
        "a deflate stream of 1000 bytes, found 1001 or more",
    ),
    "a bomb of places": (
        sealed(ExactHeader("F32", (4, 4), DEFLATED_PALETTE, 2), WORDS, deflated(bytes(10**8))),
        "a deflate stream of 2 bytes, found 3 or more",
    ),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_a_hostile_payload_is_refused_for_its_reason_and_cheaply(name: str) -> None:
    data, reason = ATTACKS[name]
    if data[:4] != MAGIC:
        data = Frame(MAGIC, (1,), "exact payload", 0).seal(data)
    tracemalloc.start()
    try:
        with pytest.raises(FormatError, match=f"^t: .*{reason}"):
            decoded(data)
        assert tracemalloc.get_traced_memory()[1] < 1 << 21
    finally:
        tracemalloc.stop()


def test_every_flipped_bit_is_found() -> None:
    data = exact_payload(torch.tril(torch.ones(9, 9)))
    assert data is not None
    for place in range(8 * 4, 8 * len(data)):
        flipped = bytearray(data)
        flipped[place // 8] ^= 1 << place % 8
        with pytest.raises(MiracleError):
            decoded(bytes(flipped))


def test_a_wrong_digest_is_found_though_the_checksum_is_right() -> None:
    wrong = sealed(ExactHeader("F32", (4, 4), 0, 2, 5), WORDS, BODY)
    with pytest.raises(ChecksumError, match="the header promises 0000000000000005"):
        decoded(wrong)
    assert decoded(sealed(MASK, WORDS, BODY))[3, 3] == 1
