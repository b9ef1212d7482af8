"""A network's stream: committed bits, a second decoder, named errors for whatever is wrong."""

import json
import runpy
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from miracle_hub.code import Code, SplitCode
from miracle_hub.codec.dtypes import TORCH_DTYPES
from miracle_hub.codec.network import decode_stream_entry, encode_stream_entry, spec_of
from miracle_hub.coding.sharing import KINDS, Sharing
from miracle_hub.errors import ChecksumError, FormatError, TruncatedPayloadError
from miracle_hub.format.network import NetworkHeader, SharedSpec, decode_network, encode_network
from miracle_hub.format.payload import DTYPES
from tests.codec.network_streams import CODE_5, CODES, HEADER, TENSORS, bits, made_up, small

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = json.loads((GOLDEN / "network.json").read_text(encoding="utf-8"))
cases = pytest.mark.parametrize("case", CASES, ids=lambda case: case["tensors"][0][0])


@pytest.fixture(scope="session")
def independent() -> Callable[..., dict[str, np.ndarray]]:
    """The decoder of tests/golden, which shares no code with the package."""
    return runpy.run_path(str(GOLDEN / "network_decoder.py"))["decode"]


def specs_of(case: dict[str, Any]) -> tuple[SharedSpec, ...]:
    """The module's tensors, as a reader knows them: sharing is the stream's own matter."""
    return tuple(
        SharedSpec(name, dtype, tuple(shape), 0, int(np.prod(shape)))
        for name, dtype, shape in case["tensors"]
    )


@cases
def test_a_committed_stream_decodes_to_the_committed_bits(case: dict[str, Any]) -> None:
    decoded = decode_stream_entry(bytes.fromhex(case["stream"]), specs_of(case), "net")
    assert list(decoded) == [name for name, _, _ in case["tensors"]]
    for name, dtype, shape in case["tensors"]:
        raw = bytearray.fromhex(case["weights_float32"][name])
        expected = torch.frombuffer(raw, dtype=torch.float32).view(shape).to(TORCH_DTYPES[dtype])
        assert decoded[name].dtype == expected.dtype and decoded[name].shape == expected.shape
        assert torch.equal(bits(decoded[name]), bits(expected))


@cases
def test_a_committed_stream_is_written_again_byte_for_byte(case: dict[str, Any]) -> None:
    data = bytes.fromhex(case["stream"])
    header, scales, message = decode_network(data, specs_of(case), "net")
    words = torch.frombuffer(bytearray(scales), dtype=torch.bfloat16)
    raw = torch.frombuffer(bytearray(message), dtype=torch.uint8)
    assert encode_stream_entry(NetworkHeader(header.code, header.tensors), words.float(), raw)[0] == data


@cases
def test_an_independent_decoder_reads_the_same_bits(
    case: dict[str, Any], independent: Callable[..., dict[str, np.ndarray]]
) -> None:
    for name, weights in independent(bytes.fromhex(case["stream"]), case["tensors"]).items():
        assert weights.astype("<f4").tobytes().hex() == case["weights_float32"][name]


def test_the_committed_streams_cover_every_option_of_the_format() -> None:
    headers = [decode_network(bytes.fromhex(case["stream"]), specs_of(case), "net")[0] for case in CASES]
    tensors = [tensor for header in headers for tensor in header.tensors]
    assert {tensor.dtype for tensor in tensors} == {"F32", "BF16", "F16", "F64"}
    assert {tensor.sharing for tensor in tensors} == {0, 1, 2}
    assert {len(tensor.shape) for tensor in tensors} >= {0, 1, 2, 4}
    assert {len(header.tensors) > 1 for header in headers} == {False, True}
    codes = [code for header in headers for _, code in header.code.segments(header.n_values)]
    assert {code.overlap_bits == 0 for code in codes} == {False, True}
    assert max(code.seed for code in codes) == 2**64 - 1
    assert max(code.step_weights for code in codes) == 256
    assert {isinstance(header.code, SplitCode) for header in headers} == {False, True}
    assert not all(tensor.name.isascii() for tensor in tensors)


def test_the_independent_decoder_is_short_and_imports_nothing_of_ours() -> None:
    source = (GOLDEN / "network_decoder.py").read_text(encoding="utf-8")
    assert len(source.splitlines()) < 60
    imports = [line for line in source.splitlines() if line.startswith(("import", "from"))]
    assert imports == ["import zlib", "from pathlib import Path", "import numpy as np"]


@pytest.mark.parametrize("code", CODES, ids=str)
@pytest.mark.parametrize("seed", range(5))
def test_both_decoders_give_back_what_was_coded(
    code: Code, seed: int, independent: Callable[..., dict[str, np.ndarray]]
) -> None:
    data, tensors, weights = made_up(code, seed)
    decoded = decode_stream_entry(data, tensors, "net")
    again = independent(data, [(t.name, t.dtype, t.shape) for t in tensors])
    assert decoded.keys() == weights.keys() == again.keys()
    for tensor in tensors:
        expected = weights[tensor.name]
        assert expected.dtype == torch.float32 and expected.shape == tensor.shape
        assert torch.equal(bits(torch.from_numpy(again[tensor.name])), bits(expected))
        found, dtype = decoded[tensor.name], TORCH_DTYPES[tensor.dtype]
        assert found.dtype == dtype and torch.equal(bits(found), bits(expected.to(dtype)))


def test_shared_weights_take_their_values_with_the_tensors_scale() -> None:
    """A scalar, a hash and a tile in a file, against indexing of the values by hand."""
    code, sharings = Code(9, 9, 2, seed=4), (Sharing("hash", 5, 12), Sharing("tile", 4, 9))
    scales = torch.tensor([2.0, 0.5, 4.0])
    specs = [SharedSpec("a", "F32", (3, 4), 1, 5), SharedSpec("b", "F32", (9,), 2, 4)]
    alone = [SharedSpec("a", "F32", (5,), 0, 5), SharedSpec("b", "F32", (4,), 0, 4)]
    scalar, message = SharedSpec("c", "F32", (), 0, 1), torch.arange(code.message_bytes(10)).byte() * 37
    message[-1] &= 0xFF << (-code.message_bits(10) % 8) & 0xFF
    shared = encode_stream_entry(NetworkHeader(code, (*specs, scalar)), scales, message)[1]
    values = encode_stream_entry(NetworkHeader(code, (*alone, scalar)), scales, message)[1]
    for number, (name, sharing) in enumerate(zip("ab", sharings, strict=True)):
        places, signs = sharing.places(code.seed, number)
        assert torch.equal(shared[name].flatten(), values[name][places] * signs)
    assert torch.equal(shared["c"], values["c"]) and shared["c"].shape == ()


def sealed(data: bytes) -> bytes:
    return data[:5] + zlib.crc32(data[9:]).to_bytes(4, "little") + data[9:]


def changed(data: bytes, position: int, value: bytes) -> bytes:
    position %= len(data)
    return sealed(data[:position] + value + data[position + len(value) :])


def defect(data: bytes, kind: type[FormatError] = FormatError) -> str:
    with pytest.raises(FormatError) as raised:
        decode_stream_entry(data, TENSORS, "net")
    assert type(raised.value) is kind
    return str(raised.value)


@pytest.mark.parametrize(
    ("word", "found"),
    [
        (0x7F80, "inf"),
        (0x7FC0, "nan"),
        (0x8000, "-0"),
        (0xBF80, "-1"),
        (0x0001, "9.18355e-41"),
        (0x1F7F, "5.39984e-20"),
        (0x5F81, "1.85909e+19"),
    ],
)
def test_a_scale_that_the_format_forbids_is_named_with_its_byte(word: int, found: str) -> None:
    data = small()
    start = len(data) - 3 - 4
    assert defect(changed(data, start + 2, word.to_bytes(2, "little"))) == (
        f"net: scale 1 at byte {start + 2} of the payload: expected 0 or a number from 2^-64 to 2^64, found "
        f"{found}; the file is damaged: download it again"
    )


def test_padding_that_is_not_zero_is_named_with_its_byte() -> None:
    data = small(CODE_5)
    for last in (0b10000001, 0b11000000):
        assert defect(changed(data, -1, bytes([last]))) == (
            f"net: byte {len(data) - 1}: expected the last 7 bits of the message to be 0, found {last:08b}; "
            "the file is damaged: download it again"
        )


def test_other_weights_than_the_promised_ones_are_refused() -> None:
    data = small()
    right = decode_network(data, TENSORS, "net")[0].digest
    assert defect(changed(data, -3 - 4 - 8, bytes(8)), ChecksumError) == (
        f"net: the decoded weights have digest {right:016x}, the header promises 0000000000000000; the "
        "file is damaged: download it again"
    )


@pytest.mark.parametrize("code", [HEADER.code, CODE_5], ids=str)
def test_no_truncated_and_no_damaged_stream_decodes(code: Code) -> None:
    data = small(code)
    assert decode_stream_entry(data, TENSORS, "net").keys() == {"a", "b"}
    for length in range(len(data)):
        with pytest.raises(FormatError, match=r"^net: .*truncated"):
            decode_stream_entry(data[:length], TENSORS, "net")
    for position in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[position // 8] ^= 1 << position % 8
        with pytest.raises(FormatError, match="^net: "):
            decode_stream_entry(bytes(flipped), TENSORS, "net")


@pytest.mark.parametrize("code", [HEADER.code, CODE_5], ids=str)
def test_no_flipped_bit_gives_other_weights_even_behind_a_right_checksum(code: Code) -> None:
    data, silent = small(code), 0
    right = decode_stream_entry(data, TENSORS, "net")
    for position in range(8 * 9, 8 * len(data)):
        flipped = bytearray(data)
        flipped[position // 8] ^= 1 << position % 8
        try:
            weights = decode_stream_entry(sealed(bytes(flipped)), TENSORS, "net")
        except FormatError as error:
            assert str(error).startswith("net: ")
        else:
            assert all(torch.equal(bits(weights[name]), bits(right[name])) for name in right)
            silent += 1
    assert not silent


@pytest.mark.parametrize("kind", [0, 2])
def test_a_huge_module_is_refused_before_anything_is_allocated(kind: int) -> None:
    shape = (1 << 16, 1 << 15)
    spec = SharedSpec("w", "F32", shape, kind, 1 << 31)
    bomb = encode_network(NetworkHeader(Code(1, 1, 256), (spec,)), b"\x80\x3f", bytes(1000))
    tracemalloc.start()
    try:
        with pytest.raises(TruncatedPayloadError, match="announces 10486"):
            decode_stream_entry(bomb, (spec,), "net")
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_a_tensor_is_described_as_the_module_has_it() -> None:
    tensor = torch.zeros(3, 4, dtype=torch.float16)
    assert spec_of("w", tensor) == SharedSpec("w", "F16", (3, 4), 0, 12)
    for kind in KINDS[1:]:
        found = spec_of("w", tensor, Sharing(kind, 5, 12))
        assert found == SharedSpec("w", "F16", (3, 4), KINDS.index(kind), 5)


def test_a_dtype_that_cannot_be_coded_is_named() -> None:
    with pytest.raises(FormatError) as raised:
        spec_of("w", torch.zeros(3, dtype=torch.int32))
    assert str(raised.value) == (
        f"w: expected one of {', '.join(DTYPES)}, found torch.int32; cast the module to one of them"
    )
