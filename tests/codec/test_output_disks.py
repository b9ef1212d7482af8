"""Disks that are full and files that may not grow are named, and nothing stays."""

import errno
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import miracle_hub.files.container as container_module
from miracle_hub.errors import OutputWriteError
from tests.codec.outputs import Compress, decompress, names


@contextmanager
def largest_file(n_bytes: int) -> Iterator[None]:
    """The kernel refuses to let any file of this process grow beyond `n_bytes`."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


def test_a_file_that_may_not_grow_is_named_and_nothing_stays(
    model: Path, compressed: Path, compress: Compress, tmp_path: Path
) -> None:
    for write in (
        lambda: compress(model, tmp_path / "out"),
        lambda: decompress(compressed, tmp_path / "out"),
    ):
        with pytest.raises(OutputWriteError) as raised, largest_file(2000):
            write()
        message = str(raised.value)
        assert message.startswith(f"{tmp_path}/.out.")
        assert message.endswith("/model.safetensors: cannot be written: File too large")
        assert names(tmp_path) == ["model", "small"]


def test_a_full_disk_is_named_with_the_file_and_the_way_out(
    model: Path, compress: Compress, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(container_module.os, "fsync", full)
    with pytest.raises(OutputWriteError) as raised:
        compress(model, tmp_path / "out")
    assert str(raised.value).endswith(
        "/model.safetensors: cannot be written: No space left on device; free some space and run it again"
    )
    assert names(tmp_path) == ["model"]


def test_other_files_and_the_config_meet_a_full_disk_the_same_way(
    model: Path, compress: Compress, tmp_path: Path
) -> None:
    (model / "tokenizer.json").write_bytes(bytes(5000))
    with pytest.raises(OutputWriteError, match=r"/tokenizer\.json: cannot be written: File too large"):
        with largest_file(4700):
            compress(model, tmp_path / "out")
    (model / "tokenizer.json").unlink()
    (model / "config.json").write_text('{"long": "' + "x" * 6000 + '"}')
    with pytest.raises(OutputWriteError, match=r"/config\.json: cannot be written: File too large"):
        with largest_file(5500):
            compress(model, tmp_path / "out")
    assert names(tmp_path) == ["model"]


def test_a_parent_that_is_a_file_is_named(model: Path, compress: Compress, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputWriteError, match=r"/file/out: cannot be written: "):
        compress(model, tmp_path / "file" / "out")
