"""Compiles every Triton kernel ahead of time and counts what it uses; needs no GPU.

    python kernels/compile.py                    # writes kernels/resources.json
    python kernels/compile.py --if-changed       # the same, where that is of other sources; then it fails
    python kernels/compile.py --only codebook    # prints what the variants of one op use
    python kernels/compile.py --only "decode[code=12.2.1,bfloat16]" --target sm_90 --counts    # seconds

Registers, spills and shared memory chose the default tile sizes of miracle_kernels/tuning.py. Instructions
per unit of work, over whole tiles, are counted by counting.py and units.py. It fails when a kernel does not
compile, spills or outgrows a GPU. The report names the sources it is of, so that nobody has to compile what
has not changed: tests/kernels/test_compilation.py reads it and compiles a few kernels anew.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from counting import base, listed
from fits import misfits
from miracle_kernels import _triton
from sources import kept, source_digest
from units import counted
from variants import TARGETS, VARIANTS, Variant

OUTPUT = Path(__file__).parent / "resources.json"
COUNTED = ("LDS", "STS", "LDG", "STG", "SHFL", "IMAD", "MUFU", "LDL", "STL")
_AMD_COUNTS = (
    "vgpr_count", "agpr_count", "sgpr_count", "vgpr_spill_count", "sgpr_spill_count",
    "private_segment_fixed_size", "group_segment_fixed_size",
)  # fmt: skip


class Launch(NamedTuple):
    """One kernel launch that an op asked for."""

    kernel: Any  # a JITFunction, whose declared type says less than it has
    arguments: tuple[Any, ...]
    options: dict[str, Any]


def launches(variant: Variant) -> list[Launch]:
    """What the variant's op launches, recorded instead of launched."""
    found: list[Launch] = []

    def record(kernel: JITFunction, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        found.append(Launch(kernel, arguments, options))

    with (
        mock.patch.object(JITFunction, "run", record),
        mock.patch.object(_triton, "INTERPRETED", True),  # so that the op takes CPU tensors
    ):
        variant.call()
    if not found:
        raise RuntimeError(
            f"{variant.name}: expected a kernel launch, found none; give the call more elements"
        )
    return found


def compile_launch(launch: Launch, target: GPUTarget) -> CompiledKernel:
    """The launch's kernel for a target, specialized as it would be at run time."""
    backend = make_backend(target)
    binder = create_function_from_signature(launch.kernel.signature, launch.kernel.params, backend)
    bound, specialization, extra = binder(*launch.arguments, **launch.options)
    options, signature, constants, attributes = launch.kernel._pack_args(
        backend, launch.options, bound, specialization, extra
    )
    source = ASTSource(launch.kernel, signature, constants, attributes)
    return triton.compile(source, target=target, options=options.__dict__)


def tool(*arguments: str) -> str:
    """What NVIDIA's cuobjdump says; the one inside Triton."""
    command = [knobs.nvidia.cuobjdump.path, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def nvidia_usage(compiled: CompiledKernel, launch: Launch, folder: Path) -> dict[str, Any]:
    """Registers, memory and instructions of a cubin, by cuobjdump."""
    metadata, path = compiled.metadata, folder / f"{compiled.hash}.cubin"
    path.write_bytes(compiled.asm["cubin"])
    used = dict(re.findall(r"\b([A-Z]+):(\d+)", tool("-res-usage", str(path))))
    sass = tool("-sass", str(path))
    opcodes = Counter(base(instruction.opcode) for instruction in listed(sass))
    launched = dict(zip(launch.kernel.arg_names, launch.arguments, strict=False)) | launch.options
    # From sm_90 on, cuobjdump counts the KiB that the system keeps for itself; the limits do not.
    reserved = 1024 if metadata.target.arch >= 90 else 0
    return {
        "registers": int(used["REG"]),
        "stack_bytes": int(used["STACK"]),
        "local_bytes": int(used["LOCAL"]),
        "shared_bytes": metadata.shared,
        "static_shared_bytes": max(0, int(used["SHARED"]) - reserved),
        "num_warps": metadata.num_warps,
        "fp_fusion": metadata.enable_fp_fusion,
        "tensor_cores": any(opcode.endswith("MMA") for opcode in opcodes),
        "instructions": opcodes.total() - opcodes["NOP"],
        **{opcode: opcodes[opcode] for opcode in COUNTED},
        **counted(plain_name(launch), launched, sass, 32 * metadata.num_warps),
    }


def plain_name(launch: Launch) -> str:
    """Of the kernel, as reports have it."""
    return launch.kernel.__name__.strip("_")


def amd_usage(compiled: CompiledKernel) -> dict[str, Any]:
    """Registers and memory from the metadata that ends AMD's assembly."""
    assembly = compiled.asm["amdgcn"]
    used = dict(re.findall(r"^\s+\.(\w+):\s+(\d+)$", assembly, re.MULTILINE))
    return {
        **{name: int(used[name]) for name in _AMD_COUNTS if name in used},
        "shared_bytes": compiled.metadata.shared,
        "num_warps": compiled.metadata.num_warps,
        "fp_fusion": compiled.metadata.enable_fp_fusion,
        "tensor_cores": "v_mfma" in assembly,
    }


def usage(variant: Variant, target: GPUTarget) -> dict[str, Any]:
    """What each different kernel of a variant uses on a target, by the kernel's name."""
    found: dict[str, Any] = {}
    hashes = set()
    with tempfile.TemporaryDirectory() as folder:
        for launch in launches(variant):
            compiled = compile_launch(launch, target)
            if compiled.hash in hashes:  # the same kernel again, on other data
                continue
            hashes.add(compiled.hash)
            name = plain_name(launch)
            name += f"#{len(hashes)}" if name in found else ""
            is_cuda = target.backend == "cuda"
            used = nvidia_usage(compiled, launch, Path(folder)) if is_cuda else amd_usage(compiled)
            found[name] = used
    return found


def attempt(task: tuple[int, str, Path | None]) -> tuple[dict[str, Any], float]:
    """The usage of one variant on one target, or why there is none, and the seconds that took.

    Args:
        task: a place in VARIANTS, a target, and the folder that keeps results, if one does.
    """
    index, target, folder = task
    variant, start = VARIANTS[index], time.perf_counter()

    def compiled() -> dict[str, Any]:
        try:
            return usage(variant, GPUTarget(*TARGETS[target]))
        except Exception as error:  # Triton raises whatever its passes do; the report says which
            return {"error": f"{type(error).__name__}: {error}"}

    found = kept(folder, f"{variant.name} {target}", compiled) if folder else compiled()
    return found, time.perf_counter() - start


def compile_all(
    indices: list[int], targets: list[str], folder: Path | None = None
) -> dict[str, dict[str, Any]]:
    """Variant name → target → kernel → usage."""
    report: dict[str, dict[str, Any]] = {VARIANTS[index].name: {} for index in indices}
    tasks = [(index, target, folder) for index in indices for target in targets]
    for (index, target, _), (found, seconds) in zip(tasks, attempts(tasks), strict=True):
        name = VARIANTS[index].name
        report[name][target] = found
        print(f"{name} {target}: {found.get('error', 'ok')} ({seconds:.2f} s)", flush=True)
    return report


def attempts(tasks: list[tuple[int, str, Path | None]]) -> Iterator[tuple[dict[str, Any], float]]:
    """What `attempt` gives for each task, by as many processes as there are processors."""
    n_processes = min(len(tasks), len(os.sched_getaffinity(0)))
    if n_processes < 2:
        yield from map(attempt, tasks)
        return
    # Spawned, not forked: torch and LLVM have threads.
    with multiprocessing.get_context("spawn").Pool(n_processes, single_threaded) as pool:
        yield from pool.imap(attempt, tasks)


def single_threaded() -> None:
    """One thread per process: the processes are the parallelism."""
    torch.set_num_threads(1)


def versions() -> dict[str, str]:
    """Of the compilers; Triton has one ptxas for sm_90 and newer and one for older GPUs."""
    nvidia = knobs.nvidia
    return {
        "triton": triton.__version__,
        "ptxas": nvidia.ptxas.version,
        "ptxas_blackwell": nvidia.ptxas_blackwell.version,
    }


def identity() -> dict[str, Any]:
    """What a report is of: the sources' digest and the compilers."""
    return {"sources": source_digest(), "versions": versions()}


def results_folder(folder: Path) -> Path:
    """Where results of these sources, compilers and targets are kept."""
    whole = json.dumps([identity(), TARGETS])
    return folder / hashlib.sha256(whole.encode()).hexdigest()[:32]


def arguments() -> argparse.Namespace:
    """The command line; ends the program where kernels are interpreted."""
    parser = argparse.ArgumentParser(description="Compile every kernel ahead of time.")
    parser.add_argument("--output", type=Path, help="the report; resources.json if everything is compiled")
    parser.add_argument("--if-changed", action="store_true", help="only if the report is of other sources")
    parser.add_argument("--only", nargs="+", default=[""], help="variants whose name starts so")
    parser.add_argument("--target", choices=TARGETS, help="this one alone")
    parser.add_argument("--counts", action="store_true", help="print instructions per unit instead of all")
    parser.add_argument("--kept", type=Path, help="a folder of results that need not be compiled again")
    if knobs.runtime.interpret:
        parser.error(
            "expected compiled kernels, found TRITON_INTERPRET in the environment, which interprets them; "
            "run env -u TRITON_INTERPRET python kernels/compile.py"
        )
    return parser.parse_args()


def write(path: Path, report: dict[str, Any]) -> None:
    """The report, whole or not at all."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(report, indent=2) + "\n")
    partial.replace(path)
    print(f"wrote {path}")


def compile_chosen(chosen: argparse.Namespace) -> dict[str, Any]:
    """The report of the variants and targets that the command line names."""
    indices = [i for i, variant in enumerate(VARIANTS) if variant.name.startswith(tuple(chosen.only))]
    targets = [chosen.target] if chosen.target else list(TARGETS)
    folder = results_folder(chosen.kept) if chosen.kept else None
    with tempfile.TemporaryDirectory() as cache:  # an empty cache: every kernel is compiled now
        os.environ["TRITON_CACHE_DIR"] = cache
        return identity() | {"variants": compile_all(indices, targets, folder)}


def main() -> int:
    """Compile, write the report, and fail where a kernel does not fit or the report was of other sources."""
    chosen = arguments()
    whole = chosen.only == [""] and not chosen.target
    before = json.loads(OUTPUT.read_text()) if chosen.if_changed and OUTPUT.exists() else {}
    now = identity()
    if now.items() <= before.items():
        print(f"{OUTPUT} is of these sources and compilers: nothing to compile")
        return 0
    report = compile_chosen(chosen)
    output = chosen.output or (OUTPUT if whole and before.get("sources") != now["sources"] else None)
    if output:
        write(output, report)
    elif chosen.counts:
        print("\n".join(count_lines(report["variants"])))
    elif not chosen.if_changed:
        print(json.dumps(report, indent=2))
    wrong = wrong_in(report["variants"])
    if chosen.if_changed and before.get("sources") != now["sources"]:
        wrong.append(f"{OUTPUT}: expected the report of these sources, found another's; commit the new one")
    print("\n".join(wrong))
    return int(bool(wrong))


def count_lines(report: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Instructions per unit of every kernel of a report that is counted."""
    for name, targets in report.items():
        for target, kernels in targets.items():
            for kernel, used in kernels.items():
                if isinstance(used, dict) and "unit" in used:
                    yield f"{name} {target} {kernel}: {counts_of(used)}"


def counts_of(used: dict[str, Any]) -> str:
    """What a kernel's usage says of its work, in one line."""
    kinds = dict(used.get("per_unit", {}))
    each, once = kinds.pop("instructions", used.get("uncounted")), kinds.pop("once_per_program", 0)
    told = ", ".join(f"{kind} {count:g}" for kind, count in kinds.items())
    memory = f"{used['registers']} registers, {used['shared_bytes']} bytes of shared memory"
    return f"{each} per {used['unit']} ({told}), {once} once per program; {memory}"


def wrong_in(report: dict[str, dict[str, Any]]) -> list[str]:
    """Every kernel of a report that does not fit, in words."""
    matrix = {variant.name: variant.matrix for variant in VARIANTS}
    return [
        f"{name}: {text}"
        for name, targets in report.items()
        for target, kernels in targets.items()
        for text in misfits(target, kernels, matrix[name])
    ]


if __name__ == "__main__":
    sys.exit(main())
