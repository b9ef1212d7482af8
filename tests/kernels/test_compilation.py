"""Every kernel compiles for every target, without a GPU, and fits: no spills, within the GPU's memory."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("triton")

KERNELS = Path(__file__).parents[2] / "kernels"
KIB = 1024
# Shared memory that one block may have: CUDA C++ programming guide, "Technical specifications per compute
# capability"; AMD Instinct MI300 instruction set, "LDS".
SHARED_LIMIT = {"sm_80": 163 * KIB, "sm_90": 227 * KIB, "sm_100": 227 * KIB, "gfx942": 64 * KIB}
REGISTERS_PER_THREAD, REGISTERS_PER_BLOCK = 255, 65536


def declared() -> ModuleType:
    """kernels/variants.py, which is on no path: `kernels` is somebody else's package."""
    spec = importlib.util.spec_from_file_location("_miracle_kernel_variants", KERNELS / "variants.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


DECLARED = declared()
VARIANTS = {variant.name: variant for variant in DECLARED.VARIANTS}
CASES = [(name, target) for name in VARIANTS for target in DECLARED.TARGETS]


def run_compiler(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(KERNELS / "compile.py"), *arguments]
    return subprocess.run(command, env=inherited | environment, capture_output=True, text=True)


@pytest.fixture(scope="session")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Variant → target → kernel → usage, compiled now."""
    path = tmp_path_factory.mktemp("compilation") / "resources.json"
    finished = run_compiler("--output", str(path))
    assert path.exists(), finished.stderr
    return json.loads(path.read_text())["variants"]


def check_nvidia(used: dict[str, Any], where: str) -> None:
    spilled = {name: used[name] for name in ("stack_bytes", "local_bytes", "LDL", "STL") if used[name]}
    assert not spilled, f"{where} spills: {spilled}; choose smaller tiles or more warps in tuning.py"
    assert used["registers"] <= REGISTERS_PER_THREAD, where
    assert used["registers"] * 32 * used["num_warps"] <= REGISTERS_PER_BLOCK, where


@pytest.mark.parametrize(("name", "target"), CASES, ids=[f"{name}-{target}" for name, target in CASES])
def test_kernel_compiles_and_fits(report: dict[str, Any], name: str, target: str) -> None:
    kernels = report[name][target]
    if target == "gfx942" and "error" in kernels:
        pytest.skip(f"Triton cannot compile {name} for {target}: {kernels['error']}")
    assert "error" not in kernels, kernels["error"]
    assert kernels
    for kernel, used in kernels.items():
        where = f"{name}: {kernel} on {target}"
        shared = used["shared_bytes"] + used.get("static_shared_bytes", 0)
        assert shared <= SHARED_LIMIT[target], f"{where} needs {shared} bytes of shared memory"
        if target != "gfx942":
            check_nvidia(used, where)
    if VARIANTS[name].matrix:
        assert any(used["tensor_cores"] for used in kernels.values()), f"{name} on {target}: no tensor cores"


def test_the_committed_report_lists_exactly_these_variants() -> None:
    committed = json.loads((KERNELS / "resources.json").read_text())["variants"]
    found = [(name, target) for name, targets in committed.items() for target in targets]
    assert found == CASES, "run python kernels/compile.py and commit kernels/resources.json"


def test_variants_have_names_of_their_own() -> None:
    assert len(VARIANTS) == len(DECLARED.VARIANTS)


def test_interpreted_kernels_are_refused(tmp_path: Path) -> None:
    finished = run_compiler("--output", str(tmp_path / "resources.json"), TRITON_INTERPRET="1")
    assert finished.returncode == 2
    assert "expected compiled kernels, found TRITON_INTERPRET in the environment" in finished.stderr
    assert not list(tmp_path.iterdir())
