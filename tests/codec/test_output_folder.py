"""The output appears whole or not at all: existing folders, missing parents, errors in the middle, Ctrl-C."""

import errno
from pathlib import Path
from typing import Any

import pytest

import miracle_hub.codec.trellis as trellis_module
from miracle_hub.codec.report import Report
from miracle_hub.errors import OutputExistsError, OutputWriteError
from tests.codec.outputs import Compress, decompress, names


@pytest.fixture
def existing(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious.txt").write_text("mine")
    return tmp_path / "out"


@pytest.mark.parametrize("write", ["compress", "decompress"])
def test_an_existing_output_is_refused_untouched(
    write: str, model: Path, compressed: Path, existing: Path, compress: Compress
) -> None:
    with pytest.raises(OutputExistsError) as raised:
        compress(model, existing) if write == "compress" else decompress(compressed, existing)
    assert str(raised.value) == (
        f"{existing}: the output folder exists; choose another, or pass --overwrite (overwrite=True) to "
        "replace it"
    )
    assert names(existing) == ["precious.txt"]
    assert names(existing.parent) == ["model", "out", "small"]


@pytest.mark.parametrize("kind", ["file", "link to a folder", "dangling link"])
def test_whatever_has_the_outputs_name_is_refused_and_replaced_only_when_asked(
    kind: str, model: Path, compress: Compress, tmp_path: Path
) -> None:
    out, other = tmp_path / "out", tmp_path / "other"
    other.mkdir()
    (other / "precious.txt").write_text("mine")
    if kind == "file":
        out.write_text("a file")
    else:
        out.symlink_to(other if kind == "link to a folder" else tmp_path / "nowhere")
    with pytest.raises(OutputExistsError):
        compress(model, out)
    compress(model, out, overwrite=True)
    assert not out.is_symlink() and names(out) == ["config.json", "model.safetensors"]
    assert names(other) == ["precious.txt"]
    assert names(tmp_path) == ["model", "other", "out"]


@pytest.mark.parametrize("write", ["compress", "decompress"])
def test_overwriting_replaces_the_folder_as_a_whole(
    write: str, model: Path, compressed: Path, existing: Path, compress: Compress
) -> None:
    if write == "compress":
        compress(model, existing, overwrite=True)
    else:
        decompress(compressed, existing, overwrite=True)
    assert names(existing) == ["config.json", "model.safetensors"]
    assert names(existing.parent) == ["model", "out", "small"]


def test_missing_parents_are_made_and_permissions_are_those_of_any_new_folder(
    model: Path, compress: Compress, tmp_path: Path
) -> None:
    compress(model, tmp_path / "a" / "b" / "out")
    (tmp_path / "a" / "plain").mkdir()
    mode = (tmp_path / "a" / "plain").stat().st_mode
    assert (tmp_path / "a" / "b" / "out").stat().st_mode == mode
    assert names(tmp_path / "a" / "b") == ["out"]


def test_an_output_relative_to_here_is_written_here(
    model: Path, compress: Compress, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    compress(model, Path("out"))
    compress(model, Path("."), overwrite=True)
    assert names(tmp_path / "here") == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("failure", [KeyboardInterrupt, RuntimeError, MemoryError])
@pytest.mark.parametrize("before", [False, True])
def test_a_failure_in_the_middle_leaves_what_was_there_before(
    failure: type[BaseException],
    before: bool,
    model: Path,
    compress: Compress,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if before:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "precious.txt").write_text("mine")
    encode, seen = trellis_module.encode_tensor, []

    def failing(*args: Any, **kwargs: Any) -> bytes:
        seen.append(names(tmp_path))
        if len(seen) == 2:
            raise failure
        return encode(*args, **kwargs)

    monkeypatch.setattr(trellis_module, "encode_tensor", failing)
    with pytest.raises(failure):
        compress(model, tmp_path / "out", overwrite=before)
    assert len(seen[0]) == 2 + before and seen[0][0].startswith(".out.")
    assert names(tmp_path) == (["model", "out"] if before else ["model"])
    assert not before or names(tmp_path / "out") == ["precious.txt"]


def test_a_failing_card_or_decode_leaves_nothing(
    model: Path, compressed: Path, compress: Compress, tmp_path: Path
) -> None:
    def card(folder: Path, report: Report) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(
        OutputWriteError, match=r"README\.md: cannot be written: No space left on device; free"
    ):
        compress(model, tmp_path / "out", card=card)
    data = bytearray((compressed / "model.safetensors").read_bytes())
    data[-1] ^= 255
    (compressed / "model.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match="CRC-32"):
        decompress(compressed, tmp_path / "out")
    assert names(tmp_path) == ["model", "small"]
