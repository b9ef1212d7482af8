"""Lossless compression: every bit of every tensor comes back, and nothing says how to lose any."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import miracle_hub
from miracle_hub.codec.compress import compress_folder
from miracle_hub.codec.decompress import decompress_folder, load_state_dict
from miracle_hub.codec.dtypes import raw_bytes
from miracle_hub.codec.inspection import inspect_folder
from miracle_hub.codec.report import Report
from miracle_hub.codec.verification import verify_folder
from miracle_hub.errors import BaseModelError, BudgetError, OptionError
from miracle_hub.options import CompressOptions, DecompressOptions

from .test_schema import validate

Save = Callable[..., Path]
EXACT = CompressOptions(exact=True, progress=False)


def tuned_from(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A fine-tune of everything that is stored in a way of its own."""
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(96, 64, generator=generator)
    odd = torch.tensor([float("nan"), -0.0, float("-inf"), 1e-45] * 16)
    odd.view(torch.int32)[4] = 0x7FC12345  # a NaN with something in it
    return {
        **tensors,
        "first.weight": tensors["first.weight"] + 0.0002 * noise,
        "second.weight": tensors["second.weight"].bfloat16() * 1.02,
        "second.bias": odd,
        "head.weight": torch.randn(2, 64, generator=generator),
        "far.weight": torch.ones(64, 64),
        "position_ids": torch.arange(512)[None],
        "wide.weight": torch.randn(40, 40, generator=generator).double(),
        "scale": torch.tensor(0.5),
    }


@pytest.fixture
def base(save_model: Save, tensors: dict[str, Tensor]) -> Path:
    generator = torch.Generator().manual_seed(2)
    return save_model({**tensors, "far.weight": torch.randn(64, 64, generator=generator)}, "base")


@pytest.fixture
def tuned(save_model: Save, tensors: dict[str, Tensor]) -> Path:
    return save_model(tuned_from(tensors), "tuned")


@pytest.fixture
def delta(tuned: Path, base: Path, tmp_path: Path) -> Path:
    compress_folder(tuned, tmp_path / "delta", EXACT, base=base)
    return tmp_path / "delta"


def assert_same_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert raw_bytes(found[name]) == raw_bytes(tensor), name


def test_every_bit_of_a_fine_tune_comes_back(
    delta: Path, base: Path, tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    expected = tuned_from(tensors)
    assert_same_bits(load_state_dict(delta, base=base), expected)
    decompress_folder(delta, tmp_path / "dense", DecompressOptions(progress=False), base)
    assert_same_bits(load_file(tmp_path / "dense" / "model.safetensors"), expected)


def test_a_tensor_is_stored_in_the_way_that_takes_least(delta: Path, base: Path) -> None:
    tensors = {report.name: report for report in inspect_folder(delta, base=base).tensors}
    assert {name: (t.codec, t.base) for name, t in tensors.items()} == {
        "first.weight": ("bits", "first.weight"),
        "second.weight": ("bits", "second.weight"),
        "norm.weight": ("", "norm.weight"),  # the base's
        "second.bias": ("exact", ""),  # all of it differs
        "far.weight": ("exact", ""),  # simpler than its difference
        "head.weight": ("exact", ""),
        "position_ids": ("exact", ""),
        "wide.weight": ("exact", ""),
        "scale": ("exact", ""),
    }
    assert tensors["norm.weight"].n_bytes == 0 and tensors["second.weight"].rate < 4.5
    assert "every bit kept" in tensors["first.weight"].reason and tensors["first.weight"].rate < 24


def test_what_is_said_of_it_is_that_it_is_lossless(
    tuned: Path, base: Path, delta: Path, tmp_path: Path
) -> None:
    report = compress_folder(tuned, tmp_path / "again", EXACT, base=base)
    assert report.lossless and report.notes == ()
    assert (report.n_same, report.n_differing) == (1, 2)
    assert report.compressed_bytes == (tmp_path / "again" / "model.safetensors").stat().st_size
    assert not report.plain and len(report.exact) == 8
    assert inspect_folder(delta, base=base).lossless
    config = json.loads((delta / "config.json").read_text())["quantization_config"]
    validate(config, "quantization_config")
    assert config["lossless"] is True and config["non_finite"] == ["second.bias"]
    assert sorted(config["base_model"]["tensors"]) == ["first.weight", "norm.weight", "second.weight"]


def test_verify_compares_every_bit_with_the_source(
    delta: Path, tuned: Path, base: Path, save_model: Save, tensors: dict[str, Tensor]
) -> None:
    found = verify_folder(delta, dense=tuned, base=base)
    assert found.defects == () and found.n_coded == 8
    other = tuned_from(tensors)
    other["first.weight"][3, 5] = torch.nextafter(other["first.weight"][3, 5], torch.tensor(9.0))
    (defect,) = verify_folder(delta, dense=save_model(other, "other"), base=base).defects
    assert "first.weight: expected the bits of the dense model's exact tensor, found others" in defect


def test_another_base_is_refused(
    delta: Path, save_model: Save, tensors: dict[str, Tensor], base: Path
) -> None:
    moved = {**load_file(base / "model.safetensors"), "first.weight": tensors["first.weight"] * 1.5}
    other = save_model(moved, "moved")
    with pytest.raises(BaseModelError, match=r"first.weight: expected the base's tensor of digest"):
        load_state_dict(delta, base=other)
    (defect,) = verify_folder(delta, base=other).defects
    assert "first.weight: expected the base's tensor of digest" in defect
    with pytest.raises(BaseModelError, match="differences to a base, which alone mean nothing"):
        load_state_dict(delta / "model.safetensors")


def test_a_base_may_itself_be_compressed(
    base: Path, tuned: Path, tensors: dict[str, Tensor], compress: Callable[..., Report], tmp_path: Path
) -> None:
    compress(base, tmp_path / "small-base")
    compress_folder(tuned, tmp_path / "delta", EXACT, base=tmp_path / "small-base")
    found = load_state_dict(tmp_path / "delta", base=tmp_path / "small-base")
    assert_same_bits(found, tuned_from(tensors))


def test_without_a_base_every_tensor_is_kept_by_itself(
    tuned: Path, tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    report = compress_folder(tuned, tmp_path / "alone", EXACT)
    assert_same_bits(load_state_dict(tmp_path / "alone"), tuned_from(tensors))
    assert report.compressed_bytes < 0.95 * report.dense_bytes
    assert inspect_folder(tmp_path / "alone").lossless
    assert verify_folder(tmp_path / "alone", dense=tuned).defects == ()


def test_what_the_user_excludes_stays_plain(
    tuned: Path, base: Path, tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    """And has its bits: no vector is narrowed to 16 of them."""
    given = ["first.weight", "second"]
    options = CompressOptions(exact=True, modules_to_not_convert=given, progress=False)
    report = compress_folder(tuned, tmp_path / "out", options, base=base)
    held = load_file(tmp_path / "out" / "model.safetensors")
    assert sorted(report.plain) == ["first.weight", "second.bias", "second.weight"]
    assert all(held[name].dtype != torch.uint8 for name in report.plain)
    assert_same_bits(load_state_dict(tmp_path / "out", base=base), tuned_from(tensors))


def test_a_lossy_file_does_not_say_that_it_is_lossless(
    tuned: Path, base: Path, save_model: Save, tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    source = save_model({**tensors, "first.weight": tensors["first.weight"] + 0.01}, "finite")
    options = CompressOptions(bits_per_weight=4.0, window_bits=8, progress=False)
    report = compress_folder(source, tmp_path / "out", options, base=base)
    assert not report.lossless and not inspect_folder(tmp_path / "out", base=base).lossless
    path = tmp_path / "out" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= {"lossless": True}  # a liar's
    config["quantization_config"]["guard"].pop("config")
    path.write_text(json.dumps(config))
    assert not inspect_folder(tmp_path / "out", base=base).lossless


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"size": "1MB"}, BudgetError, "exact: expected no size, since no bit is lost and the size is what "),
        ({"bits_per_weight": 2.0}, BudgetError, "exact: expected no bits_per_weight, since no bit is lost"),
        ({"window_bits": 12}, OptionError, "exact: expected no window_bits, since no bit is lost"),
        ({"rotation": 1}, OptionError, "exact: expected no rotation"),
        ({"seed": 5}, OptionError, "exact: expected no seed"),
        ({"stages": 2}, OptionError, "exact: expected no stages"),
        ({"effort": 2}, OptionError, "exact: expected no effort"),
        ({"work": "kept"}, OptionError, "exact: expected no work, .* found 'kept'; leave out either"),
        ({"calibrate": "texts.txt"}, OptionError, "exact: expected no calibrate, .* found 'texts.txt'"),
        ({"calibrate": ["a text"]}, OptionError, "exact: expected no calibrate"),
    ],
    ids=str,
)
def test_what_says_how_to_lose_bits_is_refused(
    given: dict[str, Any], error: type[Exception], message: str, tuned: Path, tmp_path: Path
) -> None:
    with pytest.raises(error, match=f"^{message}"):
        miracle_hub.compress(tuned, tmp_path / "out", exact=True, **given)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("calibrate", ["self", "none", None])
def test_no_model_is_run(calibrate: str | None, tuned: Path, base: Path, tmp_path: Path) -> None:
    report = miracle_hub.compress(
        tuned, tmp_path / "out", base=base, exact=True, calibrate=calibrate, progress=False
    )
    assert report.calibration is None and not report.uncalibrated and report.lossless
    with pytest.raises(OptionError, match="model: expected none, since without calibration no model is run"):
        miracle_hub.compress(tuned, tmp_path / "never", exact=True, model=torch.nn.Linear(1, 1))
