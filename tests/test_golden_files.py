"""Kept files of every released version of the format, read by the package and by decoders apart from it.

tests/golden/make_files.py wrote them once; a version without its file fails here.
"""

import ast
import hashlib
import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import miracle_hub
from miracle_hub.code import FORMAT_VERSION
from miracle_hub.codec.dtypes import DTYPE_NAMES, raw_bytes
from miracle_hub.format import network, payload

GOLDEN = Path(__file__).parent / "golden"
FILES: dict[str, dict[str, str]] = json.loads((GOLDEN / "files.json").read_text(encoding="utf-8"))
DECODERS = sorted(GOLDEN.glob("*decoder.py"))
REPOSITORIES = sorted(name for name in FILES if name.startswith("repository_"))
BASED = sorted(name for name in FILES if name.startswith("based_"))
LOSSLESS = sorted(name for name in FILES if name.startswith("lossless_"))
NETWORKS = sorted(name for name in FILES if name.startswith("network_"))


def described(dtype: str, shape: list[int], raw: bytes) -> str:
    """As files.json has it."""
    return f"{dtype} {shape} {hashlib.sha256(raw).hexdigest()}"


def content(tensors: dict[str, Tensor]) -> dict[str, str]:
    names = {**DTYPE_NAMES, torch.int64: "I64", torch.uint8: "U8"}
    return {name: described(names[t.dtype], list(t.shape), raw_bytes(t)) for name, t in tensors.items()}


def decoder(name: str) -> dict[str, Any]:
    return runpy.run_path(str(GOLDEN / f"{name}_decoder.py"))


def module() -> nn.Module:
    """That of the networks' files."""
    return nn.Sequential(nn.Linear(12, 20), nn.BatchNorm1d(20), nn.Linear(20, 5))


def versions(kind: str) -> list[int]:
    """Of which there is a file, as its own bytes say it."""
    if kind == "repository":
        folders = (GOLDEN / name for name in [*REPOSITORIES, *BASED])
        configs = [json.loads((folder / "config.json").read_text()) for folder in folders]
        return sorted({config["quantization_config"]["format_version"] for config in configs})
    if kind == "payload":
        return sorted({path.read_bytes()[4] for path in GOLDEN.glob("payload_*.bin")})
    return sorted({decoder("repository")["stored"](GOLDEN / name)["miracle"][2][4] for name in NETWORKS})


@pytest.mark.parametrize(
    ("kind", "newest"),
    [("repository", FORMAT_VERSION), ("payload", payload.VERSION), ("network", network.VERSION)],
)
def test_every_version_of_the_format_has_a_file(kind: str, newest: int) -> None:
    assert versions(kind) == list(range(1, newest + 1))


@pytest.mark.parametrize("name", REPOSITORIES)
def test_a_kept_repository_loads_to_the_same_bits(name: str) -> None:
    assert content(miracle_hub.load_state_dict(GOLDEN / name)) == FILES[name]


@pytest.mark.parametrize("name", REPOSITORIES)
def test_a_second_decoder_reads_a_kept_repository_to_the_same_bits(name: str) -> None:
    tensors = decoder("repository")["read"](GOLDEN / name)
    assert {key: described(*tensor) for key, tensor in tensors.items()} == FILES[name]


@pytest.mark.parametrize("name", BASED)
def test_a_kept_difference_and_its_base_load_to_the_same_bits(name: str) -> None:
    base = GOLDEN / f"{name}_base"
    assert content(miracle_hub.load_state_dict(GOLDEN / name, base=base)) == FILES[name]
    tensors = decoder("base")["read"](GOLDEN / name, base)
    assert {key: described(*tensor) for key, tensor in tensors.items()} == FILES[name]
    assert not miracle_hub.verify(GOLDEN / name, base=base).defects


@pytest.mark.parametrize("name", BASED)
def test_the_kept_differences_are_of_every_kind(name: str) -> None:
    tensors = {t.name: t for t in miracle_hub.inspect(GOLDEN / name, base=GOLDEN / f"{name}_base").tensors}
    assert {t.codec for t in tensors.values() if t.base} == {"trellis", "rows", "thin", ""}
    assert {t.dtype for t in tensors.values() if t.base and t.codes} == {"F32", "BF16", "F16"}
    stated = json.loads((GOLDEN / name / "config.json").read_text())["quantization_config"]["base_model"]
    assert stated["dtypes"] == {"encoder.cast.weight": "BF16"}
    assert stated["left_out"] == ["encoder.near.bias"]
    assert stated["prefix"] == ["encoder.", ""]


@pytest.mark.parametrize("name", LOSSLESS)
def test_a_kept_lossless_difference_and_its_base_load_to_the_same_bits(name: str) -> None:
    base = GOLDEN / f"{name}_base"
    assert content(miracle_hub.load_state_dict(GOLDEN / name, base=base)) == FILES[name]
    tensors = decoder("lossless")["read"](GOLDEN / name, base)
    assert {key: described(*tensor) for key, tensor in tensors.items()} == FILES[name]
    assert not miracle_hub.verify(GOLDEN / name, base=base).defects
    tensors = miracle_hub.inspect(GOLDEN / name, base=base).tensors
    assert {t.dtype for t in tensors if t.codec == "bits"} == {"F32", "BF16", "F16"}
    assert {t.codec for t in tensors if t.base} == {"bits", ""} and {t.codec for t in tensors} >= {"exact"}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_kept_networks_file_loads_to_the_same_bits(name: str) -> None:
    assert content(miracle_hub.load(GOLDEN / name, module()).state_dict()) == FILES[name]


@pytest.mark.parametrize("name", NETWORKS)
def test_a_second_decoder_reads_a_kept_networks_file_to_the_same_bits(name: str) -> None:
    entries = decoder("repository")["stored"](GOLDEN / name)
    stream, blank = entries.pop("miracle")[2], module()
    missing = [n for n, _ in [*blank.named_parameters(), *blank.named_buffers()] if n not in entries]
    shapes = [(n, "F32", list(blank.state_dict()[n].shape)) for n in missing]
    found = {
        key: described("F32", list(w.shape), w.tobytes())
        for key, w in decoder("network")["decode"](stream, shapes).items()
    }
    for key, (dtype, shape, raw) in entries.items():
        weights = decoder("payload")["decode"](raw)[1] if raw[:4] == b"MRCL" else None
        found[key] = (
            described(dtype, shape, raw)
            if weights is None
            else described("F32", list(weights.shape), weights.tobytes())
        )
    assert found == FILES[name]


@pytest.mark.parametrize("name", [*REPOSITORIES, *NETWORKS])
def test_verify_says_which_kept_files_are_unguarded(name: str) -> None:
    found = miracle_hub.verify(GOLDEN / name)
    assert not found.defects
    said = [file.found for file in found.files if file.name.endswith(".safetensors")]
    if "guarded" in name:
        assert said and all(text.endswith("; guard agrees") for text in said)
    else:
        assert any("so that these are unguarded: " in text for text in said)


@pytest.mark.parametrize("name", [n for n in REPOSITORIES if "guarded" in n])
def test_a_second_reader_finds_the_guards_of_a_kept_repository(name: str) -> None:
    """Of two files, of config.json, of its two stages and of their two indices."""
    assert decoder("guard")["compare"](GOLDEN / name) == 2 + 1 + 2 + 2


@pytest.mark.parametrize("name", NETWORKS)
def test_a_second_reader_finds_the_guard_of_a_kept_networks_file(name: str) -> None:
    assert decoder("guard")["digest"](GOLDEN / name)[1] == ("guarded" in name)


def test_the_kept_repositories_hold_everything_that_is_stored_in_a_way_of_its_own() -> None:
    for name in REPOSITORIES:
        tensors = miracle_hub.inspect(GOLDEN / name).tensors
        assert {t.dtype for t in tensors if not t.reason} == {"F32", "BF16", "F16", "F64"}
        assert {t.dtype for t in tensors if t.reason} == {"F32", "F16", "I64", "U8"}
        assert {len(t.shape) for t in tensors} == {0, 1, 2, 4} and 0 in {t.n_weights for t in tensors}
        assert (GOLDEN / name / "model.safetensors.index.json").exists()
        metadata = [path.read_bytes()[:300] for path in (GOLDEN / name).glob("*.safetensors")]
        assert any(b"narrowed_from_F32" in head for head in metadata)


@pytest.mark.parametrize("path", DECODERS, ids=lambda path: path.stem)
def test_the_second_decoders_are_short_and_import_nothing_of_ours(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert len(source.splitlines()) < 60
    for node in ast.walk(ast.parse(source)):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
        assert set(names) <= {*sys.stdlib_module_names, "numpy"}
