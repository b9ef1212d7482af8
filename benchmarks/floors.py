"""What each problem of the GPU benchmark must at least do, and what that predicts for an H200.

    python benchmarks/gpu.py --floors-only    # writes benchmarks/results/gpu-floors.json; needs no GPU

`work` counts bytes and gathers per problem, and takes instructions from kernels/resources.json, which counts
them in the compiled kernels; `unit_seconds` divides all by a chip's rates. The largest is what a perfect
overlap would take, their sum what no overlap at all would.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from gpu_problems import PROBLEMS, Problem

RESOURCES = Path(__file__).resolve().parents[1] / "kernels" / "resources.json"

# One Philox4x32-10 call: per round two 32 × 32 → 64-bit products, each IMAD and IMAD.HI.U32 in SASS, and two
# three-way xors, each one LOP3. All threads share the key: its additions run in the uniform datapath.
ROUNDS, PRODUCTS, INSTRUCTIONS_PER_PRODUCT, XORS = 10, 2, 2, 2
PHILOX_INTEGER = ROUNDS * (PRODUCTS * INSTRUCTIONS_PER_PRODUCT + XORS)
# Per 16-bit half that is used: one mask or shift, and two instructions for a 64-bit address.
HALF_INTEGER = 1 + 2

# Blocks that share a tile of select's candidates; the margin of slide's pieces.
SELECT_TILE_BLOCKS, SLIDE_MARGIN = 512, 16 / 2048
# Contiguous loads of slide per transition: a source is read once for its four targets.
SLIDE_READS = 0.25


@dataclass(frozen=True)
class Chip:
    """Rates of one GPU.

    Args:
        clock_hz: of the processors.
        copy_bytes: per second of a device-to-device copy, read and written.
        bf16_flops: per second of a large matrix product.
    """

    name: str
    processors: int
    clock_hz: float
    copy_bytes: float
    bf16_flops: float
    # CUDA C++ programming guide, "Throughput of native arithmetic instructions", capability 9.0: results per
    # clock and processor. 32-bit integer multiply, add and logic 64 each; counted as if all shared one pipe.
    integer_lanes: int = 64
    issue_lanes: int = 128  # four warp instructions
    special_lanes: int = 16
    shuffle_lanes: int = 32
    # Assumptions: cycles of a warp's gather of random small words, and of a contiguous read.
    shared_gather_cycles: float = 3.5
    l1_gather_cycles: float = 8.0
    l1_read_cycles: float = 1.0
    l2_bytes: float = 5.5e12


# Assumed, from the datasheet and from what such cards are known to reach; a run on a GPU measures its own.
H200 = Chip("nvidia-h200, assumed", 132, 1.98e9, 4.3e12, 780e12)
H200_SLOW_CLOCK_HZ = 1.755e9


@dataclass(frozen=True)
class Work:
    """What a problem takes, counted over all threads.

    Args:
        read, written: bytes of device memory, each input and output once, scratch memory included.
        integer, instructions: per thread; the second counts all kinds.
        special: exponentials and the like.
        shared_gathers, l1_gathers: random reads of one table entry by one thread.
        l1_reads: contiguous reads of one word by one thread.
    """

    read: float = 0
    written: float = 0
    integer: float = 0
    instructions: float = 0
    special: float = 0
    flops: float = 0
    shared_gathers: float = 0
    l1_gathers: float = 0
    l1_reads: float = 0
    l2_written: float = 0
    shuffles: float = 0


@lru_cache(1)
def _report() -> dict[str, Any]:
    return json.loads(RESOURCES.read_text())["variants"] if RESOURCES.exists() else {}


def reported(variant: str, kernel: str) -> dict[str, Any]:
    """What the ahead-of-time report says of a kernel on sm_90; empty where it says nothing."""
    return _report().get(variant, {}).get("sm_90", {}).get(kernel, {})


def counted(variant: str, kernel: str, n: float) -> dict[str, float]:
    """Fields of `Work`: instructions for n units of a kernel's work, counted over whole tiles.

    Raises:
        LookupError: the report has no counts of it.
    """
    each = reported(variant, kernel).get("per_unit")
    if not each:
        raise LookupError(
            f"{RESOURCES}: expected counts of {kernel} in {variant} for sm_90, found none; "
            "run make kernel-compile"
        )
    kinds = {
        "instructions": "instructions",
        "integer": "integer",
        "special": "special",
        "shuffles": "shuffle",
    }
    return {field: n * each.get(kind, 0) for field, kind in kinds.items()}


def codebook_integer(n_states: int, step_weights: int) -> float:
    """Integer instructions that candidates need, whatever the kernel: Philox, halves and addresses."""
    return n_states * (-(-step_weights // 8) * PHILOX_INTEGER + step_weights * HALF_INTEGER)


def _codebook(problem: Problem) -> Work:
    n, v = problem.size, problem.code[2]
    halves = 8 * -(-v // 8) * n  # the kernel reads all eight of a group
    done = counted(f"codebook[step_weights={v}]", "codebook_kernel", n * v)
    return Work(4 * n, 2 * n * v, **done | {"integer": codebook_integer(n, v)}, l1_gathers=halves)


def _decode_variant(problem: Problem) -> str:
    """The variant of the report that has the problem's path, rotation and digest; of bfloat16, which other
    dtypes differ from by a cast."""
    bits, _, v = problem.code
    on_the_fly = bits > 16
    code = ("20.20.8" if v > 1 else "20.2.1") if on_the_fly else ("12.4.2" if v > 1 else "12.2.1")
    if v << bits > 8192 and not on_the_fly:  # a table that is read through the cache
        code = "16.2.1"
    told = ",rotation=128" * (problem.rotation > 1) + ",on_the_fly=True" * on_the_fly
    return f"decode[code={code},bfloat16{told}{',with_digest=True' * problem.digest}]"


def _decode(problem: Problem) -> Work:
    (bits, step_bits, v), n = problem.code, problem.size
    done = counted(_decode_variant(problem), "decode_kernel", n)
    read, written = n * step_bits / v / 8, n * (4 if problem.dtype == "float32" else 2)
    if bits > 16:
        return Work(read, written, **done, l1_gathers=n)
    # A shared entry of four candidates is read as two words.
    gathers = {"shared_gathers": n / min(v, 2)} if v << bits <= 8192 else {"l1_gathers": n / v}
    return Work(read, written, **done, **gathers)


def _select(problem: Problem) -> Work:
    bits, _, v = problem.code
    width = max(16, 1 << (v - 1).bit_length())
    scores = problem.size << bits
    drawn = -(-problem.size // SELECT_TILE_BLOCKS) * (width << bits)  # candidates, again for every tile
    code = "window_bits=16,step_weights=8" if v == 8 else "window_bits=20,step_weights=32"
    done = counted(f"select[{code},{problem.selection}]", "scan_kernel", scores)
    return Work(
        8 * v * problem.size, 16 * problem.size, **done, flops=4.0 * v * scores, l1_gathers=drawn,
    )  # fmt: skip


def _slide_variant(problem: Problem) -> str:
    """The variant of the report that has the problem's code, or one with as many weights per step."""
    code = ".".join(map(str, problem.code))
    names = [f"slide[code={code},{problem.selection}{more}]" for more in (",weighted", "")]
    other = "12.4.2" if problem.code[2] > 1 else "12.2.1"
    return next((name for name in names if reported(name, "slide_kernel")),
                f"slide[code={other},{problem.selection},weighted]")  # fmt: skip


def _slide(problem: Problem) -> Work:
    bits, step_bits, v = problem.code
    steps = problem.size / v * (1 + SLIDE_MARGIN * bits / step_bits)
    states, nodes = steps * 2**bits, steps * 2 ** (bits - step_bits)
    done = counted(_slide_variant(problem), "slide_kernel", states)
    return Work(
        4 * problem.size, nodes, **done, l1_reads=states * (SLIDE_READS + v - 1), l2_written=5 * nodes
    )


def _reparameterize(problem: Problem) -> Work:
    n = problem.size
    variant = f"{problem.op}[{'block_weights=8,' * problem.op.endswith('mean_kl')}float32]"
    stages = ("forward", "backward") if problem.stage == "step" else (problem.stage,)
    done: dict[str, float] = {}
    for stage in stages:
        kernel = f"{problem.op}{'_backward' * (stage == 'backward')}_kernel"
        for name, count in counted(variant, kernel, n).items():
            done[name] = done.get(name, 0) + count
    moved = {"forward": (8, 4), "backward": (12, 8)}
    read, written = (n * sum(column) for column in zip(*(moved[stage] for stage in stages), strict=True))
    return Work(read, written, **done, l1_gathers=n * len(stages))


def _linear(problem: Problem) -> Work:
    (bits, step_bits, v), n = problem.code, problem.size
    rows, several = n // problem.columns, problem.batch > 1
    read = n * step_bits / v / 8 + 2 * rows + 2 * problem.batch * problem.columns + 2 * (v << bits)
    code, batch = {1: ("12.2.1", 16), 2: ("12.4.2", 16), 4: ("12.8.4", 64)}[v]
    variant = f"decode_linear[code={code},batch={batch if several else 1},columns=8192,rotation=128]"
    done = counted(variant, "matrix_kernel" if several else "product_kernel", n)
    each = n if several else n / min(v, 2)
    gathers = {"shared_gathers" if 2 * v << bits <= 32768 else "l1_gathers": each}
    return Work(read, 2 * problem.batch * rows, **done, flops=2.0 * max(8, problem.batch) * n, **gathers)


_WORK: dict[str, Callable[[Problem], Work]] = {
    "codebook": _codebook, "decode": _decode, "select": _select, "slide": _slide, "decode_linear": _linear,
    "reparameterize": _reparameterize, "reparameterize_mean_kl": _reparameterize,
}  # fmt: skip


def work(problem: Problem) -> Work:
    """What the problem takes."""
    return _WORK[problem.op](problem)


def unit_seconds(done: Work, chip: Chip) -> dict[str, float]:
    """Seconds that each unit of the chip is busy."""
    cycles = chip.processors * chip.clock_hz
    return {
        "memory": (done.read + done.written) / chip.copy_bytes,
        "integer": done.integer / (cycles * chip.integer_lanes),
        "issue": done.instructions / (cycles * chip.issue_lanes),
        "special": done.special / (cycles * chip.special_lanes),
        "tensor": done.flops / chip.bf16_flops,
        "shared": done.shared_gathers / 32 * chip.shared_gather_cycles / cycles,
        "l1": (done.l1_gathers * chip.l1_gather_cycles + done.l1_reads * chip.l1_read_cycles) / 32 / cycles,
        "l2": done.l2_written / chip.l2_bytes,
        "shuffle": done.shuffles / (cycles * chip.shuffle_lanes),
    }


def yardstick(problem: Problem, chip: Chip) -> tuple[str, float]:
    """What a measured time is compared with, and its seconds."""
    done = work(problem)
    if problem.op == "codebook":
        return "integer instructions", unit_seconds(done, chip)["integer"]
    if problem.op == "decode":
        return "bytes written over copy bandwidth", done.written / chip.copy_bytes
    if problem.op == "select":
        return "FLOPs over the bf16 matrix rate", done.flops / chip.bf16_flops
    if problem.op == "slide":
        return "100 million weights/s", problem.size / 1e8
    return "bytes read and written over copy bandwidth", (done.read + done.written) / chip.copy_bytes


def ratio(problem: Problem, seconds: float, floor_seconds: float, baseline_seconds: float | None) -> float:
    """The number that the target speaks of: a speedup, or a share of the floor (its inverse for a limit)."""
    if baseline_seconds is not None:
        return baseline_seconds / seconds
    return seconds / floor_seconds if problem.limit else floor_seconds / seconds


def assumed_baseline(problem: Problem, chip: Chip) -> float | None:
    """Seconds of what an op replaces, at copy bandwidth: bf16 weights read, or torch's elementwise passes."""
    if problem.op == "decode_linear":
        return 2 * problem.size / chip.copy_bytes
    if problem.stage == "step":
        # Forward: exp, randn, product, sum, and for the KL square, exp, difference, sum: about 80 bytes per
        # weight; backward about as many.
        return 160 * problem.size / chip.copy_bytes
    return None


def met(problem: Problem, reached: float) -> bool | None:
    """Whether the target is reached; None where there is none."""
    if problem.target is None:
        return None
    return reached <= problem.target if problem.limit else reached >= problem.target


def prediction(problem: Problem, chip: Chip = H200) -> dict[str, Any]:
    """Counts, times per unit, the unit that binds, and the ratio with perfect overlap and with none."""
    seconds = unit_seconds(work(problem), chip)
    seconds.pop("integer" if seconds["issue"] >= seconds["integer"] else "issue")  # the same instructions
    what, floor_seconds = yardstick(problem, chip)
    baseline = assumed_baseline(problem, chip)
    binding = max(seconds, key=lambda unit: seconds[unit])
    at_best = ratio(problem, seconds[binding], floor_seconds, baseline)
    return {
        "op": problem.op, "problem": problem.label, "size": problem.size,
        "work": {name: value for name, value in asdict(work(problem)).items() if value},
        "microseconds": {unit: round(1e6 * value, 3) for unit, value in seconds.items() if value},
        "floor": what, "floor_microseconds": round(1e6 * floor_seconds, 3),
        "binding_unit": binding, "predicted_ratio_overlapped": round(at_best, 3),
        "predicted_ratio_serial": round(ratio(problem, sum(seconds.values()), floor_seconds, baseline), 3),
        "target": problem.target, "predicted_met_at_best": met(problem, at_best),
    }  # fmt: skip


def codebook_cross_check() -> list[dict[str, Any]]:
    """Counted integer instructions of a thread beside the SASS that kernels/compile.py reports."""
    rows = []
    for step_weights in (8, 32):
        used = reported(f"codebook[step_weights={step_weights}]", "codebook_kernel")
        # The report's launch has 128 states per tile and at most two groups of eight weights.
        groups = min(2, -(-step_weights // 8)) * 128 / (32 * used.get("num_warps", 4))
        counted = groups * (PHILOX_INTEGER + 8 * HALF_INTEGER)
        all_kinds = used.get("instructions")
        rows.append({"step_weights": step_weights, "counted_integer": counted, "sass_all_kinds": all_kinds})
    return rows


def predictions() -> dict[str, Any]:
    """Everything that can be said before a GPU is there."""
    return {
        "chip": asdict(H200), "slow_clock_hz": H200_SLOW_CLOCK_HZ,
        "philox_integer_instructions": PHILOX_INTEGER, "codebook_cross_check": codebook_cross_check(),
        "problems": [prediction(problem) for problem in PROBLEMS],
    }  # fmt: skip
