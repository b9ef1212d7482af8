"""The zoo's table: rows are merged, not lost; what rounding to nearest packs is what it counts."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def modules() -> Iterator[tuple[ModuleType, ModuleType]]:
    """The rows, and rounding to nearest, as scripts see each other."""
    before = set(sys.modules)
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield importlib.import_module("zoo_rows"), importlib.import_module("zoo_rounding")
    finally:
        sys.path.remove(str(BENCHMARKS))
        for name in {"zoo_rows", "zoo_rounding", "record"} & (set(sys.modules) - before):
            del sys.modules[name]


def row(model: str, method: str, setting: str, n_bytes: int | None) -> dict[str, Any]:
    return {"model": model, "method": method, "setting": setting, "bytes": n_bytes}


def test_a_row_takes_the_place_of_the_one_that_measured_the_same(
    modules: tuple[ModuleType, ModuleType],
) -> None:
    before = [row("minilm", "data-free", "4", 100), row("lenet5", "dense", "", 9)]
    found = modules[0].merged(
        before, [row("minilm", "data-free", "4", 99), row("minilm", "data-free", "= hqq 4", 98)]
    )
    assert [r["bytes"] for r in found] == [99, 98, 9]


def test_rows_are_in_the_order_of_the_zoo_and_those_that_did_not_run_come_last(
    modules: tuple[ModuleType, ModuleType],
) -> None:
    rows = [
        row("smollm2", "llama.cpp", "IQ1_S", None),
        row("smollm2", "data-free", "2", 20),
        row("smollm2", "llama.cpp", "Q2_K", 50),
        row("minilm", "round-to-nearest", "2", 10),
        row("smollm2", "dense", "", 200),
        row("smollm2", "data-free", "4", 40),
    ]
    assert [r["bytes"] for r in modules[0].merged([], rows)] == [10, 200, 40, 20, 50, None]


def test_a_kept_row_leaves_the_others_in_the_file(
    modules: tuple[ModuleType, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(modules[0].record, "RESULTS", tmp_path)
    monkeypatch.setattr(modules[0].record, "ROOT", tmp_path)
    for n_bytes, method in ((5, "hqq"), (7, "data-free"), (6, "hqq")):
        modules[0].keep(row("lenet5", method, "2", n_bytes), "test")
    assert [(r["method"], r["bytes"]) for r in modules[0].known("test")] == [("data-free", 7), ("hqq", 6)]


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("shape", [(16, 12), (3, 5, 7), (1, 64), (2, 1)], ids=str)
def test_packed_levels_are_the_levels_and_nothing_more(
    modules: tuple[ModuleType, ModuleType], bits: int, shape: tuple[int, ...]
) -> None:
    rounding, tensor = modules[1], torch.randn(shape, generator=torch.Generator().manual_seed(bits))
    levels, low, step = rounding.rounded(tensor, bits)
    groups = -(-tensor.numel() // rounding.GROUP)
    assert levels.shape == (groups, rounding.GROUP) and low.shape == step.shape == (groups,)
    packed = rounding.pack(levels, bits)
    assert packed.numel() == groups * rounding.GROUP * bits // 8
    unpacked = (packed[:, None] >> torch.arange(8) & 1).flatten().reshape(-1, bits)
    assert torch.equal((unpacked << torch.arange(bits)).sum(1), levels.flatten().long())
    back = rounding.restored(levels, low, step, tensor.shape)
    coarse = step.float().amax() / 2 + 2e-3  # half a step; float16 of the least value
    assert back.shape == tensor.shape and float((back - tensor).abs().max()) <= float(coarse)


def test_bytes_of_rounding_are_those_of_the_file_it_could_be_read_from(
    modules: tuple[ModuleType, ModuleType], tmp_path: Path
) -> None:
    source = tmp_path / "dense"
    source.mkdir()
    tensors = {"a": torch.randn(64, 64), "b": torch.randn(64), "n": torch.tensor([3])}
    save_file(tensors, source / "model.safetensors")
    (source / "config.json").write_text("{}")
    n_bytes = modules[1].round_folder(source, 3, tmp_path / "out")
    body = 64 * 64 * 3 // 8 + 64 * 4 + 64 * 2 + 8
    assert body < n_bytes <= body + 600  # the header of safetensors
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert set(found) == set(tensors) and (tmp_path / "out" / "config.json").exists()
    assert torch.equal(found["n"], tensors["n"]) and torch.equal(found["b"], tensors["b"].half().float())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "out"]
