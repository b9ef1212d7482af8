"""Errors, ranges and verification are of the tensor as readers get it, in the dtype of the source."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from miracle_hub.code import Code
from miracle_hub.codec.decompress import load_state_dict
from miracle_hub.codec.handed_out import require_finite
from miracle_hub.codec.inspection import inspect_folder
from miracle_hub.codec.report import Report
from miracle_hub.codec.stream_payload import payload_of_stream
from miracle_hub.codec.trellis import decode_payload, encode_tensor
from miracle_hub.codec.verification import verify_folder
from miracle_hub.coding.matrix import matrix_columns
from miracle_hub.errors import ChecksumError, NonFiniteWeightError, OptionError, SourceError
from miracle_hub.format.payload import Header, Segment, encode_header

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
Compress = Callable[..., Report]


def entry(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def error_of(found: Tensor, source: Tensor) -> float:
    power = float(source.double().square().sum())
    return float((found.double() - source.double()).square().sum()) / power if power else 0.0


def extreme(dtype: torch.dtype, kind: str, seed: int, n_extreme: int) -> Tensor:
    """Weights with some at an end of what the dtype has."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(32, 40, generator=generator).to(dtype)
    info = torch.finfo(dtype)
    value = {
        "ordinary": 1.0, "max": info.max, "min": info.min, "half": info.max * 0.49, "quarter": info.max / 4,
        "subnormal": info.smallest_normal / 8, "huge": 1e4, "zero": 0.0,
    }[kind]  # fmt: skip
    if kind == "subnormal":
        weights = (weights.double() * info.smallest_normal).to(dtype)
    places = torch.randint(0, weights.numel(), (n_extreme,), generator=generator)
    weights.view(-1)[places] = value
    return weights


EXTREMES = ["ordinary", "max", "min", "half", "quarter", "subnormal", "huge", "zero"]


@settings(max_examples=40, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES),
    kind=st.sampled_from(EXTREMES),
    n_extreme=st.sampled_from([1, 5, 200, 1280]),
    seed=st.integers(0, 99),
    rate=st.sampled_from([(1, 4), (2, 1), (8, 1)]),
    row_scales=st.booleans(),
)
def test_a_coded_tensor_is_finite_in_its_dtype_and_has_the_error_that_it_states(
    dtype: torch.dtype, kind: str, n_extreme: int, seed: int, rate: tuple[int, int], row_scales: bool
) -> None:
    weights = extreme(dtype, kind, seed, n_extreme)
    if float(weights.double().abs().max()) > 2.0**60:
        return  # such are kept plain
    segments = [Segment(weights.numel() // matrix_columns((32, 40)), Code(8, *rate), row_scales)]
    data = encode_tensor(weights, segments, 8, where="w")
    found, header = decode_payload(entry(data), "w", rounded=True)
    assert found.dtype == dtype and bool(torch.isfinite(found).all())
    assert header.relative_error == pytest.approx(error_of(found, weights), rel=1e-4, abs=1e-12)


def test_every_extreme_comes_back_finite_and_verified(
    save_anywhere: Callable[..., Path], compress: Compress, tmp_path: Path
) -> None:
    tensors = {"w": torch.randn(64, 64)}
    for dtype in DTYPES:
        for kind in EXTREMES:
            tensors[f"{str(dtype)[6:]}.{kind}"] = extreme(dtype, kind, 3, 7)
    source = save_anywhere(tmp_path / "model", tensors)
    report = compress(source, tmp_path / "out", bits_per_weight=20)
    found, stated = load_state_dict(tmp_path / "out"), inspect_folder(tmp_path / "out").tensors
    for tensor in stated:
        original = tensors[tensor.name]
        assert found[tensor.name].dtype == original.dtype
        assert bool(torch.isfinite(found[tensor.name]).all()), tensor.name
        if tensor.reason:
            assert torch.equal(found[tensor.name], original), tensor.name
        else:
            own = error_of(found[tensor.name], original)
            assert tensor.relative_error == pytest.approx(own, rel=1e-4), tensor.name
    verify_folder(tmp_path / "out", dense=source).require()
    kept = report.plain.keys() | report.exact.keys()
    assert {"float16.max", "float16.min", "float32.max", "bfloat16.min", "float64.max"} <= kept
    assert not any(name.endswith((".ordinary", ".quarter")) for name in kept if name.startswith("float16"))
    assert report.plain["float16.max"] == "values near the end of the range of F16, or beyond that of F32"


@pytest.mark.parametrize("dtype", DTYPES)
def test_stages_state_the_error_of_every_sum_in_the_dtype(
    dtype: torch.dtype, save_anywhere: Callable[..., Path], compress: Compress, tmp_path: Path
) -> None:
    tensors = {"w": torch.randn(64, 64).to(dtype), "x": torch.randn(64, 64) * 20_000}
    tensors["x"] = tensors["x"].clamp(-30_000, 30_000).to(dtype)
    source = save_anywhere(tmp_path / "model", tensors)
    compress(source, tmp_path / "out", bits_per_weight=7.0, stages=3, window_bits=12)
    for stages in (1, 2, 3):
        found = load_state_dict(tmp_path / "out", stages=stages)
        for tensor in inspect_folder(tmp_path / "out", stages).tensors:
            assert bool(torch.isfinite(found[tensor.name]).all())
            own = error_of(found[tensor.name], tensors[tensor.name])
            assert tensor.relative_error == pytest.approx(own, rel=1e-4)
    verify_folder(tmp_path / "out", dense=source).require()


def test_verify_finds_what_the_cast_made_infinite(
    save_anywhere: Callable[..., Path], compress: Compress, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As encoders of before wrote it."""
    weights = torch.randn(64, 64) * 5_000
    weights[0, 0] = 30_000
    source = save_anywhere(tmp_path / "model", {"w": weights.half(), "x": torch.randn(64, 64)})

    def careless(parts, layout, earlier, dtype, backend):  # noqa: ANN001, ANN202
        parts[0].scales.mul_(4)
        return backend.decode_matrix(parts, layout, torch.float32)

    monkeypatch.setattr("miracle_hub.codec.handed_out.decoded_in_range", careless)
    compress(source, tmp_path / "out")
    (defect,) = verify_folder(tmp_path / "out").defects
    assert "w: expected finite numbers, found NaN or infinity" in defect


def test_errors_that_encoders_of_before_measured_ahead_of_the_cast_are_taken(
    save_anywhere: Callable[..., Path], compress: Compress, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save_anywhere(tmp_path / "model", {"w": torch.randn(64, 64).bfloat16()})

    def before(handed_out, earlier, weights):  # noqa: ANN001, ANN202
        return error_of(unrounded[0].view(weights.shape), weights)

    unrounded: list[Tensor] = []

    def remembering(parts, layout, earlier, dtype, backend):  # noqa: ANN001, ANN202
        unrounded[:] = [backend.decode_matrix(parts, layout, torch.float32)[0]]
        return backend.decode_matrix(parts, layout, dtype)

    monkeypatch.setattr("miracle_hub.codec.handed_out.relative_error", before)
    monkeypatch.setattr("miracle_hub.codec.handed_out.decoded_in_range", remembering)
    compress(source, tmp_path / "out", bits_per_weight=8.2)
    verify_folder(tmp_path / "out", dense=source).require()
    other = save_anywhere(tmp_path / "other", {"w": torch.randn(64, 64).bfloat16()})
    with pytest.raises(ChecksumError, match="expected a relative squared error"):
        verify_folder(tmp_path / "out", dense=other).require()


def test_training_writes_no_weight_that_its_dtype_cannot_hold() -> None:
    code = Code(8, 2, 1)
    message = torch.zeros(code.message_bytes(40), dtype=torch.uint8)
    with pytest.raises(
        NonFiniteWeightError, match=r"^w: expected weights that float16 can hold, found -?inf"
    ):
        payload_of_stream((5, 8), torch.float16, code, torch.tensor([2.0**20]), message, "w")
    payload_of_stream((5, 8), torch.bfloat16, code, torch.tensor([2.0**20]), message, "w")
    require_finite(torch.ones(3), "w")


def test_nine_dimensions_are_refused_before_anything_is_written(
    save_anywhere: Callable[..., Path], compress: Compress, tmp_path: Path
) -> None:
    deep = torch.randn(2, 2, 2, 2, 2, 2, 2, 4, 8)
    source = save_anywhere(tmp_path / "model", {"deep": deep, "w": torch.randn(64, 64)})
    with pytest.raises(
        SourceError, match=r"deep: expected at most 8 dimensions, found shape \[2, .*reshape it"
    ):
        compress(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    compress(source, tmp_path / "out", modules_to_not_convert=["deep"], bits_per_weight=19)
    assert torch.equal(load_state_dict(tmp_path / "out")["deep"], deep)
    with pytest.raises(OptionError, match=r"a payload has at most 8 dimensions, found shape \[1, "):
        encode_header(Header("F32", (1,) * 9, 1, 1, (Segment(1, Code(8, 2, 1), False),)))
