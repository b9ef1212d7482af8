"""A base: only differences are stored, the sum is exact, and no other base is taken for it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from miracle_hub.codec.base import FIELD, Base, named_base, read_base
from miracle_hub.codec.compress import compress_folder
from miracle_hub.codec.decompress import decompress_folder, load_state_dict
from miracle_hub.codec.inspection import inspect_folder
from miracle_hub.codec.report import Report
from miracle_hub.codec.stored import payload_at
from miracle_hub.codec.verification import verify_folder
from miracle_hub.coding.backend import choose
from miracle_hub.errors import BaseModelError, BudgetError, FormatError, OptionError, SourceError
from miracle_hub.options import CompressOptions, DecompressOptions

Save = Callable[..., Path]


def tuned_from(tensors: dict[str, Tensor], seed: int = 1) -> dict[str, Tensor]:
    """A fine-tune: one matrix and a norm moved a little, a head is new, all else is the same."""
    generator = torch.Generator().manual_seed(seed)

    def moved(name: str, by: float) -> Tensor:
        return tensors[name] + by * torch.randn(tensors[name].shape, generator=generator)

    changed = {"first.weight": moved("first.weight", 0.002), "norm.weight": moved("norm.weight", 0.5)}
    return {**tensors, **changed, "head.weight": torch.randn(2, 64, generator=generator)}


@pytest.fixture
def base(save_model: Save, tensors: dict[str, Tensor]) -> Path:
    return save_model(tensors, "base")


@pytest.fixture
def tuned(save_model: Save, tensors: dict[str, Tensor]) -> Path:
    return save_model(tuned_from(tensors), "tuned")


def difference(source: Path, base: Path, out: Path, **options: Any) -> Report:
    budget = {} if "size" in options else {"bits_per_weight": 3.0}
    chosen = CompressOptions(**{"window_bits": 8, "progress": False, **budget, **options})
    return compress_folder(source, out, chosen, base=base)


@pytest.fixture
def delta(tuned: Path, base: Path, tmp_path: Path) -> Path:
    difference(tuned, base, tmp_path / "delta")
    return tmp_path / "delta"


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def change(folder: Path, **fields: Any) -> None:
    """Change what a config.json states of its base, and take its guard away, as an attacker would."""
    config = config_of(folder)
    config["quantization_config"][FIELD] |= fields
    config["quantization_config"].pop("guard")
    (folder / "config.json").write_text(json.dumps(config))
    for path in folder.glob("*.safetensors"):
        save_file(load_file(path), path)


def test_what_is_loaded_is_the_float32_sum_of_base_and_decoded_difference(
    delta: Path, base: Path, tensors: dict[str, Tensor]
) -> None:
    loaded, held = load_state_dict(delta, base=base), load_file(delta / "model.safetensors")
    for name in ("first.weight", "norm.weight"):
        payload = payload_at(held[name], name)
        assert payload.facts.is_difference
        assert torch.equal(loaded[name], tensors[name] + payload.decode(choose("cpu")))
    for name in ("second.weight", "second.bias"):
        assert name not in held
        assert torch.equal(loaded[name], tensors[name])


def test_a_tensor_that_did_not_change_takes_no_bytes_and_a_new_one_is_stored_by_itself(delta: Path) -> None:
    held = load_file(delta / "model.safetensors")
    assert sorted(held) == ["first.weight", "head.weight", "norm.weight"]
    assert payload_at(held["head.weight"], "head.weight").facts.is_exact  # loud for who has no plug-in
    stated = config_of(delta)["quantization_config"][FIELD]
    assert sorted(stated["tensors"]) == ["first.weight", "norm.weight", "second.bias", "second.weight"]


def test_a_difference_is_nearer_to_the_tune_than_a_file_of_its_size_without_a_base(
    tuned: Path, delta: Path, base: Path, compress: Callable[..., Report], tmp_path: Path
) -> None:
    want, found = load_file(tuned / "model.safetensors"), load_state_dict(delta, base=base)
    alone = compress(tuned, tmp_path / "alone")
    assert alone.compressed_bytes >= 0.9 * (delta / "model.safetensors").stat().st_size
    other = load_state_dict(tmp_path / "alone")
    name = "first.weight"
    near, far = (float((x[name] - want[name]).square().sum()) for x in (found, other))
    assert near < far / 20


def test_the_size_is_met_and_what_is_not_worth_its_bytes_is_left_out_and_said(
    tuned: Path, base: Path, tmp_path: Path
) -> None:
    sizes = {}
    for size in (1500, 2000, 4000):
        report = difference(tuned, base, tmp_path / str(size), size=size)
        sizes[size] = (tmp_path / str(size) / "model.safetensors").stat().st_size
        assert size - 128 < sizes[size] == report.compressed_bytes <= size
    small = difference(tuned, base, tmp_path / "small", size=800)
    assert (small.n_same, small.n_differing) == (2, 2)
    assert small.differences_left_out
    stated = config_of(tmp_path / "small")["quantization_config"][FIELD]
    assert tuple(stated["left_out"]) == small.differences_left_out
    found, dense = load_state_dict(tmp_path / "small", base=base), load_file(base / "model.safetensors")
    assert all(torch.equal(found[name], dense[name]) for name in small.differences_left_out)


def test_decompress_inspect_and_verify_take_the_base(
    delta: Path, base: Path, tuned: Path, tmp_path: Path
) -> None:
    options = DecompressOptions(progress=False)
    decompress_folder(delta, tmp_path / "dense", options, base)
    dense, loaded = load_file(tmp_path / "dense" / "model.safetensors"), load_state_dict(delta, base=base)
    assert dense.keys() == loaded.keys()
    assert all(torch.equal(dense[name], tensor) for name, tensor in loaded.items())
    assert "quantization_config" not in config_of(tmp_path / "dense")
    assert verify_folder(delta, dense=tuned, base=base).defects == ()
    inspection = inspect_folder(delta, base=base)
    assert inspection.n_weights == sum(t.numel() for t in loaded.values())
    reports = {report.name: report for report in inspection.tensors}
    assert (reports["second.weight"].reason, reports["second.weight"].n_bytes) == ("the base's", 0)
    assert reports["first.weight"].base == "first.weight"


def test_verify_says_that_the_tune_is_another(delta: Path, base: Path, save_model: Save) -> None:
    other = save_model(tuned_from(load_file(base / "model.safetensors"), seed=5), "other")
    (defect,) = verify_folder(delta, dense=other, base=base).defects
    assert "of the squared difference to the base" in defect or "expected the bits" in defect


def test_another_base_is_refused_by_the_first_tensor_that_differs(
    delta: Path, base: Path, save_model: Save, tensors: dict[str, Tensor]
) -> None:
    moved = {**tensors, "second.bias": tensors["second.bias"] + 1}
    with pytest.raises(BaseModelError, match=r"second.bias: expected the base's tensor of digest"):
        load_state_dict(delta, base=save_model(moved, "moved"))
    half = {name: tensor for name, tensor in tensors.items() if name != "second.weight"}
    with pytest.raises(BaseModelError, match=r"second.weight: expected this tensor in the base"):
        load_state_dict(delta, base=save_model(half, "half"))
    reshaped = {**tensors, "first.weight": tensors["first.weight"].T.contiguous()}
    with pytest.raises(BaseModelError, match=r"first.weight: expected this tensor of shape \[96, 64\]"):
        load_state_dict(delta, base=save_model(reshaped, "reshaped"))
    (defect,) = verify_folder(delta, base=save_model(moved, "again")).defects
    assert "second.bias" in defect


def test_a_base_that_was_a_local_folder_is_asked_for(delta: Path, tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match="expected to be told where the base is"):
        load_state_dict(delta)
    with pytest.raises(BaseModelError, match="files that cannot be read"):
        load_state_dict(delta, base=tmp_path / "nowhere")


def test_a_difference_alone_means_nothing(delta: Path) -> None:
    with pytest.raises(BaseModelError, match="differences to a base, which alone mean nothing"):
        load_state_dict(delta / "model.safetensors")
    (delta / "config.json").unlink()
    with pytest.raises(BaseModelError, match="differences to a base"):
        load_state_dict(delta)


def test_a_base_has_no_base_of_its_own(delta: Path, base: Path, tuned: Path, tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match="a model by itself, found one that has a base"):
        difference(tuned, delta, tmp_path / "chain")
    with pytest.raises(BaseModelError, match="a model by itself, found one that has a base"):
        load_state_dict(delta, base=delta)


def test_a_base_may_itself_be_compressed(
    base: Path, tuned: Path, compress: Callable[..., Report], tmp_path: Path
) -> None:
    compress(base, tmp_path / "small-base")
    difference(tuned, tmp_path / "small-base", tmp_path / "delta")
    found, theirs = (
        load_state_dict(tmp_path / "delta", base=tmp_path / "small-base"),
        load_state_dict(tmp_path / "small-base"),
    )
    held = load_file(tmp_path / "delta" / "model.safetensors")
    decoded = payload_at(held["first.weight"], "first.weight").decode(choose("cpu"))
    assert torch.equal(found["first.weight"], theirs["first.weight"] + decoded)


def test_names_may_have_a_prefix_that_the_base_has_not(
    base: Path, save_model: Save, tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    tuned = {f"bert.{name}": tensor for name, tensor in tuned_from(tensors).items() if "head" not in name}
    tuned["classifier.weight"] = torch.ones(2, 64)
    difference(save_model(tuned, "headed"), base, tmp_path / "delta")
    found = load_state_dict(tmp_path / "delta", base=base)
    assert torch.equal(found["bert.second.weight"], tensors["second.weight"])
    assert found.keys() == tuned.keys()
    assert "bert.second.weight" not in load_file(tmp_path / "delta" / "model.safetensors")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_tune_of_another_dtype_keeps_its_own(
    base: Path, save_model: Save, tensors: dict[str, Tensor], tmp_path: Path, dtype: torch.dtype
) -> None:
    tuned = {name: tensor.to(dtype) for name, tensor in tuned_from(tensors).items()}
    difference(save_model(tuned, "cast"), base, tmp_path / "delta")
    found = load_state_dict(tmp_path / "delta", base=base)
    assert {tensor.dtype for tensor in found.values()} == {dtype}
    assert torch.equal(found["second.weight"], tensors["second.weight"].to(dtype))
    assert "second.weight" not in load_file(tmp_path / "delta" / "model.safetensors")


def test_a_new_head_alone_is_all_that_is_stored(
    base: Path, save_model: Save, tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    """As a payload: who has no plug-in gets a size mismatch, and no model of which all else is random."""
    headed = {**tensors, "head.weight": torch.randn(2, 64), "head.bias": torch.zeros(2)}
    report = difference(save_model(headed, "headed"), base, tmp_path / "delta")
    held = load_file(tmp_path / "delta" / "model.safetensors")
    assert sorted(held) == ["head.bias", "head.weight"]
    assert any(entry.dtype == torch.uint8 for entry in held.values())
    assert (report.n_same, report.n_differing) == (4, 0)
    found = load_state_dict(tmp_path / "delta", base=base)
    assert all(torch.equal(found[name], tensor) for name, tensor in headed.items())


def test_a_size_at_which_nothing_would_be_stored_is_refused(base: Path, tuned: Path, tmp_path: Path) -> None:
    with pytest.raises(BudgetError):
        difference(tuned, base, tmp_path / "out", size=300)
    assert not (tmp_path / "out").exists()


def test_what_else_differs_is_said(
    base: Path, tuned: Path, save_model: Save, tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    (base / "vocab.txt").write_text("a")
    (tuned / "vocab.txt").write_text("b")
    assert any("vocab.txt" in note for note in difference(tuned, base, tmp_path / "out").notes)
    far = {name: torch.randn_like(tensor) for name, tensor in tensors.items()}
    notes = difference(save_model(far, "far"), base, tmp_path / "far-out").notes
    assert any("the difference to the base is large" in note for note in notes)
    other = save_model(tuned_from(tensors), "other", config={"model_type": "gpt2"})
    with pytest.raises(SourceError, match="a base of model_type 'gpt2', as"):
        difference(other, base, tmp_path / "never")
    (tuned / "config.json").unlink()
    with pytest.raises(SourceError, match="expected a config.json beside the weights"):
        difference(tuned, base, tmp_path / "never")


def test_models_that_share_nothing_are_refused(base: Path, save_model: Save, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="tensors of the names and shapes of the model's, found none"):
        difference(save_model({"other.weight": torch.randn(64, 64)}, "other"), base, tmp_path / "out")
    with pytest.raises(SourceError, match="found the same tensors in both"):
        difference(base, base, tmp_path / "out")
    with pytest.raises(OptionError, match="stages: expected 1 with a base"):
        difference(base, base, tmp_path / "out", stages=2)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("stated", "error"),
    [
        ({"repository": "/etc"}, "a Hub id as repository"),
        ({"repository": "../x"}, "a Hub id as repository"),
        ({"repository": "a/../b"}, "a Hub id as repository"),
        ({"repository": "user/x", "revision": "main"}, "a commit of 40 hexadecimal digits"),
        ({"tensors": {"first.weight": "0"}}, "a digest of 32 hexadecimal digits"),
        ({"tensors": ["first.weight"]}, "an object with repository"),
        ({"tensors": None}, "an object with repository"),
        ({"dtypes": {"first.weight": "I64"}}, "dtypes of F32"),
        ({"prefix": ["", 1]}, "an object with repository"),
    ],
)
def test_hostile_statements_are_refused(delta: Path, base: Path, stated: dict[str, Any], error: str) -> None:
    change(delta, **stated)
    with pytest.raises(FormatError, match=error):
        load_state_dict(delta, base=base)


def test_differences_and_weights_of_their_own_are_not_confused(delta: Path, base: Path) -> None:
    digests = config_of(delta)["quantization_config"][FIELD]["tensors"]
    copy = shutil.copytree(delta, delta.parent / "copy")
    change(copy, tensors={n: d for n, d in digests.items() if n != "first.weight"})
    with pytest.raises(BaseModelError, match=r"first.weight: expected a base in config.json"):
        load_state_dict(copy, base=base)
    change(delta, tensors={**digests, "head.weight": digests["first.weight"]})
    with pytest.raises(BaseModelError, match=r"head.weight: expected a difference"):
        load_state_dict(delta, base=base)


def test_a_statement_is_read_as_it_was_written() -> None:
    base = Base("user/base", "0" * 40, {"a": "1" * 32}, {"a": "BF16"}, ("a",), ("bert.", ""))
    assert read_base(Base("", "").facts(), Path()) == Base("", "")
    assert read_base({}, Path()) is None
    with pytest.raises(FormatError, match="a digest of 32"):  # its name lacks the prefix
        read_base(base.facts(), Path())


def test_a_folder_of_the_cache_is_known_by_id_and_commit(tmp_path: Path) -> None:
    commit = "0123456789" * 4
    assert named_base(tmp_path / "models--user--name" / "snapshots" / commit) == ("user/name", commit)
    assert named_base(tmp_path / "models--gpt2" / "snapshots" / commit) == ("gpt2", commit)
    assert named_base(tmp_path / "models--user--name" / "snapshots" / "main") == ("", "")
    assert named_base(tmp_path) == ("", "")
