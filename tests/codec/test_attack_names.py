"""Hostile names and links: none leaves its folder, becomes a path, or commands a terminal."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import miracle_hub
from miracle_hub.codec.compress import compress_folder
from miracle_hub.codec.decompress import decompress_folder, load_state_dict
from miracle_hub.codec.report import Report
from miracle_hub.errors import MissingWeightsError, SourceError
from miracle_hub.options import CompressOptions, DecompressOptions
from tests.codec.attacks import readers, refused


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    return tmp_path / "model"


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "a/b", "..", ".", "", 5, None])
def test_an_index_never_leaves_its_folder(name: object, folder: Path) -> None:
    save_file({"w": torch.zeros(3)}, folder.with_name("secret.safetensors"))
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"w": name}}))
    assert refused(folder) == (
        f"{index}: expected file names without folders, found {name!r}; the index is hostile or damaged"
    )


def test_an_index_that_names_a_folder_or_a_file_with_a_null_is_refused(folder: Path) -> None:
    (folder / "sub").mkdir()
    index = folder / "model.safetensors.index.json"
    for name in ("sub", "a\0b", "x" * 5000):
        index.write_text(json.dumps({"weight_map": {"w": name}}))
        assert refused(folder, MissingWeightsError) == (
            f"{folder}: {index.name} names {name[:100]}, which is missing; download the folder again"
        )


NAMES = ["../../escaped", "/tmp/escaped", "..", "a/b/c", "\0", "C:\\escaped", "[/red]", "\x1b[31m", "a\nb"]


def everything(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def test_names_of_tensors_never_become_paths(tmp_path: Path) -> None:
    (tmp_path / "in" / "model").mkdir(parents=True)
    source = tmp_path / "in" / "model"
    tensors = {name: torch.randn(32, 40) for name in NAMES}
    save_file(tensors, source / "model.safetensors")
    (source / "config.json").write_text('{"model_type": "bert"}')
    small, dense = tmp_path / "in" / "small", tmp_path / "in" / "dense"
    options = CompressOptions(bits_per_weight=6.0, window_bits=8, max_shard_size="1kB", progress=False)
    compress_folder(source, small, options)
    decompress_folder(small, dense, DecompressOptions(max_shard_size="1kB", progress=False))
    assert load_state_dict(dense).keys() == load_state_dict(small).keys() == tensors.keys()
    assert everything(tmp_path) == sorted(
        ["in", *(path for path in everything(tmp_path) if path.startswith("in/"))]
    )
    allowed = {"config.json", "model.safetensors.index.json", "model.safetensors"}
    for folder in (small, dense):
        assert all(name in allowed or name.startswith("model-000") for name in everything(folder))


def test_names_that_command_a_terminal_are_printed_as_text(
    tmp_path: Path, run: Callable[..., tuple[int, str, str]]
) -> None:
    tensors = {name: torch.zeros(2) for name in NAMES} | {"w": torch.randn(64, 64)}
    save_file(tensors, tmp_path / "model.safetensors")
    small = tmp_path.with_name(f"{tmp_path.name}-out")
    miracle_hub.compress(tmp_path, small, bits_per_weight=6, window_bits=8, progress=False)
    status, out, _ = run("inspect", small)
    assert status == 0 and "\x1b" not in out and "\0" not in out
    for shown in ("[/red]", "\\x1b[31m", "\\x00", "a\\nb"):
        assert f" {shown} " in out


@pytest.mark.parametrize("target", ["../secret.txt", "/etc/passwd"])
def test_a_link_that_leaves_the_folder_is_not_copied(
    target: str, folder: Path, tensors: dict[str, Tensor], compress: Callable[..., Report], tmp_path: Path
) -> None:
    (tmp_path / "secret.txt").write_text("secret")
    save_file(tensors, folder / "model.safetensors")
    (folder / "vocab.txt").symlink_to(target)
    for write in (lambda: compress(folder, tmp_path / "out"), readers(folder)[2]):
        with pytest.raises(SourceError) as raised:
            write()
        assert str(raised.value) == (
            f"{folder / 'vocab.txt'}: expected a file of the folder, found a link that leaves it, to "
            f"{(folder / 'vocab.txt').resolve()}; replace the link by the file if it is to be copied, or "
            "else remove it"
        )
    assert not (tmp_path / "out").exists() and not (tmp_path / "dense").exists()


def test_links_inside_the_folder_and_those_of_the_hubs_cache_are_copied(
    tensors: dict[str, Tensor], compress: Callable[..., Report], tmp_path: Path
) -> None:
    snapshot, blobs = tmp_path / "models--a" / "snapshots" / "0", tmp_path / "models--a" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    save_file(tensors, blobs / "1")
    (blobs / "2").write_text("words")
    (snapshot / "model.safetensors").symlink_to("../../blobs/1")
    (snapshot / "vocab.txt").symlink_to("../../blobs/2")
    (snapshot / "again.txt").symlink_to("vocab.txt")
    compress(snapshot, tmp_path / "out")
    assert [(tmp_path / "out" / name).read_text() for name in ("vocab.txt", "again.txt")] == ["words"] * 2
    assert not (tmp_path / "out" / "vocab.txt").is_symlink()
