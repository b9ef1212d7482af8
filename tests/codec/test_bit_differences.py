"""Bits payloads: with the base's tensor every bit comes back, in two decoders; hostile ones are refused."""

import math
import runpy
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from miracle_hub.codec import payloads
from miracle_hub.codec.bits import BITS, BitsPayload, bits_payload
from miracle_hub.codec.dtypes import DTYPE_NAMES, raw_bytes
from miracle_hub.codec.payloads import Request
from miracle_hub.codec.rates import Choice, Option
from miracle_hub.codec.stored import decode_sum
from miracle_hub.coding.backend import choose
from miracle_hub.errors import BaseModelError, ChecksumError, FormatError, MiracleError, OptionError
from miracle_hub.format.bits import MAGIC, PIECE, BitsHeader, Piece, decode_bits, encode_bits
from miracle_hub.format.frame import Frame
from miracle_hub.format.spec import TensorSpec

SECOND = runpy.run_path(str(Path(__file__).parents[1] / "golden" / "lossless_decoder.py"))["decode"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def entry(data: bytes) -> Tensor:
    return torch.from_numpy(np.frombuffer(bytearray(data), np.uint8))


def encoded(own: Tensor, base: Tensor) -> bytes:
    data = bits_payload(own, base)
    assert data is not None
    return data


def same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and raw_bytes(a) == raw_bytes(b)


def any_bits(shape: list[int], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """NaN of every kind, minus zero, infinities and subnormal numbers among them."""
    n_bytes = math.prod(shape) * dtype.itemsize
    raw = torch.randint(0, 256, (n_bytes,), generator=generator, dtype=torch.uint8)
    raw[torch.rand(n_bytes, generator=generator) < 0.2] = 0
    raw[torch.rand(n_bytes, generator=generator) < 0.2] = 255
    return raw.view(dtype).view(shape)


@settings(max_examples=60, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES),
    base_dtype=st.sampled_from([*DTYPES, torch.float64]),
    shape=st.lists(st.integers(1, 6), max_size=4),
    seed=st.integers(0, 2**32),
    share=st.sampled_from([0.0, 0.1, 1.0]),
)
def test_any_bits_come_back(
    dtype: torch.dtype, base_dtype: torch.dtype, shape: list[int], seed: int, share: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    base = any_bits(shape, base_dtype, generator)
    moves = torch.rand(shape, generator=generator) < share
    own = torch.where(moves, any_bits(shape, dtype, generator), base.float().to(dtype))
    data = encoded(own, base)
    assert same(decode_sum([entry(data)], "t", base=base), own)
    assert SECOND(data, DTYPE_NAMES[base_dtype], raw_bytes(base)) == (
        DTYPE_NAMES[dtype], shape, raw_bytes(own),
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_ends_of_the_range_come_back(dtype: torch.dtype) -> None:
    """The largest differences there are, both ways, by themselves and among others."""
    width = torch.iinfo(torch.int16 if dtype.itemsize == 2 else torch.int32)
    ends = [0, 1, -1, width.min, width.min + 1, width.max, width.max - 1]
    pairs = torch.tensor([(a, b) for a in ends for b in ends], dtype=getattr(torch, width.dtype))
    own, base = (side.contiguous().view(dtype) for side in pairs.T)
    for shape in ((49,), (7, 7)):
        data = encoded(own.view(shape), base.view(shape))
        assert same(decode_sum([entry(data)], "t", base=base.view(shape)), own.view(shape))
    data = encoded(own[5], base[5])
    assert same(decode_sum([entry(data)], "t", base=base[5]), own[5])


def test_pieces_are_decoded_apart() -> None:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(PIECE + 5, generator=generator).bfloat16()
    own = base + (torch.rand(PIECE + 5, generator=generator) < 0.01) * base / 128
    data = encoded(own, base)
    header, pieces = decode_bits(data, "t")
    assert header.n_pieces == len(pieces) == 2 and len(pieces[0][0]) > 1000 and len(pieces[1][0]) < 30
    assert same(decode_sum([entry(data)], "t", base=base), own)


def test_what_did_not_change_costs_next_to_nothing() -> None:
    base = torch.randn(400_000, generator=torch.Generator().manual_seed(0))
    own = base.clone()
    own[1000] += 1
    assert len(encoded(own, base)) < 400_000 / 2048 + 50


def entropy(own: Tensor, base: Tensor) -> float:
    """Bits of the differences of bit patterns, given the base's exponent: no code of numbers by themselves
    that knows no more has fewer.
    """
    ordered = [_ordered(tensor.view(torch.int16).int()) for tensor in (own, base)]
    exponents, total = base.view(torch.int16).int() >> 7 & 255, 0.0
    for exponent in exponents.unique():
        found = (ordered[0] - ordered[1])[exponents == exponent].unique(return_counts=True)[1].double()
        total -= float((found * (found / found.sum()).log2()).sum())
    return total


def _ordered(pattern: Tensor) -> Tensor:
    return torch.where(pattern < 0, -1 - (pattern & 0x7FFF), pattern)


@pytest.mark.parametrize("moved_by", [3e-5, 3e-4, 3e-3])
def test_a_fine_tune_in_bfloat16_takes_its_entropy(moved_by: float) -> None:
    """Within 3 %."""
    generator = torch.Generator().manual_seed(0)
    base = (0.05 * torch.randn(400_000, generator=generator)).bfloat16()
    own = (base.float() + moved_by * torch.randn(400_000, generator=generator)).bfloat16()
    assert 8 * len(encoded(own, base)) < 1.03 * entropy(own, base)


def test_a_payload_says_what_it_is_and_stands_for_nothing_alone() -> None:
    base = torch.randn(4, 6)
    payload = payloads.read(entry(encoded(base + 1, base)), "t")
    assert isinstance(payload, BitsPayload)
    facts = payload.facts
    assert (facts.codec, facts.dtype, facts.shape) == ("bits", "F32", (4, 6))
    assert facts.is_exact and facts.is_difference and not facts.has_rows
    with pytest.raises(BaseModelError, match="^t: expected weights, found bits beyond those of a base"):
        payload.decode(choose("cpu"))
    with pytest.raises(BaseModelError, match="a difference to those of a base, which alone means nothing"):
        decode_sum([entry(encoded(base + 1, base))], "t")
    with pytest.raises(BaseModelError, match=r"a base's tensor of shape \[4, 6\], found \[6, 4\]"):
        payload.onto(base.T, choose("cpu"))
    with pytest.raises(OptionError, match="load it dense"):
        payload.packed(None, "cpu")
    near = torch.nextafter(base, torch.tensor(9.0))
    with pytest.raises(ChecksumError, match="the header promises"):
        payload.onto(near, choose("cpu"))
    assert not same(payload.onto(near, choose("cpu"), verify=False), base + 1)


def test_rate_control_is_offered_nothing_and_other_tensors_are_none_of_the_format() -> None:
    base, choice = torch.randn(4, 6), Choice(1, Option(None, 0, 0.0, "bits"))
    spec, request = TensorSpec("t", "F32", (4, 6)), Request(8, 1, 0, 1, choose("cpu"))
    assert BITS.survey(spec, base, request, is_difference=True) is None
    assert BITS.offers([None], request) == [[]]
    with pytest.raises(OptionError, match="found one of bits"):
        BITS.payload_bytes(spec, choice)
    data = BITS.encode(base + 1, choice, "t", choose("cpu"), base=base)
    assert same(decode_sum([entry(data)], "t", base=base), base + 1)
    for own, theirs in ((base, None), (base.double(), base), (torch.zeros(0), torch.zeros(0))):
        with pytest.raises(OptionError, match="expected a tensor of F32, BF16, F16 and that of a base"):
            BITS.encode(own, choice, "t", choose("cpu"), base=theirs)
    assert bits_payload(torch.ones([1] * 9), torch.ones([1] * 9)) is None


BASE = torch.arange(40).bfloat16()
HEADER, ((CODED, PLAIN),) = decode_bits(encoded(BASE * 1.5, BASE), "t")


def sealed(*pieces: Piece, dtype: str = "BF16", shape: tuple[int, ...] = (40,)) -> bytes:
    return encode_bits(BitsHeader(dtype, shape, HEADER.digest), pieces)


def framed(body: bytes) -> bytes:
    return Frame(MAGIC, (1,), "bits payload", 0).seal(body)


ATTACKS = {
    "a dtype that there is not": (framed(b"\3\1\4\0\0" + bytes(8)), "a dtype from 0 to 2"),
    "nine dimensions": (framed(b"\0\x09" + b"\1" * 9 + bytes(10)), "a number of dimensions from 0 to 8"),
    "a dimension of zero": (framed(b"\0\1\0\0\0" + bytes(8)), "a dimension from 1"),
    "a billion weights in no bytes": (
        framed(b"\0\1\x80\x94\xeb\xdc\x03" + bytes(12)),
        "at most 2048 weights for each of",
    ),
    "2^80 weights": (framed(b"\0\2" + b"\x80\x80\x80\x80\x80\x20" * 2 + bytes(12)), "at most 2048 weights"),
    "no lengths": (framed(b"\1\1\4" + b"\x80" * 9), "a length as a varint, found no end of it"),
    "lengths beyond the end": (framed(b"\1\1\4\5\5" + bytes(12)), r"\d+ bytes or more"),
    "no digest": (framed(b"\1\2\1\4\0\0" + bytes(7)), r"\d+ bytes or more"),
    "bytes behind the pieces": (sealed((CODED, PLAIN)) + b"\0", "CRC-32"),
    "zeros behind the pieces": (
        framed(sealed((CODED, PLAIN))[9:] + b"\0"),
        "the end, or zeros up to the least length",
    ),
    "coded bits cut off": (sealed((CODED[:-1], PLAIN)), "of the length that is stated|promises"),
    "coded bits too many": (sealed((CODED + b"\0", PLAIN)), "coded bits of the length that is stated"),
    "no coded bits": (sealed((b"", PLAIN)), "numbers of the dtype"),
    "plain bits too many": (sealed((CODED, PLAIN + b"\0")), "plain bits of the length that is stated"),
    "plain bits cut off": (sealed((CODED, PLAIN[:-1])), "plain bits of the length that is stated"),
    "sizes beyond the dtype": (sealed((bytes(9), b"")), "numbers of the dtype"),
    "sizes beyond float32": (
        sealed((bytes(9), b""), dtype="F32"),
        "numbers of the dtype",
    ),
    "another shape": (sealed((CODED, PLAIN), shape=(41,)), r"a base's tensor of shape \[41\]"),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_a_hostile_payload_is_refused_for_its_reason_and_cheaply(name: str) -> None:
    data, reason = ATTACKS[name]
    decode_sum([entry(sealed((CODED, PLAIN)))], "t", base=BASE)  # what is compiled is not counted
    tracemalloc.start()
    try:
        with pytest.raises(FormatError, match=f"^t: .*({reason})"):
            decode_sum([entry(data)], "t", base=BASE)
        assert tracemalloc.get_traced_memory()[1] < 1 << 21
    finally:
        tracemalloc.stop()


def test_a_payload_that_is_cut_off_is_refused_wherever_it_is() -> None:
    data = sealed((CODED, PLAIN))
    for length in range(len(data)):
        with pytest.raises(FormatError):
            BitsPayload(entry(data[:length]), "t")


def test_every_flipped_bit_is_found() -> None:
    data = sealed((CODED, PLAIN))
    for place in range(8 * 4, 8 * len(data)):
        flipped = bytearray(data)
        flipped[place // 8] ^= 1 << place % 8
        with pytest.raises(MiracleError):
            decode_sum([entry(bytes(flipped))], "t", base=BASE)


@settings(max_examples=200, deadline=None)
@given(coded=st.binary(max_size=60), plain=st.binary(max_size=60), dtype=st.sampled_from(["BF16", "F32"]))
def test_any_bytes_are_refused_or_decode(coded: bytes, plain: bytes, dtype: str) -> None:
    payload = BitsPayload(entry(sealed((coded, plain), dtype=dtype)), "t")
    try:
        found = payload.onto(BASE, choose("cpu"), verify=False)
    except FormatError:
        return
    assert same(decode_sum([entry(encoded(found, BASE))], "t", base=BASE), found)
