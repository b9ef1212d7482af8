"""Where kernels are launched, and what happens where they cannot be."""

from collections.abc import Iterator
from contextlib import contextmanager
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
