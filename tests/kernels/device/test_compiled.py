"""Kernels are compiled as a launch would compile them, each once for every state of its sources."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from miracle_kernels._triton import tl, triton
from tests.kernels.device.problems import DeviceFault

ARCHITECTURE = os.environ.get("MIRACLE_DEVICE", "")
pytestmark = pytest.mark.skipif(not ARCHITECTURE, reason="compiled kernels only: make test-compiled")


@triton.jit
def _filling_kernel(out_ptr, value, TILE: tl.constexpr):
    tl.store(out_ptr + tl.program_id(0) * TILE + tl.arange(0, TILE), value)


def fill(out: torch.Tensor, value: float, tile: int, grid: int = 1) -> None:
    _filling_kernel[(grid,)](out, value, TILE=tile, enable_fp_fusion=False)  # pyright: ignore


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Any]:
    """What is compiled from now on, with nothing kept from before."""
    from tests.kernels.device import compiled

    found: list[Any] = []
    compile_it = compiled.Compiler.compile

    def record(self: Any, source: Any, options: Any) -> dict[str, Any]:
        found.append(source)
        return compile_it(self, source, options)

    monkeypatch.setattr(compiled, "KEPT", tmp_path)
    monkeypatch.setattr(compiled.Compiler, "compile", record)
    return found


def test_what_was_compiled_is_kept_by_source_types_and_constants(compilations: list[Any]) -> None:
    from tests.kernels.device.launching import launches_on

    out = torch.zeros(256)
    for _ in range(2):
        with launches_on(ARCHITECTURE):
            fill(out, 2.5, 256)
            fill(out, 3.5, 256)
    assert len(compilations) == 1 and (out == 3.5).all()
    with launches_on(ARCHITECTURE):
        fill(out, 1.5, 128)
        fill(out[1:], 0.5, 128)  # another alignment
        fill(out.half(), 0.5, 128)
    assert len(compilations) == 4 and (out[1:129] == 0.5).all()


def test_another_body_is_compiled_anew(compilations: list[Any]) -> None:
    from tests.kernels.device.launching import launches_on

    @triton.jit
    def _filling_kernel(out_ptr, value, TILE: tl.constexpr):
        tl.store(out_ptr + tl.program_id(0) * TILE + tl.arange(0, TILE), value + 1.0)

    out = torch.zeros(256)
    with launches_on(ARCHITECTURE):
        fill(out, 2.5, 256)
        _filling_kernel[(1,)](out, 2.5, TILE=256, enable_fp_fusion=False)  # pyright: ignore
    assert len(compilations) == 2 and (out == 3.5).all()


def test_a_launch_that_leaves_its_tensors_is_named() -> None:
    from tests.kernels.device.launching import launches_on

    out = torch.zeros(200)
    with (
        launches_on(ARCHITECTURE),
        pytest.raises(DeviceFault, match="_filling_kernel, PTX line .*test_compiled.py"),
    ):
        fill(out, 1.0, 128, grid=2)
