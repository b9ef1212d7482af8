"""Whether compiled kernels fit: no spills, within a GPU's registers and memory, tensor cores where said."""

from collections.abc import Iterator
from typing import Any

_KIB = 1024
# Shared memory that one block may have: CUDA C++ programming guide, "Technical specifications per compute
# capability"; AMD Instinct MI300 instruction set, "LDS".
_SHARED_LIMIT = {"sm_80": 163 * _KIB, "sm_90": 227 * _KIB, "sm_100": 227 * _KIB, "gfx942": 64 * _KIB}
_REGISTERS_PER_THREAD, _REGISTERS_PER_BLOCK = 255, 65536
# AMD's compiler backend is the younger one: a kernel that it cannot compile is reported, and fails nothing.
MAY_FAIL = "gfx942"


def misfits(target: str, kernels: dict[str, Any], matrix: bool) -> list[str]:
    """What is wrong with the kernels of one variant on one target; empty where they fit.

    Args:
        kernels: usage by the kernel's name, as in resources.json, or {"error": why there is none}.
        matrix: whether at least one of them must use tensor cores.
    """
    if "error" in kernels:
        return [] if target == MAY_FAIL else [f"does not compile for {target}: {kernels['error']}"]
    found = [text for name, used in kernels.items() for text in _misfits_of(name, target, used)]
    if not kernels:
        found.append(f"launches no kernel on {target}")
    if matrix and not any(used["tensor_cores"] for used in kernels.values()):
        found.append(f"uses no tensor cores on {target}")
    return found


def _misfits_of(name: str, target: str, used: dict[str, Any]) -> Iterator[str]:
    where = f"{name} on {target}"
    shared = used["shared_bytes"] + used.get("static_shared_bytes", 0)
    if shared > _SHARED_LIMIT[target]:
        yield f"{where}: expected up to {_SHARED_LIMIT[target]} bytes of shared memory, found {shared}"
    if "registers" not in used:  # AMD counts other things
        return
    spilled = {key: used[key] for key in ("stack_bytes", "local_bytes", "LDL", "STL") if used[key]}
    if spilled:
        yield f"{where} spills: {spilled}; choose smaller tiles or more warps in tuning.py"
    if used["registers"] > _REGISTERS_PER_THREAD:
        yield f"{where}: expected up to {_REGISTERS_PER_THREAD} registers, found {used['registers']}"
    if used["registers"] * 32 * used["num_warps"] > _REGISTERS_PER_BLOCK:
        yield f"{where}: {used['num_warps']} warps of {used['registers']} registers do not fit one block"
