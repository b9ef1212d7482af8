"""What is checked whole is read once: verify, the card of a compression, and a push up to the upload."""

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import miracle_hub
from miracle_hub.codec.naming import WEIGHTS_ENDING
from miracle_hub.files import container, digests
from miracle_hub.hub import card, push


class Reads:
    """Counts how often every tensor of a file is read, and every file as a string of bytes."""

    def __init__(self) -> None:
        self.tensors: Counter[tuple[str, str]] = Counter()
        self.files: Counter[str] = Counter()


class Watched:
    """An open safetensors file that tells what is read of it."""

    def __init__(self, file: Any, path: Path, reads: Reads) -> None:
        self._file, self._path, self._reads = file, path, reads

    def get_tensor(self, name: str) -> Any:
        self._reads.tensors[self._path.name, name] += 1
        return self._file.get_tensor(name)

    def __enter__(self) -> "Watched":
        return Watched(self._file.__enter__(), self._path, self._reads)

    def __exit__(self, *error: Any) -> None:
        self._file.__exit__(*error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[Reads]:
    found, open_, pieces = Reads(), container._open, digests.pieces

    def counted(path: Path) -> Iterator[bytes]:
        found.files[path.name] += 1
        return pieces(path)

    monkeypatch.setattr(container, "_open", lambda path: Watched(open_(path), path, found))
    monkeypatch.setattr(digests, "pieces", counted)
    monkeypatch.setattr("miracle_hub.codec.reading.pieces", counted)
    yield found


@pytest.fixture(params=["5GB", "6kB"])
def compressed(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    tensors = {f"layer.{i}.weight": torch.randn(64, 64, generator=generator) for i in range(4)}
    (tmp_path / "source").mkdir()
    save_file(tensors | {"norm.bias": torch.randn(64)}, tmp_path / "source" / "model.safetensors")
    (tmp_path / "source" / "config.json").write_text('{"model_type": "bert"}')
    options: dict[str, Any] = dict(window_bits=8, max_shard_size=request.param, progress=False)
    miracle_hub.compress(tmp_path / "source", tmp_path / "out", bits_per_weight=4, **options)
    return tmp_path / "out"


def once(reads: Reads, folder: Path) -> bool:
    """Whether every tensor of the folder was read once, and no file of weights as a string besides."""
    whole = [name for name in reads.files if name.endswith(WEIGHTS_ENDING)]
    names = {path.name for path in folder.glob(f"*{WEIGHTS_ENDING}")}
    assert {file for file, _ in reads.tensors} == names and len(reads.tensors) == 5
    return not whole and set(reads.tensors.values()) == {1}


def test_verify_reads_every_file_once(compressed: Path, reads: Reads) -> None:
    assert miracle_hub.verify(compressed).defects == () and once(reads, compressed)


def test_the_card_of_a_compression_reads_every_file_once(
    compressed: Path, reads: Reads, monkeypatch: pytest.MonkeyPatch
) -> None:
    write: Callable[..., None] = card.write_card

    def counted(*arguments: Any) -> None:
        reads.tensors.clear()
        reads.files.clear()
        write(*arguments)

    monkeypatch.setattr(card, "write_card", counted)
    source = compressed.with_name("source")
    shards = "5GB" if (compressed / "model.safetensors").exists() else "6kB"
    again = compressed.with_name("again")
    miracle_hub.compress(
        source, again, bits_per_weight=4, window_bits=8, max_shard_size=shards, progress=False
    )
    assert once(reads, again)


def test_a_push_reads_every_file_once_before_it_uploads(
    compressed: Path, reads: Reads, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Uploaded(Exception):
        """Here the client takes over."""

    def upload(folder: Path, repo_id: str, checksums: dict[str, str], **options: Any) -> None:
        assert {name for name in checksums if name.endswith(WEIGHTS_ENDING)}
        raise Uploaded

    monkeypatch.setattr(push, "upload", upload)
    with pytest.raises(Uploaded):
        miracle_hub.push(compressed, "user/name")
    assert once(reads, compressed)
