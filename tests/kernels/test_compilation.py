"""Every kernel compiles for every target, without a GPU, and fits: no spills, within the GPU's memory.

kernels/resources.json says so for the sources it names; `make kernel-compile` makes it. Here it must be of
the present sources and hold only what fits, and a few kernels are compiled again and must use what it says.
"""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from scripts import KERNELS, script

from tests.limits import HANG_SECONDS

pytest.importorskip("triton")

COMMITTED: dict[str, Any] = json.loads((KERNELS / "resources.json").read_text())
# Kept between runs under a digest of sources, compilers and targets, which .gitignore knows.
KEPT = KERNELS.parent / "build" / "compiled"
# Compiled anew: every op and both paths of decoding, on one GPU; the cheapest of what shows each.
TARGET = "sm_90"
AGAIN = [
    "codebook[step_weights=8]",
    "decode[code=8.2.1,bfloat16]",
    "decode[code=20.20.8,bfloat16,on_the_fly=True,with_digest=True]",
    "decode_linear[code=12.2.1,batch=1,columns=8192,rotation=128]",
    "decode_linear[code=12.2.1,batch=16,columns=8192,rotation=128]",
    "reparameterize[float32]",
    "reparameterize_mean_kl[block_weights=8,float32]",
    "select[window_bits=16,step_weights=8,best]",
    "slide[code=8.2.1,best]",
]


DECLARED, FITS, SOURCES = script("variants"), script("fits"), script("sources")
VARIANTS = {variant.name: variant for variant in DECLARED.VARIANTS}
CASES = [(name, target) for name in VARIANTS for target in DECLARED.TARGETS]


def run_compiler(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(KERNELS / "compile.py"), *arguments]
    return subprocess.run(
        command, env=inherited | environment, capture_output=True, text=True, timeout=HANG_SECONDS
    )


@pytest.fixture(scope="session")
def again(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The report of a few variants on one target, compiled now or since the sources last changed."""
    path = tmp_path_factory.mktemp("compilation") / "resources.json"
    chosen = ("--only", *AGAIN, "--target", TARGET, "--kept", str(KEPT), "--output", str(path))
    finished = run_compiler(*chosen)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return json.loads(path.read_text())


def test_the_committed_report_is_of_these_sources() -> None:
    assert COMMITTED["sources"] == SOURCES.source_digest(), (
        "run make kernel-compile and commit kernels/resources.json"
    )


def test_the_committed_report_lists_exactly_these_variants() -> None:
    found = [(name, target) for name, targets in COMMITTED["variants"].items() for target in targets]
    assert found == CASES, "run make kernel-compile and commit kernels/resources.json"


@pytest.mark.parametrize(("name", "target"), CASES, ids=[f"{name}-{target}" for name, target in CASES])
def test_kernel_compiles_and_fits(name: str, target: str) -> None:
    kernels = COMMITTED["variants"][name][target]
    assert not FITS.misfits(target, kernels, VARIANTS[name].matrix)
    if "error" in kernels:
        pytest.skip(f"Triton cannot compile {name} for {target}: {kernels['error']}")


@pytest.mark.parametrize("name", AGAIN)
def test_kernel_compiled_again_fits_and_uses_what_the_report_says(again: dict[str, Any], name: str) -> None:
    kernels = again["variants"][name][TARGET]
    assert not FITS.misfits(TARGET, kernels, VARIANTS[name].matrix)
    if again["versions"] != COMMITTED["versions"]:
        pytest.skip(f"the report is of other compilers: {COMMITTED['versions']}")
    assert kernels == COMMITTED["variants"][name][TARGET]


def test_every_op_is_compiled_again() -> None:
    assert {name.partition("[")[0] for name in AGAIN} == {name.partition("[")[0] for name in VARIANTS}


def test_variants_have_names_of_their_own() -> None:
    assert len(VARIANTS) == len(DECLARED.VARIANTS)


def test_interpreted_kernels_are_refused(tmp_path: Path) -> None:
    finished = run_compiler("--output", str(tmp_path / "resources.json"), TRITON_INTERPRET="1")
    assert finished.returncode == 2
    assert "expected compiled kernels, found TRITON_INTERPRET in the environment" in finished.stderr
    assert not list(tmp_path.iterdir())


FITTING: dict[str, Any] = {
    **{key: 0 for key in ("stack_bytes", "local_bytes", "static_shared_bytes", "LDL", "STL")},
    **{"registers": 255, "num_warps": 8, "shared_bytes": 227 * 1024, "tensor_cores": True},
}
UNFITTING: list[tuple[dict[str, Any], str]] = [
    (dict(shared_bytes=227 * 1024 + 1), "found 232449"),
    (dict(static_shared_bytes=1), "found 232449"),
    (dict(stack_bytes=8), "spills: {'stack_bytes': 8}"),
    (dict(LDL=1, STL=2), "spills: {'LDL': 1, 'STL': 2}"),
    (dict(registers=256, num_warps=1), "expected up to 255 registers, found 256"),
    (dict(num_warps=9), "9 warps of 255 registers do not fit one block"),
    (dict(tensor_cores=False), "uses no tensor cores on sm_90"),
]


@pytest.mark.parametrize(("change", "text"), UNFITTING, ids=[text for _, text in UNFITTING])
def test_a_kernel_that_does_not_fit_is_named(change: dict[str, Any], text: str) -> None:
    assert not FITS.misfits("sm_90", {"a_kernel": FITTING}, True)
    (found,) = FITS.misfits("sm_90", {"a_kernel": FITTING | change}, True)
    assert text in found


def test_a_variant_without_kernels_does_not_fit_and_amd_alone_may_fail_to_compile() -> None:
    assert FITS.misfits("sm_90", {}, False) == ["launches no kernel on sm_90"]
    assert FITS.misfits("sm_90", {"error": "no"}, False) == ["does not compile for sm_90: no"]
    assert FITS.misfits("gfx942", {"error": "no"}, True) == []


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """The sources in another place, to change them."""
    folder = tmp_path / "kernels"
    ignored = shutil.ignore_patterns("__pycache__", "build", "resources.json")
    shutil.copytree(KERNELS, folder, ignore=ignored)
    return folder


@pytest.mark.parametrize(
    "name", ["torch-ext/miracle_kernels/noise.py", "torch-ext/miracle_kernels/tuning.py", "variants.py"]
)
def test_the_digest_of_the_sources_changes_with_a_byte_and_a_name(copied: Path, name: str) -> None:
    assert SOURCES.source_digest(copied) == SOURCES.source_digest()
    with (copied / name).open("ab") as file:
        file.write(b"\n")
    changed = SOURCES.source_digest(copied)
    (copied / "torch-ext" / "miracle_kernels" / "tuning").mkdir(exist_ok=True)
    (copied / "torch-ext" / "miracle_kernels" / "tuning" / "a-gpu.json").write_text("{}")
    assert len({SOURCES.source_digest(), changed, SOURCES.source_digest(copied)}) == 3


def test_a_kept_result_is_made_once_by_whoever_comes_first(tmp_path: Path) -> None:
    made, found = [], []

    def make() -> dict[str, Any]:
        time.sleep(0.05)  # so that the others come while it is being made
        made.append(None)
        return {"kernel": {"registers": len(made)}}

    def work() -> None:
        found.append(SOURCES.kept(tmp_path / "new", "a variant on a target", make))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(HANG_SECONDS)
    assert found == [{"kernel": {"registers": 1}}] * 4 and len(made) == 1


def test_half_written_results_and_errors_are_made_again(tmp_path: Path) -> None:
    results: list[dict[str, Any]] = [{"kernel": {}}, {"error": "out of memory"}, {"kernel": {"registers": 2}}]
    assert SOURCES.kept(tmp_path, "first", lambda: results[0]) == results[0]
    (path,) = tmp_path.glob("*.json")
    path.rename(path.with_suffix(".partial"))  # as a process leaves it that is killed while it writes
    path.with_suffix(".partial").write_text('{"kern')
    assert [SOURCES.kept(tmp_path, "first", lambda i=i: results[i]) for i in (1, 2, 0)] == [
        results[1], results[2], results[2],
    ]  # fmt: skip
    assert SOURCES.kept(tmp_path, "second", lambda: results[0]) == results[0]
