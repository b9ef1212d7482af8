"""A folder of payloads: what is coded, what stays plain bit for bit, and the same files every time."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from miracle_hub.codec.compress import Report
from miracle_hub.codec.decompress import load_state_dict, stored_tensors
from miracle_hub.codec.inspection import inspect_folder
from miracle_hub.errors import OptionError

Compress = Callable[..., Report]
SaveModel = Callable[..., Path]


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_matrices_come_back_with_the_measured_error_and_the_report_says_what_was_written(
    model: Path, tensors: dict[str, Tensor], compress: Compress, tmp_path: Path
) -> None:
    report = compress(model, tmp_path / "out")
    decoded = load_state_dict(tmp_path / "out")
    assert {n: (t.shape, t.dtype) for n, t in decoded.items()} == {
        n: (t.shape, t.dtype) for n, t in tensors.items()
    }
    for entry in inspect_folder(tmp_path / "out").tensors:
        difference = (decoded[entry.name] - tensors[entry.name]).double().square().sum()
        error = float(difference / tensors[entry.name].double().square().sum())
        assert entry.reason or entry.relative_error == pytest.approx(error, rel=1e-5)
        assert error < 0.05
    n_bytes = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert report.compressed_bytes == n_bytes
    assert report.dense_bytes == (model / "model.safetensors").stat().st_size
    assert report.n_weights == sum(t.numel() for t in tensors.values())
    assert report.bits_per_weight == 8 * n_bytes / report.n_weights <= 3.0


def test_the_same_inputs_give_the_same_files_and_another_seed_other_ones(
    model: Path, compress: Compress, tmp_path: Path
) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        compress(model, tmp_path / name, seed=seed)
    assert files(tmp_path / "a") == files(tmp_path / "b")
    a, c = load_state_dict(tmp_path / "a"), load_state_dict(tmp_path / "c")
    assert not torch.equal(a["first.weight"], c["first.weight"])
    assert torch.equal(a["norm.weight"], c["norm.weight"])


def test_config_names_the_method_and_keeps_everything_else(
    save_model: SaveModel, tensors: dict[str, Tensor], compress: Compress, tmp_path: Path
) -> None:
    config = {"model_type": "bert", "dtype": "float32", "größe": [1, {"a": None}]}
    source = save_model(tensors, config=config)
    report = compress(source, tmp_path / "out", seed=3, modules_to_not_convert=["second"])
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    facts = written.pop("quantization_config")
    assert written == config
    assert facts["quant_method"] == "miracle" and facts["format_version"] == 1 and facts["seed"] == 3
    assert facts["digest"] == report.digest == inspect_folder(tmp_path / "out").digest
    assert facts["modules_to_not_convert"] == ["second"]


def test_a_null_quantization_config_is_a_dense_model(
    save_model: SaveModel, tensors: dict[str, Tensor], compress: Compress, tmp_path: Path
) -> None:
    source = save_model(tensors, config={"model_type": "bert", "quantization_config": None})
    compress(source, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "miracle"


def test_tensors_that_cannot_be_coded_stay_plain_bit_for_bit_with_a_reason(
    save_model: SaveModel, compress: Compress, tmp_path: Path
) -> None:
    plain = {
        "empty": torch.zeros(0, 5),
        "integers": torch.arange(2000).view(2, 1000),
        "bytes": torch.arange(200, dtype=torch.uint8),
        "small_bytes": torch.tensor([77, 82], dtype=torch.uint8),
        "mask": torch.arange(2001).view(3, -1) % 3 == 0,
        "scalar": torch.tensor(1.5),
        "flag": torch.tensor(True),
        "complex": torch.view_as_complex(randn(40, 40, 2)),
        "float8": randn(40, 40).to(torch.float8_e4m3fn),
        "little": randn(31, 33),
        "vector.running_mean": randn(3000),
        "odd.half": randn(5).half(),
        "odd.wide": randn(7).double(),
    }
    source = save_model({**plain, "w": randn(64, 64)})
    compress(source, tmp_path / "out", bits_per_weight=40.0 * 8)if False else None
    compress(source, tmp_path / "out", size=least(source, compress, tmp_path))
    stored, decoded = load_file(tmp_path / "out" / "model.safetensors"), load_state_dict(tmp_path / "out")
    for name, tensor in plain.items():
        for found in (stored[name], decoded[name]):
            assert found.dtype == tensor.dtype and found.shape == tensor.shape
            assert torch.equal(raw(found), raw(tensor)), name
    reasons = {tensor.name: tensor.reason for tensor in inspect_folder(tmp_path / "out").tensors}
    assert reasons == {
        "w": "",
        "empty": "empty",
        "integers": "dtype I64 is not floating point",
        "bytes": "dtype U8 is not floating point",
        "small_bytes": "dtype U8 is not floating point",
        "mask": "dtype BOOL is not floating point",
        "scalar": "a vector of fewer than 32768 weights",
        "flag": "dtype BOOL is not floating point",
        "complex": "dtype C64",
        "float8": "dtype F8_E4M3",
        "little": "fewer than 1024 weights",
        "vector.running_mean": "a vector of fewer than 32768 weights",
        "odd.half": "a vector of fewer than 32768 weights",
        "odd.wide": "a vector of fewer than 32768 weights",
    }


def raw(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def least(source: Path, compress: Compress, tmp_path: Path) -> int:
    """The least size, as the error for asking less says it."""
    from miracle_hub.errors import BudgetError

    with pytest.raises(BudgetError) as raised:
        compress(source, tmp_path / "least", size=1)
    return int(str(raised.value).split("least possible is ")[1].split(" bytes")[0].replace(",", ""))
