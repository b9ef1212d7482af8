"""safetensors files: written as a stream, read through the safetensors library.

The library validates what it reads, so reading is its job. It cannot write a file without holding
all tensors in memory, which a compressor that promises one tensor at a time must not do; hence the
writer below.
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from miracle_hub.errors import FormatError
from miracle_hub.files.digests import PIECE_BYTES, Hashes
from miracle_hub.files.whole import writing
from miracle_hub.format.spec import TensorSpec

_ALIGNMENT = 8
_PREFIX = 8
_KEPT_OPEN: ContextVar[dict[Path, safe_open] | None] = ContextVar("_KEPT_OPEN", default=None)


def encode_file_header(entries: list[TensorSpec], metadata: dict[str, str]) -> bytes:
    """The length prefix and JSON header of a safetensors file with these tensors, in this order."""
    header: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    offset = 0
    for entry in entries:
        header[entry.name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [offset, offset + entry.n_bytes],
        }
        offset += entry.n_bytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def write_file(
    path: Path,
    entries: list[TensorSpec],
    metadata: dict[str, str],
    data: Callable[[TensorSpec], bytes],
    seal: Callable[[], dict[str, str]] | None = None,
) -> None:
    """Write a safetensors file tensor after tensor; `data` is asked for one tensor at a time.

    Args:
        seal: asked after all data for the final metadata, which are written over the first: what they say of
            the data is known only then. Their header has the same length.

    Raises:
        OutputWriteError: the file cannot be written.
    """
    header = encode_file_header(entries, metadata)
    with writing(path), open(path, "wb") as file:
        file.write(header)
        for entry in entries:
            raw = data(entry)
            if len(raw) != entry.n_bytes:
                raise AssertionError(f"{entry.name}: planned {entry.n_bytes} bytes, got {len(raw)}")
            file.write(raw)
        if seal is not None:
            sealed = encode_file_header(entries, seal())
            if len(sealed) != len(header):
                raise AssertionError(f"{path}: planned a header of {len(header)} bytes, got {len(sealed)}")
            file.seek(0)
            file.write(sealed)
        file.flush()
        os.fsync(file.fileno())


def raw_entries(path: Path) -> tuple[dict[str, str], Iterator[tuple[TensorSpec, Iterator[bytes]]]]:
    """The metadata of a file, and every tensor with its bytes, of which a piece is in memory at a time.

    The library, which gives no bytes of dtypes that torch has not, checks the header first.

    Raises:
        FormatError: the file is not a sound safetensors file.
    """
    with opened(path) as file:
        metadata = file.metadata() or {}
    return metadata, _raw_entries(path)


def _raw_entries(path: Path) -> Iterator[tuple[TensorSpec, Iterator[bytes]]]:
    head = _head(path)
    with path.open("rb") as file:
        for name, entry in _entries(head).items():
            start, end = entry["data_offsets"]
            found = TensorSpec(name, entry["dtype"], tuple(entry["shape"]))
            yield found, _pieces(file, len(head) + start, end - start)


def _pieces(file: BinaryIO, start: int, n_bytes: int) -> Iterator[bytes]:
    file.seek(start)
    for first in range(0, n_bytes, PIECE_BYTES):
        yield file.read(min(PIECE_BYTES, n_bytes - first))


@contextmanager
def files_kept_open() -> Iterator[None]:
    """Files that are opened inside stay open to its end, also a decorator.

    A header is then parsed once, not once per tensor: 4,000 tensors in 0.4 MB took 27 s.
    """
    if _KEPT_OPEN.get() is not None:
        yield
        return
    token = _KEPT_OPEN.set({})
    try:
        yield
    finally:
        _KEPT_OPEN.reset(token)


def read_through(path: Path, hashes: Sequence[Hashes]) -> Iterator[tuple[str, Tensor, memoryview]]:
    """Every tensor of a file once with its bytes, in their order, all of which are hashed on the way.

    Raises:
        FormatError: the file is not a sound safetensors file.
        SafetensorError: a dtype is unknown to torch.
    """
    with opened(path) as file:
        head = _head(path)
        for each in hashes:
            each.update(head)
        entries = _entries(head)
        for name in sorted(entries, key=lambda name: entries[name]["data_offsets"]):
            tensor = file.get_tensor(name)
            data = memoryview(tensor.reshape(-1).view(torch.uint8).numpy())
            for each in hashes:
                each.update(data)
            yield name, tensor, data


def _head(path: Path) -> bytes:
    """The length of the header, and the header."""
    with path.open("rb") as file:
        size = file.read(_PREFIX)
        return size + file.read(int.from_bytes(size, "little"))


def _entries(head: bytes) -> dict[str, Any]:
    """The tensors of a header, which the library has found sound."""
    entries = json.loads(head[_PREFIX:])
    entries.pop("__metadata__", None)
    return entries


@contextmanager
def opened(path: Path) -> Iterator[safe_open]:
    """An open safetensors file (torch tensors).

    Raises:
        FormatError: the file is not a sound safetensors file.
    """
    kept = _KEPT_OPEN.get()
    if kept is None:
        with _open(path) as reader:
            yield reader
        return
    if path not in kept:
        kept[path] = _open(path)
    yield kept[path]


def _open(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        if not path.is_file():
            found = "a folder" if path.is_dir() else "none"
            raise FormatError(
                f"{path}: expected a safetensors file, found {found}; check the path, or download it again"
            ) from None
        size = path.stat().st_size
        raise FormatError(
            f"{path}: expected a safetensors file, found {size} bytes that are not: {error}; "
            "the file is truncated or damaged: download it again"
        ) from error
