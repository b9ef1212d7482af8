"""The whole way through the kernels: what Triton compressed, every backend decodes to the same bits."""

import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import miracle_hub
import miracle_kernels
from miracle_hub.code import Code
from miracle_hub.codec import ladder
from miracle_hub.codec.trellis import decode_payload, encode_tensor
from miracle_hub.coding.backend import choose
from miracle_hub.errors import BackendError, ChecksumError
from miracle_hub.format.payload import Segment, decode_header


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small matrix and a vector; two rates and a small sample, since the interpreter is slow."""
    monkeypatch.setattr(ladder, "LADDER", ((2, 2), (4, 2)))
    monkeypatch.setattr(ladder, "_SAMPLE_WEIGHTS", 64)
    folder = tmp_path / "source"
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "half.weight": torch.randn(64, 16, generator=generator).bfloat16(),
        "bias": torch.randn(9, generator=generator),
    }
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_a_model_compressed_by_the_kernels_decodes_alike_everywhere(source: Path, tmp_path: Path) -> None:
    out, dense = tmp_path / "out", tmp_path / "dense"
    options: dict[str, Any] = dict(bits_per_weight=3.9, window_bits=8, progress=False)
    report = miracle_hub.compress(source, out, backend="triton", **options)
    assert report.backend == "triton" and report.bits_per_weight <= 3.9
    by_cpu = miracle_hub.load_state_dict(out, backend="cpu")
    by_triton = miracle_hub.load_state_dict(out, backend="triton")
    assert set(by_cpu) == set(by_triton)
    for name, tensor in by_cpu.items():
        assert by_triton[name].device.type == "cpu" and torch.equal(by_triton[name], tensor), name
    miracle_hub.decompress(out, dense, backend="triton", progress=False)
    for name, tensor in load_file(dense / "model.safetensors").items():
        assert torch.equal(tensor, by_cpu[name]), name
    miracle_hub.compress(source, tmp_path / "cpu", backend="cpu", **options)
    errors = [miracle_hub.inspect(folder).tensors[-1].relative_error for folder in (out, tmp_path / "cpu")]
    assert errors[0] == pytest.approx(errors[1], rel=0.05) and errors[0] > 0


def relative_error(found: Tensor, weights: Tensor) -> float:
    """Of what readers get: rounded to the dtype of the source."""
    return float((found.float() - weights.float()).square().sum() / weights.float().square().sum())


@pytest.mark.parametrize("options", [dict(), dict(band_columns=8), dict(permuted=True)], ids=str)
def test_payloads_of_every_order_go_both_ways(options: dict[str, Any]) -> None:
    weights = torch.randn(12, 64, generator=torch.Generator().manual_seed(2)).bfloat16()
    segments = [Segment(5, Code(8, 4, 2), True), Segment(7, Code(8, 2, 2), False)]
    for backend in map(choose, ("cpu", "triton")):
        payload = torch.frombuffer(
            bytearray(encode_tensor(weights, segments, 16, where="w", backend=backend, **options)),
            dtype=torch.uint8,
        )
        expected = decode_payload(payload, "w", backend=choose("cpu"))[0]
        found, header = decode_payload(payload, "w", backend=choose("triton"))
        assert torch.equal(found.cpu(), expected)
        assert header.relative_error == pytest.approx(relative_error(expected.bfloat16(), weights), rel=1e-4)
        rounded = decode_payload(payload, "w", backend=choose("triton"), rounded=True)[0]
        assert torch.equal(rounded.cpu(), expected.bfloat16())


def test_the_kernels_find_a_wrong_digest() -> None:
    weights = torch.randn(8, 32, generator=torch.Generator().manual_seed(2))
    raw = bytearray(encode_tensor(weights, [Segment(8, Code(8, 2, 1), True)], 1, where="w"))
    _, start = decode_header(bytes(raw), "w")
    raw[start - 1] ^= 1  # the digest's last byte; the checksum is made to fit
    raw[5:9] = zlib.crc32(bytes(raw[9:])).to_bytes(4, "little")
    payload = torch.frombuffer(raw, dtype=torch.uint8)
    for backend in ("cpu", "triton"):
        with pytest.raises(ChecksumError, match="w: the decoded weights have digest"):
            decode_payload(payload, "w", backend=choose(backend))


def test_a_backend_that_cannot_run_stops_before_anything_is_written(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(miracle_kernels, "HAS_TRITON", False)
    with pytest.raises(BackendError, match="expected the package triton"):
        miracle_hub.compress(source, tmp_path / "out", bits_per_weight=3, backend="triton")
    assert not (tmp_path / "out").exists()
