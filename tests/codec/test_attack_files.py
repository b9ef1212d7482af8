"""Hostile safetensors files: what is no sound container is refused with its reason."""

import json
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import miracle_hub
from miracle_hub.codec.decompress import load_state_dict
from miracle_hub.errors import FormatError, SourceError
from tests.codec.attacks import DAMAGED, refused


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    return tmp_path / "model"


def entry(dtype: str, shape: list[int], *offsets: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def file_of(header: object, data: bytes = b"", n_bytes: int | None = None) -> bytes:
    """A safetensors file with any header, or header length, whatsoever."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if n_bytes is None else n_bytes).to_bytes(8, "little") + text + data


FOUR = entry("U8", [4], 0, 4)
CONTAINERS = {
    "no bytes at all": (b"", "header too small"),
    "a header length and no header": (file_of(b"", n_bytes=2), "invalid header length"),
    "a header longer than the file": (file_of({"a": FOUR}, n_bytes=99), "invalid header length"),
    "a header of 8 exabytes": (file_of(b"{}", n_bytes=2**63), "header too large"),
    "a header of 200 MB": (file_of(b"{}", n_bytes=200_000_000), "header too large"),
    "data cut off": (file_of({"a": FOUR}, bytes(3)), "incomplete metadata"),
    "data behind the end": (file_of({"a": FOUR}, bytes(5)), "incomplete metadata"),
    "tensors that overlap": (file_of({"a": FOUR, "b": entry("U8", [4], 2, 6)}, bytes(6)), "invalid offset"),
    "a hole between tensors": (file_of({"a": FOUR, "b": entry("U8", [1], 5, 6)}, bytes(6)), "invalid offset"),
    "an end before its start": (file_of({"a": entry("U8", [4], 4, 0)}, bytes(4)), "invalid"),
    "offsets beyond 64 bits": (file_of({"a": entry("U8", [4], 0, 2**64 + 4)}, bytes(4)), "invalid"),
    "fewer bytes than the shape": (
        file_of({"a": entry("F32", [4], 0, 4)}, bytes(4)),
        "doesn't match|invalid",
    ),
    "2^62 × 4 weights": (file_of({"a": entry("F32", [2**62, 4], 0, 0)}), "overflow"),
    "2^62 × 4 bytes": (file_of({"a": entry("F64", [2**62], 0, 0)}), "overflow"),
    "a dimension of 2^64": (file_of({"a": entry("U8", [2**64, 0], 0, 0)}), "invalid type"),
    "a negative dimension": (file_of({"a": entry("U8", [-4], 0, 4)}, bytes(4)), "invalid value"),
    "a list for a header": (file_of([]), "invalid type"),
    "no UTF-8": (file_of(b'{"\xff": 1}'), "UTF-8"),
    "no JSON": (file_of(b"{'a': 1}"), "invalid JSON"),
    "JSON a million levels deep": (file_of(b'{"a":' + b"[" * 10**6), "recursion limit"),
    "metadata of numbers": (file_of({"__metadata__": {"a": 1}}), "invalid type"),
    "a dtype that there is not": (file_of({"a": entry("Q4", [4], 0, 4)}, bytes(4)), "unknown variant"),
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_a_file_that_is_no_sound_container_is_refused(name: str, folder: Path) -> None:
    """The clause in the middle is the safetensors library's."""
    data, clause = CONTAINERS[name]
    path = folder / "model.safetensors"
    path.write_bytes(data)
    found = refused(folder)
    assert found.startswith(f"{path}: expected a safetensors file, found {len(data)} bytes that are not: ")
    assert found.endswith(DAMAGED)
    with pytest.raises(FormatError, match=clause):
        load_state_dict(folder)
    with pytest.raises(FormatError, match=clause):
        miracle_hub.load(path, nn.Linear(2, 2))


def test_a_dimension_that_torch_cannot_count_is_refused(folder: Path) -> None:
    """safetensors allows it beside a dimension of 0."""
    path = folder / "model.safetensors"
    path.write_bytes(file_of({"a": entry("F32", [2**63, 0], 0, 0)}))
    text = (
        f"{path}: a: expected dimensions below 2^63, found shape [9223372036854775808, 0]; the file is "
        "hostile or damaged"
    )
    assert refused(folder) == text
    with pytest.raises(FormatError) as raised:
        miracle_hub.load(path, nn.Linear(2, 2))
    assert str(raised.value) == text


def test_a_dtype_that_torch_lacks_is_named_by_load(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(file_of({"a": entry("F6_E2M3", [4], 0, 3)}, bytes(3)))
    with pytest.raises(SourceError, match=f"^{path}: a: expected a dtype that torch knows, found F6_E2M3 "):
        miracle_hub.load(path, nn.Linear(2, 2))


def test_metadata_nested_a_million_levels_deep_is_refused(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(file_of({"__metadata__": {"narrowed_from_F32": "[" * 10**6}}))
    assert refused(folder) == (
        f"{path}: metadata narrowed_from_F32: expected '*' or a JSON list of names, found {'[' * 80!r}; the "
        "file is damaged: download it again"
    )
