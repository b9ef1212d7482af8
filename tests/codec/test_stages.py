"""Stages: every one halves the error, the first n decode without the others, and damage is found."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from miracle_hub.codec.decompress import decompress_folder, load_state_dict
from miracle_hub.codec.inspection import inspect_folder
from miracle_hub.codec.keeping import Roles
from miracle_hub.codec.report import Report
from miracle_hub.codec.repository import open_repository
from miracle_hub.errors import (
    BudgetError,
    ChecksumError,
    FormatError,
    MissingWeightsError,
    OptionError,
    SourceError,
)
from miracle_hub.options import DecompressOptions

Compress = Callable[..., Report]
STAGES = 3


@pytest.fixture
def staged(model: Path, compress: Compress, tmp_path: Path) -> Path:
    compress(model, tmp_path / "staged", bits_per_weight=4.0, stages=STAGES)
    return tmp_path / "staged"


def errors(folder: Path, tensors: dict[str, Tensor], stages: int) -> dict[str, float]:
    """Relative squared error of every coded tensor."""
    decoded = load_state_dict(folder, stages=stages)
    coded = [t.name for t in open_repository(folder).tensors if t.is_coded]
    return {
        name: float((decoded[name] - tensors[name]).double().square().sum() / tensors[name].square().sum())
        for name in coded
    }


def test_every_stage_halves_the_error_of_every_tensor(staged: Path, tensors: dict[str, Tensor]) -> None:
    found = [errors(staged, tensors, n) for n in range(1, STAGES + 1)]
    assert len(found[0]) == 2
    for before, after in zip(found, found[1:], strict=False):
        assert all(0 < after[name] <= before[name] / 2 for name in before)


def test_inspection_tells_the_error_and_the_bytes_of_the_stages_it_reads(
    staged: Path, tensors: dict[str, Tensor]
) -> None:
    for n in range(1, STAGES + 1):
        inspection = inspect_folder(staged, n)
        files = [staged / f"model.stage-{i}.safetensors" for i in range(1, n + 1)]
        assert inspection.file_bytes == sum(file.stat().st_size for file in files)
        for name, error in errors(staged, tensors, n).items():
            (entry,) = [t for t in inspection.tensors if t.name == name]
            assert entry.relative_error == pytest.approx(error, rel=1e-4)
            assert [c.rate for c in entry.codes].count(4 / 7) == n - 1


def test_weights_are_the_float32_sum_of_the_stages_in_order(staged: Path) -> None:
    from miracle_hub.codec.trellis import decode_payload

    parts = [load_file(staged / f"model.stage-{n}.safetensors") for n in range(1, STAGES + 1)]
    names = ["first.weight", "first.weight.stage_2", "first.weight.stage_3"]
    base, second, third = (
        decode_payload(part[name], name)[0] for part, name in zip(parts, names, strict=True)
    )
    assert torch.equal(load_state_dict(staged)["first.weight"], (base + second) + third)


def test_first_stages_decode_without_the_files_of_the_others(staged: Path, tmp_path: Path) -> None:
    whole = {n: load_state_dict(staged, stages=n) for n in (1, 2)}
    for n in (2, 1):
        (staged / f"model.stage-{n + 1}.safetensors").unlink()
        alone = load_state_dict(staged, stages=n)
        assert all(torch.equal(alone[name], tensor) for name, tensor in whole[n].items())
    with pytest.raises(MissingWeightsError, match=r"names model.stage-2.safetensors, which is missing"):
        load_state_dict(staged)


def test_the_size_is_that_of_all_stages_together(model: Path, compress: Compress, tmp_path: Path) -> None:
    for size in (9000, 9001, 10_007):
        report = compress(model, tmp_path / str(size), size=size, stages=2)
        found = sum(path.stat().st_size for path in (tmp_path / str(size)).glob("*.safetensors"))
        assert size - 64 < found == report.compressed_bytes <= size


def test_one_stage_is_the_format_of_before(model: Path, compress: Compress, tmp_path: Path) -> None:
    compress(model, tmp_path / "plain")
    compress(model, tmp_path / "one", stages=1)
    for path in (tmp_path / "plain").iterdir():
        assert path.read_bytes() == (tmp_path / "one" / path.name).read_bytes()
    config = json.loads((tmp_path / "one" / "config.json").read_text())
    assert config["quantization_config"]["format_version"] == 1
    assert "stages" not in config


def test_shards_and_other_dtypes_are_staged_too(
    save_model: Callable[..., Path], tensors: dict[str, Tensor], compress: Compress, tmp_path: Path
) -> None:
    model = save_model({name: tensor.bfloat16() for name, tensor in tensors.items()}, "sixteen", shards=2)
    compress(model, tmp_path / "out", bits_per_weight=4.0, stages=2, max_shard_size=600)
    assert len(list((tmp_path / "out").glob("model.stage-2-*-of-*.safetensors"))) > 1
    decompress_folder(tmp_path / "out", tmp_path / "dense", DecompressOptions(progress=False))
    dense, decoded = load_file(tmp_path / "dense" / "model.safetensors"), load_state_dict(tmp_path / "out")
    assert {t.dtype for t in decoded.values()} == {torch.bfloat16}
    assert all(torch.equal(dense[name], tensor) for name, tensor in decoded.items())
    assert "stages" not in json.loads((tmp_path / "dense" / "config.json").read_text())


def test_zero_and_constant_tensors_are_staged(
    save_model: Callable[..., Path], compress: Compress, tmp_path: Path
) -> None:
    """As a model's class says that they are parameters; else they would be kept exact."""
    model = save_model({"zero": torch.zeros(64, 64), "one": torch.ones(64, 64), "x": torch.randn(64, 64)})
    roles = Roles(parameters=frozenset({"zero", "one"}))
    compress(model, tmp_path / "out", bits_per_weight=4.0, stages=3, roles=lambda _: roles)
    assert not load_state_dict(tmp_path / "out")["zero"].any()


@pytest.mark.parametrize("stages", [0, 4, -1, True, 1.0, "2"])
def test_stages_that_are_not_there_are_refused(staged: Path, stages: Any) -> None:
    with pytest.raises(OptionError, match=r"stages: expected a number from 1 to 3, found .*; leave it out"):
        load_state_dict(staged, stages=stages)


@pytest.mark.parametrize("stages", [0, 10, None])
def test_stages_that_cannot_be_are_refused(
    model: Path, compress: Compress, tmp_path: Path, stages: Any
) -> None:
    if stages is None:
        with pytest.raises(BudgetError, match="the least possible is"):
            compress(model, tmp_path / "out", bits_per_weight=2.0, stages=4)
    else:
        with pytest.raises(OptionError, match="^stages: expected 1 to 9, found"):
            compress(model, tmp_path / "out", stages=stages)
    assert not (tmp_path / "out").exists()


def test_source_with_the_name_of_a_refinement_is_refused(
    save_model: Callable[..., Path], tensors: dict[str, Tensor], compress: Compress, tmp_path: Path
) -> None:
    model = save_model({**tensors, "first.weight.stage_2": torch.zeros(3)}, "odd")
    with pytest.raises(SourceError, match=r"first.weight.stage_2: expected no tensor of this name"):
        compress(model, tmp_path / "out", bits_per_weight=5.0, stages=2)
    compress(model, tmp_path / "out")
    assert load_state_dict(tmp_path / "out").keys() == {*tensors, "first.weight.stage_2"}


def damaged(staged: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    path = staged / "model.stage-2.safetensors"
    part = load_file(path)
    change(part)
    save_file(part, path, {"format": "pt"})


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (
            lambda part: part.pop("first.weight.stage_2"),
            FormatError,
            "stage_3: expected a payload that refines",
        ),
        (
            lambda part: part.update({"first.weight.stage_2": part["second.weight.stage_2"].clone()}),
            FormatError,
            "of the same shape",
        ),
        (
            lambda part: part.update({"other.stage_2": part["first.weight.stage_2"].clone()}),
            FormatError,
            "other.stage_2",
        ),
        (lambda part: part["first.weight.stage_2"][-1:].bitwise_xor_(255), ChecksumError, "CRC-32"),
    ],
)
def test_damaged_stages_are_found(
    staged: Path, change: Callable[[dict[str, Tensor]], Any], error: type[Exception], text: str
) -> None:
    first = load_state_dict(staged, stages=1)
    damaged(staged, change)
    with pytest.raises(error, match=text):
        load_state_dict(staged)
    assert load_state_dict(staged, stages=1).keys() == first.keys()


def test_stage_of_another_repository_is_found(
    staged: Path, save_model: Callable[..., Path], compress: Compress, tmp_path: Path
) -> None:
    other = {"first.weight": torch.randn(96, 64), "second.weight": torch.randn(64, 96)}
    compress(save_model(other, "other"), tmp_path / "b", bits_per_weight=4.0, stages=STAGES)
    shutil.copy(tmp_path / "b" / "model.stage-3.safetensors", staged)
    with pytest.raises(ChecksumError, match="digest"):
        load_state_dict(staged)
    load_state_dict(staged, stages=2)


@pytest.mark.parametrize("digests", [[], ["a"] * 10, "abc", {"1": "a"}])
def test_stage_digests_that_are_no_list_are_refused(staged: Path, digests: Any) -> None:
    config = json.loads((staged / "config.json").read_text())
    config["quantization_config"]["stage_digests"] = digests
    (staged / "config.json").write_text(json.dumps(config))
    with pytest.raises(FormatError, match="stage_digests: expected a list of 1 to 9 digests"):
        load_state_dict(staged)
