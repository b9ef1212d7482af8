"""benchmarks/gpu.py: its checks and its timing run without a GPU, and the computed floors are complete."""

import argparse
import importlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tests.limits import HANG_SECONDS

pytest.importorskip("triton")

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
CPU = torch.device("cpu")
OPS = {"codebook", "decode", "select", "slide", "reparameterize", "reparameterize_mean_kl", "decode_linear"}


@pytest.fixture(scope="module")
def gpu() -> ModuleType:
    """The script as a module; it finds its neighbors and the kernels itself."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        return importlib.import_module("gpu")
    finally:
        sys.path.remove(str(BENCHMARKS))


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=HANG_SECONDS)


def test_every_op_passes_its_checks(gpu: ModuleType, device: torch.device) -> None:
    checks = gpu.gpu_checks.checks(device)
    assert {check.op for check in checks} == OPS
    failed = [found for check in checks if not (found := gpu.gpu_checks.run_check(check, device))["passed"]]
    assert not failed


def test_a_failed_check_is_recorded_and_the_run_goes_on(gpu: ModuleType) -> None:
    def broken(device: torch.device) -> dict[str, Any]:
        gpu.gpu_ops.require(False, "this differs")
        return {}

    found = gpu.gpu_checks.run_check(gpu.gpu_checks.Check("decode", "broken", broken), CPU)
    assert found == {
        "op": "decode",
        "check": "broken",
        "passed": False,
        "error": "AssertionError: this differs",
    }


SMALL: dict[str, dict[str, Any]] = {
    "codebook": dict(size=64),
    "decode": dict(size=1024, columns=256),
    "select": dict(size=16, code=(6, 6, 8)),
    "slide": dict(size=32, code=(6, 2, 1)),
    "reparameterize": dict(size=64),
    "reparameterize_mean_kl": dict(size=64),
    "decode_linear": dict(size=1024, columns=128),
}


def cases(gpu: ModuleType, op: str) -> list[Any]:
    """One problem per stage, as small as the interpreter needs."""
    stages = {problem.stage: problem for problem in gpu.PROBLEMS if problem.op == op}
    return [replace(problem, **SMALL[op]) for problem in stages.values()]


@pytest.mark.parametrize("op", sorted(OPS))
def test_every_op_is_set_up_timed_and_verified(
    gpu: ModuleType, op: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu.gpu_ops, "MAX_COPIES", 2)
    monkeypatch.setattr(
        gpu.gpu_ops, "time_both", lambda calls, device, graph: (gpu.time_calls(calls, device, 1, 3), None)
    )
    for problem in cases(gpu, op):
        row = gpu.gpu_ops.measure(problem, gpu.H200, CPU)
        assert "wrong" not in row.details
        assert row.ms > 0 and row.ratio > 0 and row.plain.repeats >= 3


def test_every_sweep_names_options_that_its_op_has(gpu: ModuleType) -> None:
    for sweep in gpu.gpu_tune.SWEEPS:
        op = sweep.key.split("[")[0]
        assert set(sweep.grid) <= set(gpu.gpu_tune.tuning._DEFAULTS[op]), sweep.key
        assert {problem.op for problem in sweep.problems} == {op.removesuffix("_backward")}


def test_tuned_tiles_are_used_and_invalid_ones_recorded(gpu: ModuleType, tmp_path: Path) -> None:
    problem = replace(gpu.PROBLEMS[0], size=16)
    sweep = gpu.gpu_tune.Sweep("codebook", (problem,), {"TILE_STATES": (16, 3)})
    if torch.cuda.is_available():
        pytest.skip("the device's own file would be merged")
    found = gpu.gpu_tune.run_sweep(sweep, CPU, lambda: False)
    assert "skipped" in found["configurations"][1] and "mean_ms" in found["configurations"][0]
    path = gpu.gpu_tune.write(tmp_path, {"codebook": {"TILE_STATES": 16}}, [found])
    assert json.loads(path.read_text())["tiles"] == {"codebook": {"TILE_STATES": 16}}


@pytest.mark.skipif(torch.cuda.is_available(), reason="the script itself runs on a GPU")
@pytest.mark.parametrize("budget_s", [600, 0])
def test_a_whole_run_writes_its_results(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, budget_s: int
) -> None:
    small = replace(gpu.PROBLEMS[0], size=16)
    wrong = gpu.gpu_checks.Check("decode", "wrong", lambda device: gpu.gpu_ops.require(False, "differs"))
    sweep = gpu.gpu_tune.Sweep("codebook", (small,), {"TILE_STATES": (16,)})
    monkeypatch.setattr(gpu, "DEVICE", CPU)
    monkeypatch.setattr(gpu, "PROBLEMS", [small])
    monkeypatch.setattr(gpu, "prebuild", lambda tasks, seconds: {"tasks": len(tasks)})
    monkeypatch.setattr(gpu, "measure_floors", lambda device: (gpu.H200, {}))
    monkeypatch.setattr(gpu.gpu_checks, "checks", lambda device: [wrong])
    monkeypatch.setattr(gpu.gpu_tune, "SWEEPS", [sweep])
    chosen = argparse.Namespace(budget_s=budget_s, out=tmp_path, tune=False, no_tune=False)
    assert gpu.run(chosen) == 1  # the failed check; everything else went on
    results = json.loads((tmp_path / "cpu.json").read_text())["results"]
    assert results["failures"][0]["error"] == "AssertionError: differs"
    skipped = [] if budget_s else [f"codebook {small.label}", "tuning codebook"]
    assert results["skipped"] == skipped and bool(results["rows"]) == bool(budget_s)


def test_the_table_says_what_was_reached(gpu: ModuleType) -> None:
    row = dict(
        op="decode", problem="12.2.1", ms=1.0, floor_ms=0.7, ratio=0.7, target=0.6, met=True, tuned=True
    )
    text = gpu.table({"rows": [row], "failures": [], "skipped": ["slide"]})
    assert "0.700     0.6 yes tuned" in text and text.endswith("0 failures, 1 skipped for lack of time")


def test_floors_need_no_gpu(tmp_path: Path) -> None:
    finished = run("--floors-only", "--out", str(tmp_path))
    assert finished.returncode == 0, finished.stderr
    results = json.loads((tmp_path / "gpu-floors.json").read_text())["results"]
    assert {row["op"] for row in results["problems"]} == OPS
    for row in results["problems"]:
        assert row["floor_microseconds"] > 0 and row["predicted_ratio_overlapped"] > 0
        assert row["binding_unit"] in row["microseconds"]
    # Counted are the integer instructions alone; SASS has loads, stores and branches besides.
    for row in results["codebook_cross_check"]:
        assert 0.5 * row["sass_all_kinds"] < row["counted_integer"] < row["sass_all_kinds"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_script_says_what_to_do(tmp_path: Path) -> None:
    finished = run("--out", str(tmp_path))
    assert finished.returncode == 2
    assert "expected a CUDA GPU and triton, found no GPU" in finished.stderr
    assert not list(tmp_path.iterdir())
