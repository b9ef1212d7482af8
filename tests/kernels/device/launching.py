"""Launches of compiled kernels go to the machine: `with launches_on(architecture): …`, for CPU tensors."""

import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

from torch import Tensor
from triton.runtime.jit import JITFunction

from miracle_kernels import _triton
from tests.kernels.bounds import extent
from tests.kernels.device.compiled import Compiled, Compiler
from tests.kernels.device.machine import TWO_ORDERS, Order, launch

# (k, n): every launch has a grid of n programs, of which program k runs alone. None leaves them as they are.
directed: tuple[int, int] | None = None


def words(compiled: Compiled, bound: dict[str, Any]) -> list[int]:
    """The kernel's parameters as words. Behind the arguments Triton has pointers to memory for its own use,
    of which these kernels want none."""
    found = []
    for name, kind in zip(compiled.names, compiled.types, strict=True):
        value = bound[name]
        if isinstance(value, Tensor):
            found.append(value.data_ptr())
        elif kind.startswith("fp"):
            assert kind == "fp32", f"{name}: a number of type {kind}"
            found.append(int.from_bytes(struct.pack("<f", value), "little"))
        else:
            found.append(int(value) & (2**64 - 1))
    missing = len(compiled.program.kernel.parameters) - len(found)
    return found + [0] * missing


@contextmanager
def launches_on(
    architecture: str,
    orders: Sequence[Order] = TWO_ORDERS,
    change: Callable[[str], str] = lambda text: text,
) -> Iterator[None]:
    """Every launch in the block is compiled for a GPU and executed in each order.

    Args:
        change: what to do to every PTX text before it is executed.
    """
    compiler, n_launches = Compiler(architecture, change), 0

    def run(kernel: Any, *arguments: Any, grid: Any, warmup: bool = False, **options: Any) -> None:
        nonlocal n_launches
        n_launches += 1
        compiled, bound = compiler(kernel, arguments, options)
        sizes: Any = grid(bound) if callable(grid) else grid
        regions = [extent(value) for value in bound.values() if isinstance(value, Tensor)]
        given, only = words(compiled, bound), -1
        if directed:
            only, *sizes = directed
        launch(compiled.program, sizes, given, regions, compiled.shared_bytes, orders, n_launches, only)

    with (
        mock.patch.object(JITFunction, "run", run),
        mock.patch.object(_triton, "INTERPRETED", True),  # so that ops take CPU tensors
    ):
        yield
