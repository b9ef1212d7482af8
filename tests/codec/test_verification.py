"""What `verify` finds: everything that can be wrong with a file, and nothing in a sound one."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from miracle_hub.codec.compress import compress_folder
from miracle_hub.codec.inspection import inspect_folder
from miracle_hub.codec.verification import verify_folder
from miracle_hub.errors import ChecksumError, MissingWeightsError
from miracle_hub.options import CompressOptions

OPTIONS: dict[str, Any] = {"bits_per_weight": 5, "window_bits": 8, "progress": False}


def compressed_as(model: Path, out: Path, **options: Any) -> Path:
    compress_folder(model, out, CompressOptions(**{**OPTIONS, **options}))
    return out


@pytest.fixture
def copy(compressed: Path, tmp_path: Path) -> Path:
    """A repository to damage."""
    return Path(shutil.copytree(compressed, tmp_path / "copy"))


def flipped(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def only_defect(folder: Path) -> str:
    (defect,) = verify_folder(folder).defects
    return defect


def test_a_sound_repository_has_no_defect_and_a_line_for_every_file(copy: Path, model: Path) -> None:
    (copy / "notes.txt").write_text("read too")
    (copy / ".hidden").write_text("not read")
    found = verify_folder(copy, dense=model)
    found.require()
    assert found.defects == () and found.n_coded == 2 and found.digest == inspect_folder(copy).digest
    assert [report.name for report in found.files] == ["config.json", "model.safetensors", "notes.txt"]
    for report in found.files:
        data = (copy / report.name).read_bytes()
        assert report.n_bytes == len(data) and report.sha256 == hashlib.sha256(data).hexdigest()
    assert found.files[1].found == "2 decoded, digest agrees, 2 plain, finite; guard agrees"


def test_a_file_by_itself_may_have_any_name(compressed: Path, tmp_path: Path) -> None:
    other = Path(shutil.copy(compressed / "model.safetensors", tmp_path / "weights.bin"))
    found = verify_folder(other)
    found.require()
    assert found.n_coded == 2
    assert only_defect(compressed / "config.json").startswith(
        f"{compressed / 'config.json'}: expected a safetensors file, found "
    )


def test_a_dense_model_has_nothing_to_compare_and_is_not_called_sound(model: Path) -> None:
    for source in (model, model / "model.safetensors"):
        assert only_defect(source) == (
            f"{source}: expected a compressed folder, found one without any payload, and so without a digest "
            "to compare; run miracle compress first, or compare with --dense"
        )
    verify_folder(model, dense=model).require()


def test_a_single_file_is_verified_like_its_folder(compressed: Path) -> None:
    found = verify_folder(compressed / "model.safetensors")
    assert found.digest == verify_folder(compressed).digest and found.files[0].name == "model.safetensors"


def test_shards_and_stages_are_verified_with_their_indices(model: Path, tmp_path: Path) -> None:
    sharded = compressed_as(model, tmp_path / "sharded", max_shard_size="2kB")
    staged = compressed_as(model, tmp_path / "staged", bits_per_weight=7, stages=3)
    for folder, n_coded in ((sharded, 2), (staged, 6)):
        found = verify_folder(folder, dense=model)
        assert found.defects == () and found.n_coded == n_coded
        assert any(report.found.startswith("index of ") for report in found.files)


def test_any_byte_of_a_payload_that_changes_is_found_with_its_tensor(copy: Path) -> None:
    path = copy / "model.safetensors"
    size = path.stat().st_size
    for at in range(size // 2, size, size // 16):
        flipped(path, at)
        assert "weight" in only_defect(copy) and "CRC-32" in only_defect(copy)
        flipped(path, at)
    assert verify_folder(copy).defects == ()


def test_a_digest_that_another_decoder_would_give_is_found(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a machine whose arithmetic differs: every byte of the file is as it was written."""
    backend = type(__import__("miracle_hub.coding.backend", fromlist=["choose"]).choose("cpu"))
    decode = backend.decode_matrix
    monkeypatch.setattr(backend, "decode_matrix", lambda *a: (decode(*a)[0], decode(*a)[1] ^ 1))
    assert "the decoded weights have digest" in only_defect(copy)


def test_every_damaged_file_is_reported_and_the_first_is_raised(copy: Path) -> None:
    flipped(copy / "model.safetensors", -1)
    (copy / "tokenizer.json").write_text("{")
    found = verify_folder(copy)
    assert [bool(report.defect) for report in found.files] == [False, True, True] and found.digest == ""
    assert "tokenizer.json: expected JSON" in found.defects[1]
    with pytest.raises(ChecksumError, match=r"download the file again \(and 1 more\)|\(and 1 more\)$"):
        found.require()


def test_a_truncated_file_is_found(copy: Path) -> None:
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert "expected a safetensors file" in only_defect(copy)


@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
def test_a_plain_tensor_that_is_not_finite_is_found(value: float, copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    tensors["second.bias"][3] = value
    save_file(tensors, copy / "model.safetensors", {"format": "pt", "narrowed_from_F32": "*"})
    assert "second.bias: expected finite numbers, found NaN or infinity" in only_defect(copy)


def test_a_lost_payload_is_found_by_the_digest_of_them_all(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    del tensors["first.weight"]
    save_file(tensors, copy / "model.safetensors", {"format": "pt", "narrowed_from_F32": "*"})
    assert "config.json promises compressed tensors of digest" in only_defect(copy)


def test_every_stage_has_its_own_digest_in_the_config(model: Path, tmp_path: Path) -> None:
    folder = compressed_as(model, tmp_path / "staged", bits_per_weight=6, stages=2)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["stage_digests"][0] = "0" * 64
    del config["quantization_config"]["guard"]["config"]
    (folder / "config.json").write_text(json.dumps(config))
    assert "of digest 0000" in only_defect(folder)


@pytest.mark.parametrize("change", ["moved", "missing", "added", "outside", "no index"])
def test_an_index_that_does_not_fit_its_files_is_found(change: str, model: Path, tmp_path: Path) -> None:
    folder = compressed_as(model, tmp_path / "sharded", max_shard_size="2kB")
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    named = index["weight_map"]
    name, other = sorted(named)[0], sorted(set(named.values()) - {named[sorted(named)[0]]})[0]
    if change == "missing":
        del named[name]
    else:
        key = "more.weight" if change == "added" else name
        named[key] = "../model.safetensors" if change == "outside" else other
    path.write_text("[]" if change == "no index" else json.dumps(index))
    assert str(path) in only_defect(folder)


def test_a_damaged_blob_of_the_hubs_cache_is_found_by_its_name(compressed: Path, tmp_path: Path) -> None:
    """Plain tensors have no digest of their own; the Hub's cache knows the hash of the whole file."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "0"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    data = (compressed / "model.safetensors").read_bytes()
    config = (compressed / "config.json").read_bytes()
    git = hashlib.sha1(b"blob %d\0" % len(config) + config).hexdigest()
    for name, blob, content in (
        ("model.safetensors", hashlib.sha256(data).hexdigest(), data),
        ("config.json", git, config),
    ):
        (blobs / blob).write_bytes(content)
        (snapshot / name).symlink_to(blobs / blob)
    assert verify_folder(snapshot).defects == ()
    flipped(blobs / git, 2)
    assert "config.json: expected content of hash" in only_defect(snapshot)
    flipped(blobs / git, 2)
    n_header = 8 + int.from_bytes(data[:8], "little")
    flipped(blobs / hashlib.sha256(data).hexdigest(), n_header)  # of a plain tensor: they come first
    assert "the cached file is damaged" in only_defect(snapshot)


def test_the_dense_model_must_be_the_one_that_was_compressed(
    compressed: Path, model: Path, tensors: dict[str, Tensor], save_model: Callable[..., Path]
) -> None:
    changes = {
        "first.weight": ("expected a relative squared error of", lambda t: t + 0.001),
        "norm.weight": ("expected the bits of the dense model's plain tensor", lambda t: t * 1.5),
        "second.weight": ("expected torch.bfloat16 [64, 96], found F32", lambda t: t.bfloat16()),
    }
    for name, (message, change) in changes.items():
        other = save_model({**tensors, name: change(tensors[name])}, name=f"other-{name}")
        (defect,) = verify_folder(compressed, dense=other).defects
        assert f"{name}: {message}" in defect
    fewer = save_model({n: t for n, t in tensors.items() if n != "norm.weight"}, name="fewer")
    assert "found norm.weight in only one of the two" in verify_folder(compressed, dense=fewer).defects[0]
    with pytest.raises(MissingWeightsError):
        verify_folder(compressed, dense=model.parent / "nothing")


def test_kept_files_of_every_version_are_sound() -> None:
    golden = Path(__file__).parents[1] / "golden"
    for path in sorted(golden.glob("repository_*[0-9]")):
        assert verify_folder(path).defects == () and verify_folder(path).n_coded > 0
    found = verify_folder(golden / "network_1.safetensors")
    assert found.defects == () and found.n_coded > 0 and "CRC-32 agrees" in found.files[0].found


def test_a_folder_without_weights_is_not_sound(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert "expected model.safetensors or" in only_defect(tmp_path)
