"""One tensor ⇄ one payload: every shape, dtype and option comes back as the format says, to the bit."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from miracle_hub.code import Code
from miracle_hub.codec.trellis import decode_payload, encode_tensor, matrix_columns, rounded_scales
from miracle_hub.coding import reference
from miracle_hub.coding.rotation import hadamard
from miracle_hub.errors import OptionError
from miracle_hub.format.payload import Header, Segment, encode_payload

Independent = Callable[[bytes], tuple[int, np.ndarray, float, int]]
TWO_BITS = Code(8, 2, 1)


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def as_tensor(payload: bytes) -> Tensor:
    return torch.frombuffer(bytearray(payload), dtype=torch.uint8)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.view(torch.int32), b.view(torch.int32))


def whole(weights: Tensor, code: Code = TWO_BITS, row_scales: bool = True) -> list[Segment]:
    return [Segment(weights.numel() // matrix_columns(tuple(weights.shape)), code, row_scales)]


def round_trip(weights: Tensor, segments: list[Segment], rotation: int = 1, **options: Any) -> Tensor:
    payload = encode_tensor(weights, segments, rotation, where="w", **options)
    return decode_payload(as_tensor(payload), "w")[0]


@pytest.mark.parametrize(
    ("shape", "rotation", "options"),
    [
        ((1, 1024), 128, {}),
        ((1000, 7), 1, {}),
        ((3, 5, 7, 11), 1, {}),
        ((2, 64, 48), 16, {}),
        ((40_000,), 64, {}),
        ((40_000,), 1, {}),
        ((48, 32, 1, 1), 32, {}),
        ((64, 1, 3, 3), 1, {}),
        ((1, 1), 1, {}),
        ((1,), 1, {}),
        ((), 1, {}),
        ((40, 96), 2, {}),
        ((40, 96), 8, {"band_columns": 16}),
        ((40, 100), 4, {"band_columns": 16}),
        ((40, 96), 1, {"band_columns": 96}),
        ((40, 96), 8, {"permuted": True}),
        ((41, 33), 1, {"permuted": True, "band_columns": 10}),
    ],
)
@pytest.mark.parametrize("row_scales", [True, False])
def test_any_shape_comes_back_as_an_independent_decoder_reads_it(
    shape: tuple[int, ...],
    rotation: int,
    options: dict[str, Any],
    row_scales: bool,
    independent_decode: Independent,
) -> None:
    weights = gaussian(*shape)
    segments = whole(weights, row_scales=row_scales)
    payload = encode_tensor(weights, segments, rotation, where="w", **options)
    decoded, header = decode_payload(as_tensor(payload), "w")
    _, expected, _, _ = independent_decode(payload)
    assert decoded.shape == weights.shape == header.shape
    assert same_bits(decoded, torch.tensor(expected))
    error = float((decoded - weights).double().square().sum() / weights.double().square().sum())
    assert header.relative_error == pytest.approx(error, rel=1e-6)
    if weights.numel() > 1000:
        assert error < 0.105  # window 8 at 2 bits: 0.089 to 0.095 on long streams


@pytest.mark.parametrize(
    "code",
    [
        Code(8, 8, 4),
        Code(11, 11, 9),
        Code(10, 3, 2, seed=2**64 - 1, stream_id=2**32 - 1),
        Code(12, 1, 4, seed=12345),
        Code(9, 5, 17, stream_id=3),
        Code(16, 16, 33),
        Code(1, 1, 1),
    ],
)
def test_any_code_comes_back_as_an_independent_decoder_reads_it(
    code: Code, independent_decode: Independent
) -> None:
    weights = gaussian(30, 50)
    payload = encode_tensor(weights, whole(weights, code), 2, where="w")
    decoded, _ = decode_payload(as_tensor(payload), "w")
    assert same_bits(decoded, torch.tensor(independent_decode(payload)[1]))


def test_decoding_equals_the_definition_in_torch() -> None:
    weights, code = gaussian(12, 64), Code(10, 3, 2, seed=5)
    payload = encode_tensor(weights, whole(weights, code), 16, where="w")
    decoded, header = decode_payload(as_tensor(payload), "w")
    message = as_tensor(payload[-header.message_bytes[0] :])
    end = len(payload) - header.message_bytes[0]
    scales = as_tensor(payload[end - 24 : end]).view(torch.bfloat16).float()
    z = reference.decode_stream(message, code, 768).view(12, 64)
    assert same_bits(decoded, hadamard(z * scales[:, None], 16))


def test_segments_share_the_rows_and_each_keeps_its_own_rate(independent_decode: Independent) -> None:
    weights = gaussian(100, 48)
    segments = [
        Segment(10, Code(8, 4, 1, 7), True),
        Segment(1, Code(8, 1, 4, 7), False),
        Segment(89, Code(10, 2, 1, 7), False),
    ]
    payload = encode_tensor(weights, segments, 16, where="w", band_columns=20)
    decoded, header = decode_payload(as_tensor(payload), "w")
    assert same_bits(decoded, torch.tensor(independent_decode(payload)[1]))
    assert [segment.rows for segment in header.segments] == [10, 1, 89]
    error = (decoded - weights).square().sum(1) / weights.square().sum(1)
    assert error[:10].mean() < 0.012 and error[10] > 0.5 and 0.05 < error[11:].mean() < 0.11


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_coded_as_their_float32_values(dtype: torch.dtype) -> None:
    weights = gaussian(40, 64).to(dtype)
    payload = encode_tensor(weights, whole(weights), 8, where="w")
    decoded, header = decode_payload(as_tensor(payload), "w")
    assert header.dtype == {torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}[dtype]
    assert same_bits(decoded, round_trip(weights.float(), whole(weights), 8))


@pytest.mark.parametrize(
    "view",
    [
        lambda w: w.T,
        lambda w: w[::2, 1::2],
        lambda w: w.flip(0),
        lambda w: w[:, :1].expand(96, 64),
        lambda w: w.view(8, 12, 64).transpose(0, 2),
    ],
)
def test_memory_layout_does_not_matter(view: Callable[[Tensor], Tensor]) -> None:
    weights = view(gaussian(96, 64))
    segments = whole(weights)
    payload = encode_tensor(weights, segments, 2, where="w")
    assert payload == encode_tensor(weights.contiguous().clone(), segments, 2, where="w")


def test_zero_rows_among_others_decode_to_zero() -> None:
    weights = gaussian(20, 64)
    weights[3] = weights[17] = 0
    decoded = round_trip(weights, whole(weights), 16)
    assert not decoded[3].any() and not decoded[17].any()
    assert ((decoded - weights).square().sum() / weights.square().sum()) < 0.105


@pytest.mark.parametrize("row_scales", [True, False])
def test_an_all_zero_tensor_decodes_to_zero_with_no_error(row_scales: bool) -> None:
    weights = torch.zeros(20, 64)
    payload = encode_tensor(weights, whole(weights, row_scales=row_scales), 8, where="w")
    decoded, header = decode_payload(as_tensor(payload), "w")
    assert torch.equal(decoded, weights) and header.relative_error == 0


def test_a_constant_tensor_is_better_coded_without_rotation_which_makes_it_peaked() -> None:
    weights = torch.full((50, 64), -0.37)
    for rotation, most in ((1, 0.05), (64, 0.4)):
        decoded = round_trip(weights, whole(weights, row_scales=False), rotation)
        assert float(((decoded - weights) / 0.37).square().mean()) < most


@pytest.mark.parametrize("magnitude", [2.0**-60, 1e-15, 1e15, 2.0**60])
def test_magnitudes_within_the_scales_range_lose_nothing_more(magnitude: float) -> None:
    weights = gaussian(50, 64)
    decoded = round_trip(weights * magnitude, whole(weights), 8) / magnitude
    assert ((decoded - weights).square().sum() / weights.square().sum()) < 0.105


@pytest.mark.parametrize("magnitude", [1e-30, 1e30, 1e37])
@pytest.mark.parametrize("rotation", [1, 64])
def test_magnitudes_beyond_the_scales_range_stay_finite_and_are_reported(
    magnitude: float, rotation: int
) -> None:
    weights = gaussian(50, 64) * magnitude
    payload = encode_tensor(weights, whole(weights), rotation, where="w")
    decoded, header = decode_payload(as_tensor(payload), "w")
    assert bool(torch.isfinite(decoded).all())
    assert header.relative_error == pytest.approx(1, abs=1e-6)


def test_sampling_is_an_explicit_generators_business() -> None:
    weights = gaussian(30, 64)
    for code in (TWO_BITS, Code(8, 8, 4)):

        def sample(seed: int, code: Code = code) -> bytes:
            generator = torch.Generator().manual_seed(seed)
            segments = whole(weights, code)
            return encode_tensor(weights, segments, 8, where="w", selection="sample", generator=generator)

        assert sample(1) == sample(1) != sample(2)
        decoded, header = decode_payload(as_tensor(sample(1)), "w")
        best = encode_tensor(weights, whole(weights, code), 8, where="w")
        assert decode_payload(as_tensor(best), "w")[1].relative_error < header.relative_error < 1
    with pytest.raises(OptionError, match=r"needs a torch\.Generator"):
        encode_tensor(weights, whole(weights), 8, where="w", selection="sample")


@pytest.mark.parametrize("row_scales", [True, False])
def test_the_product_of_scale_and_candidate_is_exact(row_scales: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    code, rows, columns = Code(12, 12, 1, seed=9), 400, 64
    exponents = torch.rand(rows if row_scales else 1, generator=generator).double() * 128 - 64
    scales = rounded_scales(torch.exp2(exponents).float())
    message = torch.randint(0, 256, (rows * columns * 12 // 8,), dtype=torch.uint8, generator=generator)
    header = Header("F32", (rows, columns), columns, 1, (Segment(rows, code, row_scales),))
    body = scales.bfloat16().view(torch.uint8).numpy().tobytes() + message.numpy().tobytes()
    decoded, _ = decode_payload(as_tensor(encode_payload(header, body)), "w", verify=False)
    z = reference.decode_stream(message, code, rows * columns).double().view(rows, columns)
    exact = scales.double()[:, None] * z
    assert torch.equal(decoded.double(), exact)
    assert bool((decoded.abs() >= torch.finfo(torch.float32).tiny).all())


def test_scales_are_rounded_into_the_formats_range() -> None:
    scales = torch.tensor([0, 1e-30, 2.0**-65, 2.0**-64, 1.00390625, 3, 2.0**64, 1e30, math.inf, math.nan])
    expected = torch.tensor([0, 0, 0, 2.0**-64, 1, 3, 2.0**64, 2.0**64, 2.0**64, 0])
    assert torch.equal(rounded_scales(scales), expected)


@pytest.mark.parametrize(
    ("shape", "columns"),
    [
        ((384, 1536), 1536),
        ((64, 3, 7, 7), 147),
        ((64, 1, 3, 3), 9),
        ((8, 64, 48), 48),
        ((1, 197, 768), 768),
        ((64, 16, 9), 144),
        ((2, 40_000), 320),
        ((40_000,), 320),
        ((50_257,), 50_257),
        ((7,), 7),
        ((), 1),
    ],
)
def test_the_matrix_view_keeps_scales_local_and_rows_many(shape: tuple[int, ...], columns: int) -> None:
    assert matrix_columns(shape) == columns


def test_a_rotation_that_does_not_divide_the_columns_names_the_tensor_and_the_widest() -> None:
    weights = gaussian(10, 48)
    with pytest.raises(OptionError) as raised:
        encode_tensor(weights, whole(weights), 32, where="layer.weight")
    assert str(raised.value) == (
        "layer.weight: the rotation width must be a power of two up to 32768 that divides its 48 columns, "
        "found 32; use 16 or 1 (none)"
    )


@pytest.mark.parametrize("rows", [[], [9], [11], [10, 0], [12, -2]])
def test_segments_that_do_not_share_the_rows_are_refused(rows: list[int]) -> None:
    with pytest.raises(OptionError, match=r"^w: expected segments that share 10 rows, found segments of"):
        encode_tensor(gaussian(10, 48), [Segment(n, TWO_BITS, True) for n in rows], 1, where="w")
