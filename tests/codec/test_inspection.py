"""What `inspect` says is what the files hold."""

import hashlib
from pathlib import Path

import pytest
from torch import Tensor

from miracle_hub.codec.decompress import load_state_dict
from miracle_hub.codec.inspection import inspect_folder
from miracle_hub.coding.digest import digest


def test_totals_are_the_sizes_of_the_files(compressed: Path, tensors: dict[str, Tensor]) -> None:
    inspection = inspect_folder(compressed)
    file = compressed / "model.safetensors"
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    assert inspection.file_bytes == file.stat().st_size
    assert inspection.file_bytes == header + sum(tensor.n_bytes for tensor in inspection.tensors)
    assert inspection.n_weights == sum(tensor.numel() for tensor in tensors.values())
    assert inspection.bits_per_weight == 8 * inspection.file_bytes / inspection.n_weights
    coded = [tensor for tensor in inspection.tensors if not tensor.reason]
    rate = 8 * sum(tensor.n_bytes for tensor in coded) / sum(tensor.n_weights for tensor in coded)
    assert inspection.payload_rate == rate < inspection.bits_per_weight


def test_every_tensor_is_described(compressed: Path, tensors: dict[str, Tensor]) -> None:
    decoded = load_state_dict(compressed)
    reports = {tensor.name: tensor for tensor in inspect_folder(compressed).tensors}
    assert reports.keys() == tensors.keys()
    for name, report in reports.items():
        assert report.shape == tuple(tensors[name].shape) and report.dtype == "F32"
        error = (decoded[name] - tensors[name]).double().square().sum() / tensors[
            name
        ].double().square().sum()
        if report.reason:
            assert report.codes == () and report.scale == 0 == report.relative_error
        else:
            assert report.relative_error == pytest.approx(float(error), rel=1e-5)
            assert report.rotation == (64 if name == "first.weight" else 32)
            assert {code.window_bits for code in report.codes} == {8}
            rates = [code.rate for code in report.codes]
            assert min(rates) < report.rate < max(rates) + 0.7
    ratio = reports["second.weight"].scale / reports["first.weight"].scale
    assert ratio == pytest.approx(50 * 2**0.5, rel=0.3)  # 1 / 0.02, and the rotations' 1/√32 and 1/√64


def test_a_single_file_is_described_like_its_folder(compressed: Path) -> None:
    assert inspect_folder(compressed / "model.safetensors") == inspect_folder(compressed)


def test_the_digest_is_that_of_the_decoded_tensors_by_name(compressed: Path) -> None:
    decoded = load_state_dict(compressed)
    names = sorted(tensor.name for tensor in inspect_folder(compressed).tensors if not tensor.reason)
    lines = "".join(f"{name} {digest(decoded[name].flatten()):016x}\n" for name in names)
    assert inspect_folder(compressed).digest == hashlib.sha256(lines.encode()).hexdigest()


def test_a_dense_folder_has_no_payloads(model: Path) -> None:
    inspection = inspect_folder(model)
    assert inspection.payload_rate == 0 and inspection.bits_per_weight > 32
    assert all(tensor.reason and tensor.rate == 32 for tensor in inspection.tensors)
