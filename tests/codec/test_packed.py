"""A packed matrix multiplies as its decoded weights do, a bounded band of rows at a time."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from miracle_hub.code import Code
from miracle_hub.codec import packed as module
from miracle_hub.codec.dtypes import TORCH_DTYPES
from miracle_hub.codec.packed import (
    PackedMatrix,
    is_packable,
    is_reordered,
    packed_linear,
    packed_matmul,
)
from miracle_hub.codec.trellis import decode_payload, encode_tensor
from miracle_hub.coding import cpu, numba_backend
from miracle_hub.coding.numba_backend import NumbaBackend
from miracle_hub.coding.triton_backend import TritonBackend
from miracle_hub.errors import ChecksumError, OptionError, TruncatedPayloadError
from miracle_hub.format.payload import Segment
from tests.limits import HANG_SECONDS

# Name → shape, segments, options of the encoder.
CASES: dict[str, tuple[tuple[int, int], list[Segment], dict[str, Any]]] = {
    "one segment": ((96, 64), [Segment(96, Code(8, 2, 1), True)], {}),
    "two codes": (
        (96, 64),
        [Segment(50, Code(8, 3, 2), True), Segment(46, Code(8, 2, 3), False)],
        {},
    ),
    "rotated": ((96, 64), [Segment(96, Code(10, 1, 1), True)], {"rotation": 64}),
    "one scale": ((80, 96), [Segment(80, Code(8, 8, 5), False)], {"rotation": 32}),
    "without a table": ((64, 32), [Segment(64, Code(14, 14, 200), False)], {}),
    "cut rows": ((4, 2048), [Segment(31, Code(8, 2, 1), True), Segment(33, Code(8, 3, 1), True)], {}),
    "banded": ((96, 64), [Segment(96, Code(8, 2, 1), True)], {"band_columns": 16}),
    "ragged bands": (
        (96, 64),
        [Segment(50, Code(8, 3, 2), True), Segment(46, Code(8, 5, 3), False)],
        {"band_columns": 20, "rotation": 16},
    ),
    "bands without a table": ((64, 32), [Segment(64, Code(14, 14, 200), False)], {"band_columns": 5}),
    "permuted": (
        (96, 64),
        [Segment(50, Code(8, 2, 1), True), Segment(46, Code(8, 2, 1), True)],
        {"permuted": True, "rotation": 16},
    ),
}
_DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def payload_of(weights: Tensor, segments: list[Segment], **options: Any) -> Tensor:
    data = encode_tensor(weights, segments, options.pop("rotation", 1), where="w", **options)
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def make(case: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """A copy: tests may damage it."""
    return _made(case, dtype).clone()


@cache
def _made(case: str, dtype: torch.dtype) -> Tensor:
    shape, segments, options = CASES[case]
    weights = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    return payload_of(weights.to(dtype), segments, **options)


def dense(payload: Tensor) -> Tensor:
    weights, header = decode_payload(payload, "w")
    return weights.to(TORCH_DTYPES[header.dtype])


@pytest.fixture(params=CASES)
def payload(request: pytest.FixtureRequest) -> Tensor:
    return make(request.param)


@pytest.fixture
def small_bands(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bands of one to three rows, so that tiny matrices have many that start anywhere in a message."""
    for backend in (NumbaBackend, TritonBackend):
        monkeypatch.setattr(backend, "band_weights", 100)


@pytest.fixture
def many_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "n_threads", lambda: 3)
    monkeypatch.setattr(numba_backend, "_FEWEST_WEIGHTS", 0)


@pytest.fixture(params=["cpu", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    """Triton runs in its interpreter where there is no GPU."""
    return request.param


def assert_equal_to_rounding(found: Tensor, expected: Tensor) -> None:
    """float32 sums of up to 2,048 terms in another order: 2⁻¹⁸ of the result's norm."""
    assert found.shape == expected.shape
    assert (found - expected).norm() <= 2**-18 * expected.norm()


def bands(packed: PackedMatrix) -> list[Tensor]:
    return [weights.clone() for _, weights in packed._bands()]


def test_dense_is_bit_equal_to_the_decoded_payload(payload: Tensor, backend: str) -> None:
    packed = PackedMatrix(payload, "w", backend=backend)
    assert torch.equal(packed.dense(), dense(payload))
    assert (packed.rows, packed.columns) == tuple(dense(payload).shape)


def test_bands_are_bit_equal_to_the_rows_of_the_decoded_payload(
    payload: Tensor, backend: str, small_bands: None
) -> None:
    found = bands(PackedMatrix(payload, "w", backend=backend))
    assert len(found) > 3
    assert torch.equal(torch.cat(found), dense(payload))


def test_bands_do_not_depend_on_the_number_of_threads(payload: Tensor, many_threads: None) -> None:
    assert torch.equal(torch.cat(bands(PackedMatrix(payload, "w"))), dense(payload))


@pytest.mark.parametrize("stored", _DTYPES, ids=str)
@pytest.mark.parametrize("wanted", _DTYPES, ids=str)
def test_weights_are_rounded_to_the_sources_dtype_and_then_to_the_layers(
    stored: torch.dtype, wanted: torch.dtype
) -> None:
    packed = PackedMatrix(make("rotated", stored), "w", wanted)
    expected = dense(make("rotated", stored)).to(wanted)
    assert torch.equal(packed.dense(), expected) and packed.dense().dtype == wanted
    assert torch.equal(torch.cat(bands(packed)), expected)


@pytest.mark.parametrize("shape", [(1,), (3,), (65,)], ids=str)
def test_kernels_multiply_with_the_same_weights(shape: tuple[int, ...], payload: Tensor) -> None:
    """To the 8 bits of bfloat16 results; batches of more than 64 rows are multiplied band by band."""
    packed, weights = PackedMatrix(payload, "w", backend="triton"), dense(payload)
    # A row of few results may be small beside what it is the sum of: the same numbers whatever ran before.
    torch.manual_seed(0)
    x = torch.randn(*shape, packed.columns).bfloat16()
    found, expected = packed.linear(x).float(), x.float() @ weights.T
    assert (found - expected).norm() <= 2**-7 * expected.norm()
    y = torch.randn(*shape, packed.rows)
    assert_equal_to_rounding(packed.matmul(y), y @ weights)


@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 3), (0,)], ids=str)
def test_products_are_those_with_the_dense_weights(
    shape: tuple[int, ...], payload: Tensor, small_bands: None
) -> None:
    packed, weights = PackedMatrix(payload, "w"), dense(payload)
    x = torch.randn(*shape, packed.columns)
    assert_equal_to_rounding(packed_linear(x, packed), x @ weights.T)
    x = torch.randn(*shape, packed.rows)
    assert_equal_to_rounding(packed_matmul(x, packed), x @ weights)


@pytest.mark.parametrize("dtype", _DTYPES, ids=str)
def test_a_product_has_the_inputs_dtype(dtype: torch.dtype, small_bands: None) -> None:
    payload = make("two codes")
    packed, weights = PackedMatrix(payload, "w", dtype), dense(payload).to(dtype)
    x, y = torch.randn(5, 64).to(dtype), torch.randn(5, 96).to(dtype)
    tolerance: Any = {"rtol": 2e-2, "atol": 2e-2} if dtype.itemsize == 2 else {}
    torch.testing.assert_close(packed.linear(x), (x.double() @ weights.double().T).to(dtype), **tolerance)
    torch.testing.assert_close(packed.matmul(y), (y.double() @ weights.double()).to(dtype), **tolerance)


def test_a_transposed_product_in_16_bits_adds_up_in_32() -> None:
    """Many bands of one row each: rounding every partial sum would show."""
    payload = payload_of(torch.full((1024, 64), 0.01), [Segment(1024, Code(8, 4, 1), True)])
    packed, ones = PackedMatrix(payload, "w", torch.bfloat16), torch.ones(1, 1024, dtype=torch.bfloat16)
    exact = (ones.float() @ packed.dense().float()).bfloat16()
    assert torch.equal(packed.matmul(ones), exact)


def test_gradients_of_the_input_are_those_of_a_dense_layer(payload: Tensor, small_bands: None) -> None:
    packed, weights = PackedMatrix(payload, "w", torch.float64), dense(payload).double()
    for product, matrix in ((packed_linear, weights.T), (packed_matmul, weights)):
        ours = torch.randn(3, matrix.shape[0], dtype=torch.float64, requires_grad=True)
        theirs = ours.detach().clone().requires_grad_()
        product(ours, packed).sin().sum().backward()
        (theirs @ matrix).sin().sum().backward()
        assert ours.grad is not None and theirs.grad is not None
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_gradients_of_gradients_are_there_too() -> None:
    packed = PackedMatrix(make("two codes"), "w")
    small = torch.randn(2, 64, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: packed_linear(x, packed).tanh(), small)


def test_without_gradients_nothing_is_kept() -> None:
    packed = PackedMatrix(make("two codes"), "w")
    assert packed_linear(torch.randn(2, 64), packed).grad_fn is None


def test_autocast_computes_in_its_dtype_as_a_linear_layer_does() -> None:
    payload = make("two codes")
    packed, weights = PackedMatrix(payload, "w"), dense(payload)
    x = torch.randn(3, 64, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = packed_linear(x, packed), torch.nn.functional.linear(x, weights)
        assert ours.dtype == theirs.dtype == torch.bfloat16
        assert packed_linear(x.double(), packed).dtype == torch.float64
    torch.testing.assert_close(ours, theirs)
    (gradient,) = torch.autograd.grad(ours.float().sum(), x)
    assert gradient.dtype == torch.float32
    torch.testing.assert_close(gradient[0], weights.sum(0), rtol=2e-2, atol=0.2)


def test_the_payload_is_referred_to_not_copied() -> None:
    payload = make("one segment")
    packed = PackedMatrix(payload, "w")
    start, end = payload.data_ptr(), payload.data_ptr() + payload.numel()
    for _, part in packed._parts:
        assert start <= part.message.data_ptr() < end


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool], ids=str)
def test_integers_are_refused_as_a_linear_layer_refuses_them(dtype: torch.dtype) -> None:
    packed = PackedMatrix(make("one segment"), "w")
    for product, width in ((packed.linear, 64), (packed.matmul, 96)):
        with pytest.raises(OptionError, match=f"w: expected inputs of a floating dtype, found {dtype}"):
            product(torch.ones(2, width).to(dtype))


def test_several_float32_rows_keep_all_their_digits_on_the_kernels(backend: str) -> None:
    """Tensor cores would round them to 11 bits; one row, and 16-bit rows, go to the kernel."""
    payload = make("one segment")
    packed, weights = PackedMatrix(payload, "w", backend=backend), dense(payload)
    for rows in (1, 2, 64):
        x = torch.randn(rows, 64, generator=torch.Generator().manual_seed(rows))
        assert_equal_to_rounding(packed.linear(x), x @ weights.T)


def test_permuted_payloads_are_decoded_whole_and_others_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = []
    monkeypatch.setattr(module, "decode_payload", lambda *a, **k: whole.append(1) or decode_payload(*a, **k))
    for case in CASES:
        packed = PackedMatrix(make(case), "w")
        packed.linear(torch.randn(1, packed.columns))
        assert is_reordered(packed.header) == bool(whole) == (case == "permuted")
        whole.clear()


_MEMORY = """
import torch
from miracle_hub.codec.packed import PackedMatrix, packed_linear
from miracle_hub.code import Code
from miracle_hub.format.payload import Header, Segment, encode_payload

def random_matrix(rows):
    header = Header("F32", (rows, 4096), 4096, 64, (Segment(rows, Code(12, 2, 1), False),))
    messages = torch.randint(256, (sum(header.message_bytes),), dtype=torch.uint8)
    messages[-1] = 0  # padding
    data = encode_payload(header, b"\\x80\\x3f" + messages.numpy().tobytes())
    return PackedMatrix(torch.frombuffer(bytearray(data), dtype=torch.uint8), "w", torch.bfloat16)

def field(name):
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith(name)) * 1024

packed, first = random_matrix(4096), random_matrix(64)
x = torch.randn(4, 4096, dtype=torch.bfloat16, requires_grad=True)
packed_linear(x, first).sum().backward()
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")
before = field("VmRSS")
packed_linear(x, packed).sum().backward()
print(field("VmHWM") - before)
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's /proc")
def test_forward_and_backward_of_a_64_mb_layer_stay_below_four_bands_of_eight_tasks() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _MEMORY], capture_output=True, text=True, check=True, timeout=HANG_SECONDS
    )
    peak = int(done.stdout)
    assert peak < 4 * 4 * 8 * 2**17, f"{peak:,} bytes"


def test_inputs_of_another_width_are_a_named_error() -> None:
    packed = PackedMatrix(make("one segment"), "layer.weight")
    text = r"^layer\.weight: expected inputs whose last dimension is 64, found shape \(2, 128\); the "
    with pytest.raises(OptionError, match=text):
        packed_linear(torch.randn(2, 128), packed)
    with pytest.raises(OptionError, match=r"last dimension is 96, found shape \(64,\)"):
        packed_matmul(torch.randn(64), packed)


def test_what_is_no_matrix_is_a_named_error() -> None:
    weights = torch.randn(8, 4, 32)
    payload = payload_of(weights, [Segment(8, Code(8, 2, 1), True)])
    assert not is_packable(decode_payload(payload, "w")[1])
    with pytest.raises(OptionError, match=r"^w: expected a matrix .* found shape \(8, 4, 32\).* load this"):
        PackedMatrix(payload, "w")


def test_a_damaged_payload_is_found_when_it_is_parsed() -> None:
    payload = make("one segment")
    with pytest.raises(TruncatedPayloadError, match=r"^w: .*download it again"):
        PackedMatrix(payload[:20], "w")
    payload[-1] ^= 1
    with pytest.raises(ChecksumError, match=r"^w: .*expected CRC-32"):
        PackedMatrix(payload, "w")


def test_a_matrix_can_be_copied() -> None:
    packed = PackedMatrix(make("two codes"), "w")
    assert torch.equal(copy.deepcopy(packed).dense(), packed.dense())
