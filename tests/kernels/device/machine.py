"""Launches a program on the machine, in one or more orders, and raises where it did what it must not."""

import ctypes
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from tests.kernels.device.build import library
from tests.kernels.device.problems import DeviceFault, Problem
from tests.kernels.device.program import SHARED_START, Program

FORWARD, BACKWARD, SHUFFLED = range(3)
_MAX_PROBLEMS = 20
# Programs and threads are told apart in 32 bits.
_MAX_PROGRAMS = 1 << 22


class Order(NamedTuple):
    """In which order warps and programs run (FORWARD, BACKWARD or SHUFFLED by the launch's seed), and whether
    asynchronous copies and products happen at once, or as late as somebody waits for them."""

    kind: int
    at_once: bool = False


TWO_ORDERS = (Order(FORWARD), Order(SHUFFLED, at_once=True))


class _Launch(ctypes.Structure):
    """`Launch` in machine/machine.h."""

    _fields_ = [
        *(
            (name, ctypes.c_void_p)
            for name in ("code", "operands", "presets", "regions", "orders", "problems")
        ),
        *(
            (name, ctypes.c_int32)
            for name in ("n_instructions", "n_registers", "n_threads", "n_presets", "n_regions", "n_orders")
        ),
        ("max_problems", ctypes.c_int32),
        ("grid", ctypes.c_int32 * 3),
        ("only", ctypes.c_int32),
        ("shared_start", ctypes.c_uint32),
        ("shared_bytes", ctypes.c_uint32),
        ("seed", ctypes.c_uint64),
    ]


class _Problem(ctypes.Structure):
    """`Problem` in machine/problems.h."""

    _fields_ = [
        ("kind", ctypes.c_int32),
        ("instruction", ctypes.c_int32),
        ("program", ctypes.c_uint32),
        ("thread", ctypes.c_uint32),
        ("address", ctypes.c_uint64),
        ("other", ctypes.c_int64),
    ]


def launch(
    program: Program,
    grid: Sequence[int],
    values: Sequence[int],
    regions: Sequence[tuple[int, int]],
    shared_bytes: int = 0,
    orders: Sequence[Order] = TWO_ORDERS,
    seed: int = 0,
    only: int = -1,
) -> None:
    """Run every program of the grid, once in each order; the last one's results stay.

    Args:
        values: of the kernel's parameters, each as an unsigned word.
        regions: [start, end) of all memory that may be read and written.
        only: the one program that runs, if it is not all of them.

    Raises:
        DeviceFault: the kernel did what no kernel must; the text has the first few places.
    """
    sizes = [*map(int, grid), 1, 1][:3]
    assert len(values) == len(program.kernel.parameters), (values, program.kernel.parameters)
    assert 0 < sizes[0] * sizes[1] * sizes[2] <= _MAX_PROGRAMS, sizes
    presets = np.concatenate((program.presets, _parameters(program, values)))
    bounds = np.array(merged(regions), np.uint64).reshape(-1, 2)
    chosen = np.array(orders, np.int32).reshape(-1, 2)
    problems = (_Problem * _MAX_PROBLEMS)()
    given = _Launch(
        _at(program.code), _at(program.operands), _at(presets), _at(bounds), _at(chosen),
        ctypes.addressof(problems), len(program.code), program.n_registers, program.kernel.n_threads,
        len(presets), len(bounds), len(chosen), _MAX_PROBLEMS, (ctypes.c_int32 * 3)(*sizes), only,
        SHARED_START, shared_bytes, seed,
    )  # fmt: skip
    n_problems = library().device_launch(ctypes.byref(given))
    if n_problems:
        raise DeviceFault(_text(program, problems[:n_problems]))


def merged(regions: Sequence[tuple[int, int]]) -> list[list[int]]:
    """The same memory in regions that do not overlap."""
    found: list[list[int]] = []
    for start, end in sorted(region for region in regions if region[1] > region[0]):
        if found and start < found[-1][1]:
            found[-1][1] = max(found[-1][1], end)
        else:
            found.append([start, end])
    return found


def _parameters(program: Program, values: Sequence[int]) -> Any:
    """Presets of the registers that hold parameters, or what lies at an offset in them."""
    rows = [(register, 0, values[place] >> 8 * offset) for register, place, offset in program.parameters]
    return np.array(rows, np.uint64).astype(np.int64).reshape(-1, 3)


def _at(array: Any) -> int:
    return array.ctypes.data


def _text(program: Program, problems: Sequence[_Problem]) -> str:
    lines = []
    for found in problems:
        problem = Problem(*(getattr(found, name) for name, *_ in _Problem._fields_))
        statement = program.kernel.statements[problem.instruction]
        source = f", {statement.source}" if statement.source else ""
        lines.append(problem.text(f"{program.kernel.name}, PTX line {statement.line}{source}: `{statement}`"))
    return "\n".join(lines)
