"""What tests of hostile files share: everybody who reads a repository, and payloads that lie."""

import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from miracle_hub.code import Code
from miracle_hub.codec.decompress import decompress_folder, load_state_dict
from miracle_hub.codec.inspection import inspect_folder
from miracle_hub.errors import FormatError, MiracleError
from miracle_hub.options import DecompressOptions

DAMAGED = "; the file is truncated or damaged: download it again"


def readers(folder: Path) -> list[Callable[[], object]]:
    """Everything that reads a repository."""
    out = folder.with_name("dense")
    return [
        lambda: load_state_dict(folder),
        lambda: inspect_folder(folder),
        lambda: decompress_folder(folder, out, DecompressOptions(overwrite=True, progress=False)),
    ]


def refused(folder: Path, kind: type[MiracleError] = FormatError) -> str:
    """The text with which every reader refuses a repository."""
    texts = []
    for read in readers(folder):
        with pytest.raises(MiracleError) as raised:
            read()
        assert type(raised.value) is kind
        texts.append(str(raised.value))
    assert len(set(texts)) == 1 and not folder.with_name("dense").exists()
    return texts[0]


@contextmanager
def cheap() -> Iterator[None]:
    """What happens inside takes less than a megabyte."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def sealed(payload: bytes) -> bytes:
    return payload[:5] + zlib.crc32(payload[9:]).to_bytes(4, "little") + payload[9:]


def save_payload(folder: Path, payload: bytes) -> None:
    save_file({"w": torch.frombuffer(bytearray(payload), dtype=torch.uint8)}, folder / "model.safetensors")


ONE_BIT = Code(1, 1, 256)
