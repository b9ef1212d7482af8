"""Where and how kernels are launched, and what happens where they cannot be."""

import ast
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from miracle_hub.coding.quantiles import quantiles
from miracle_kernels import KernelUnavailableError, _triton, codebook
from miracle_kernels.codebook import codebook_triton
from miracle_kernels.tuning import resident_programs, tiles


class OnSecondGPU(Tensor):
    """Says that it is on cuda:1."""

    is_cuda = True  # pyright: ignore
    device = torch.device("cuda", 1)  # pyright: ignore


def test_kernels_are_launched_on_the_device_of_their_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton launches on the current device, whichever the tensors are on."""
    current: list[Any] = [torch.device("cuda", 0)]

    @contextmanager
    def device(wanted: torch.device) -> Iterator[None]:
        current.append(wanted)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device", device)
    launch = _triton.on_its_device(lambda *args, **kwargs: current[-1])
    tensor = torch.zeros(3).as_subclass(OnSecondGPU)
    assert launch(5, tensor) == launch(x=tensor) == torch.device("cuda", 1)
    assert launch(torch.zeros(3)) == torch.device("cuda", 0) and len(current) == 1


def test_compiled_kernels_refuse_tensors_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_triton, "INTERPRETED", False)
    arguments = (torch.zeros(3, dtype=torch.int64), quantiles(), 2, 0, 0)
    with pytest.raises(KernelUnavailableError, match="codebook: expected tensors on a GPU, found cpu; move"):
        codebook_triton(*arguments)
    assert codebook(*arguments).shape == (3, 2)  # the op itself goes by the device


def test_without_triton_the_op_runs_and_the_kernel_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_triton, "HAS_TRITON", False)
    arguments = (torch.zeros(3, dtype=torch.int64), quantiles(), 2, 0, 0)
    with pytest.raises(KernelUnavailableError, match="expected the Python package triton, found none; pip"):
        codebook_triton(*arguments)
    assert codebook(*arguments).shape == (3, 2)


def test_measured_tiles_win_over_the_heuristic_and_special_ones_over_general(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from miracle_kernels import tuning

    device = torch.device("cpu")
    heuristic = tiles("select", device, step_weights=32)
    assert tiles("select", device, step_weights=128)["TILE_BLOCKS"] < heuristic["TILE_BLOCKS"]
    measured = {"select": {"TILE_BLOCKS": 64}, "select[step_weights=128]": {"TILE_BLOCKS": 16}}
    monkeypatch.setattr(tuning, "_measured", lambda name: measured)
    assert tiles("select", device, step_weights=32) == heuristic | {"TILE_BLOCKS": 64}
    assert tiles("select", device, step_weights=128)["TILE_BLOCKS"] == 16
    assert resident_programs(device, 8) > 1


ROOT = Path(__file__).parents[2]


def launched(path: Path) -> Iterator[ast.Call]:
    """Every call of a kernel with its grid: `a_kernel[grid](...)`."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
            if ast.unparse(node.func.value).endswith("kernel"):
                yield node


def kernels(path: Path) -> Iterator[str]:
    """Names of the kernels that a module has, which have no other end: device functions return something."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef) and any("jit" in ast.unparse(d) for d in node.decorator_list):
            if not any(isinstance(inner, ast.Return) for inner in ast.walk(node)):
                yield node.name


def test_every_launch_says_whether_products_and_sums_are_fused() -> None:
    """Triton 3.9 warns of one that does not, and 3.10 changes what it means."""
    folders = (ROOT / "kernels" / "torch-ext", ROOT / "tests" / "kernels", ROOT / "benchmarks")
    paths = [path for folder in folders for path in sorted(folder.rglob("*.py"))]
    found = [(path.name, call) for path in paths for call in launched(path)]
    declared = {name for path in paths for name in kernels(path)}
    assert declared and declared == {ast.unparse(call.func.value) for _, call in found}  # pyright: ignore
    for name, call in found:
        told = [keyword.value for keyword in call.keywords if keyword.arg == "enable_fp_fusion"]
        assert len(told) == 1 and isinstance(told[0], ast.Constant), f"{name}:{call.lineno}"


OF_NOISE = [f"reparameterize{kind}{way}" for kind in ("", "_mean_kl") for way in ("", "_backward")]


@pytest.mark.parametrize("op", OF_NOISE)
def test_no_thread_makes_noise_that_another_makes_too(op: str) -> None:
    """A Philox counter has the noise of eight weights."""
    tile = tiles(op, torch.device("cpu"))
    assert 32 * tile["num_warps"] <= tile["TILE"] // 8
