"""Small programs in PTX, written by hand, for the machine's own tests."""

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.kernels.device import machine
from tests.kernels.device.program import Program, assemble
from tests.kernels.device.ptx import parse

WARP = 32
# Addresses of this thread's 4, 8 or 16 bytes in the first arrays; %r0 is the thread, %rd0 the first array.
_START = """
    mov.u32 %r0, %tid.x;
"""
_PARAMETER = """
    ld.param.b64 %rd{place}, [a_kernel_param_{place}];
    mad.wide.u32 %rd{by4}, %r0, 4, %rd{place};
    mad.wide.u32 %rd{by8}, %r0, 8, %rd{place};
    mad.wide.u32 %rd{by16}, %r0, 16, %rd{place};
"""


@cache
def program(body: str, n_arrays: int = 1, threads: int = WARP) -> Program:
    """A kernel of arrays: %rd0, %rd1, … are their addresses, and %rd40, %rd41, … (%rd80, …; %rd160, …) those
    plus 4 (8; 16) times the thread, which is %r0."""
    parameters = ", ".join(f".param .u64 .ptr .global .align 1 a_kernel_param_{k}" for k in range(n_arrays))
    start = _START + "".join(
        _PARAMETER.format(place=k, by4=40 + k, by8=80 + k, by16=160 + k) for k in range(n_arrays)
    )
    return assemble(
        parse(
            f".version 8.0\n.target sm_80\n.visible .entry a_kernel({parameters})\n.reqntid {threads}\n"
            f"{{{start}{body}\n    ret;\n}}"
        )
    )


def run(
    body: str,
    *arrays: NDArray[Any],
    threads: int = WARP,
    grid: Sequence[int] = (1,),
    shared_bytes: int = 0,
    orders: Sequence[machine.Order] = machine.TWO_ORDERS,
    seed: int = 0,
) -> None:
    """Run a kernel on arrays, which it may read and write."""
    starts = [array.ctypes.data for array in arrays]
    regions = [(start, start + array.nbytes) for start, array in zip(starts, arrays, strict=True)]
    made = program(body, len(arrays), threads)
    machine.launch(made, grid, starts, regions, shared_bytes, orders, seed)


def results(instruction: str, kind: type[Any], *sources: NDArray[Any]) -> NDArray[Any]:
    """What `instruction` (of %r20 and %r10, %r11, …) leaves in %r20, of one warp's sources [32]."""
    loads = "".join(
        f"ld.global.b{8 * source.itemsize} %r{10 + k}, [%rd{(80 if source.itemsize == 8 else 40) + k}];\n"
        for k, source in enumerate(sources)
    )
    out, place = np.zeros(WARP, np.uint64), len(sources)
    spread = [_spread(source) for source in sources]
    run(f"{loads}{instruction};\nst.global.b64 [%rd{80 + place}], %r20;", *spread, out)
    return out.view(kind)[:: 8 // np.dtype(kind).itemsize]


def _spread(source: NDArray[Any]) -> NDArray[Any]:
    """Items of fewer than four bytes at multiples of four."""
    wide = np.zeros((WARP, max(4, source.itemsize)), np.uint8)
    wide[:, : source.itemsize] = source.reshape(WARP, 1).view(np.uint8)
    return wide
