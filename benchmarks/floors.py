"""The GPU benchmark's problems, what each must at least do, and what that predicts for an H200.

    python benchmarks/gpu.py --floors-only    # writes benchmarks/results/gpu-floors.json; needs no GPU

`work` counts bytes, instructions and gathers per problem; `unit_seconds` divides them by a chip's rates.
The largest is what a perfect overlap would take, their sum what no overlap at all would.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

RESOURCES = Path(__file__).resolve().parents[1] / "kernels" / "resources.json"

# One Philox4x32-10 call: per round two 32 × 32 → 64-bit products, each IMAD and IMAD.HI.U32 in SASS, and two
# three-way xors, each one LOP3. All threads share the key: its additions run in the uniform datapath.
ROUNDS, PRODUCTS, INSTRUCTIONS_PER_PRODUCT, XORS = 10, 2, 2, 2
PHILOX_INTEGER = ROUNDS * (PRODUCTS * INSTRUCTIONS_PER_PRODUCT + XORS)
# Per 16-bit half that is used: one mask or shift, and two instructions for a 64-bit address.
HALF_INTEGER = 1 + 2

# Instructions per weight of decode's loop on the grouped path, read off the SASS for sm_90 (L = 12, k = 2).
DECODE_INSTRUCTIONS, DECODE_INTEGER = 13.7, 6.0
# A rotation by 128: additions, selections and 5 shuffles; the digest: three 64-bit products, six xor-shifts.
ROTATION_INSTRUCTIONS, ROTATION_SHUFFLES, DIGEST_INSTRUCTIONS = 20.0, 5.0, 48.0
# Without a table each weight calls Philox for itself: static count of the general path, per weight.
GENERAL_INSTRUCTIONS = 225.0
# decode_linear's loop per weight (window, gather, conversion, multiply-add) by V, read off the SASS for
# sm_90. The one for several rows has a candidate's weights in different threads, which all look it up.
VECTOR_INSTRUCTIONS, MATRIX_INSTRUCTIONS = {1: 9.3, 2: 7.2, 4: 6.8}, 13.5
# select per score, from the SASS of the scan: maximum, multiply-add, exponential, sum, and the rest shared.
SELECT_INSTRUCTIONS, SELECT_TILE_BLOCKS = 9.0, 256
# slide per state, and its two contiguous loads; float32 costs and one byte per node go to the L2.
SLIDE_INSTRUCTIONS, SLIDE_READS, SLIDE_MARGIN = 14.0, 2.0, 16 / 2048


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
class Problem:
    """One thing to measure.

    Args:
        size: weights; states for codebook, blocks for select; a multiple of `columns` where that is not 0.
        code: L, k, V.
        stage: of reparameterize: forward, backward, or step: both, through autograd.
        target: the ratio to reach, None where a number is only reported; `limit` says that less is better.
        optional: skipped when time runs out.
    """

    op: str
    size: int
    code: tuple[int, int, int] = (12, 2, 1)
    columns: int = 0
    dtype: str = "float32"
    rotation: int = 1
    digest: bool = False
    selection: str = "best"
    batch: int = 1
    stage: str = ""
    target: float | None = None
    limit: bool = False
    optional: bool = False

    @property
    def label(self) -> str:
        """What tells it from the op's other problems."""
        code = ".".join(map(str, self.code))
        rows = self.size // self.columns if self.columns else 0
        return " ".join(part for part in (
            self.stage or (f"L={self.code[0]} V={self.code[2]}" if self.op == "select" else code),
            f"{rows}x{self.columns}" if rows else f"n={self.size}",
            self.dtype if self.op in ("decode", "decode_linear") else "",
            f"rotation={self.rotation}" if self.rotation > 1 else "",
            "digest" if self.digest else "",
            "sample" if self.selection == "sample" else "",
            f"batch={self.batch}" if self.op == "decode_linear" else "",
        ) if part)  # fmt: skip


def _decodes() -> list[Problem]:
    codes = [(12, 2, 1), (12, 4, 2), (12, 1, 1), (12, 4, 1), (10, 2, 1)]
    kinds = [(dtype, rotation) for dtype in ("float32", "bfloat16") for rotation in (1, 128)]
    size, columns = 1 << 27, 8192
    wanted = [Problem("decode", size, code, columns, *kind, target=0.6) for code in codes for kind in kinds]
    more: dict[str, Any] = dict(columns=columns, dtype="bfloat16")
    digests = [Problem("decode", size, rotation=r, digest=True, **more) for r in (1, 128)]
    longer = [Problem("decode", size, code, rotation=128, **more) for code in ((14, 2, 1), (16, 2, 1))]
    philox = [Problem("decode", 1 << 26, code, **more, optional=True) for code in ((20, 2, 1), (20, 20, 8))]
    sizes = [Problem("decode", n, optional=True, **more) for n in (1 << 22, 1 << 24, 1 << 29)]
    return wanted + digests + longer + philox + sizes


def _selects() -> list[Problem]:
    main = [Problem("select", 1 << 16, (20, 20, 32), selection=s, target=0.4) for s in ("best", "sample")]
    shorter = [Problem("select", 1 << 16, (bits, bits, 32)) for bits in (12, 16)]
    return main + shorter + [Problem("select", 1 << 20, (16, 16, 8), optional=True)]


def _slides() -> list[Problem]:
    main = Problem("slide", 1 << 27, target=1.0)
    others = [((10, 2, 1), 27), ((14, 2, 1), 24), ((12, 4, 2), 25), ((12, 1, 1), 26), ((16, 2, 1), 22)]
    rest = [Problem("slide", 1 << bits, code, optional=bits == 22) for code, bits in others]
    return [main, *rest, Problem("slide", 1 << 24, selection="sample")]


def _reparameterizations() -> list[Problem]:
    found = []
    for op in ("reparameterize", "reparameterize_mean_kl"):
        for stage in ("forward", "backward"):
            found.append(Problem(op, 1 << 26, stage=stage, target=1.3, limit=True))
        found.append(Problem(op, 1 << 26, stage="step", target=3.0))
        found.append(Problem(op, 1 << 22, stage="step", optional=True))
    return found


def _linears() -> list[Problem]:
    square: dict[str, Any] = dict(columns=8192, dtype="bfloat16", rotation=128)
    codes = ((12, 2, 1), (12, 4, 2), (12, 8, 4))
    one = [Problem("decode_linear", 1 << 26, code, target=2.0, **square) for code in codes]
    more = [Problem("decode_linear", 1 << 26, batch=n, **square) for n in (4, 16, 64)]
    more += [
        Problem("decode_linear", 1 << 26, (12, 8, 4), batch=n, optional=True, **square) for n in (16, 64)
    ]
    wide: dict[str, Any] = dict(square, columns=14336)
    more += [Problem("decode_linear", 4096 * 14336, code, **wide) for code in codes[:2]]
    return one + more


PROBLEMS: list[Problem] = [
    Problem("codebook", 1 << 24, (24, 24, 32), target=0.5),
    Problem("codebook", 1 << 26, (24, 24, 8), target=0.5),
    Problem("codebook", 1 << 24, (24, 24, 1)),
    Problem("codebook", 1 << 16, (16, 16, 1), optional=True),
    *_decodes(),
    *_selects(),
    *_slides(),
    *_reparameterizations(),
    *_linears(),
]


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


def reported(variant: str, kernel: str) -> dict[str, Any]:
    """What the ahead-of-time report says of a kernel on sm_90; empty where it says nothing."""
    variants = json.loads(RESOURCES.read_text())["variants"] if RESOURCES.exists() else {}
    return variants.get(variant, {}).get("sm_90", {}).get(kernel, {})


def straight_instructions(variant: str, kernel: str, tile: int, otherwise: float) -> float:
    """Instructions per element of a kernel without loops: those of a thread over a thread's elements."""
    used = reported(variant, kernel)
    return used["instructions"] * 32 * used["num_warps"] / tile if "instructions" in used else otherwise


def codebook_integer(n_states: int, step_weights: int) -> float:
    """Integer instructions that candidates need, whatever the kernel: Philox, halves and addresses."""
    return n_states * (-(-step_weights // 8) * PHILOX_INTEGER + step_weights * HALF_INTEGER)


def _codebook(problem: Problem) -> Work:
    n, v = problem.size, problem.code[2]
    integer, halves = codebook_integer(n, v), 8 * -(-v // 8) * n  # the kernel reads all eight of a group
    return Work(4 * n, 2 * n * v, integer, 1.2 * integer, l1_gathers=halves)


def _decode(problem: Problem) -> Work:
    (bits, step_bits, v), n = problem.code, problem.size
    read, written = n * step_bits / v / 8, n * (4 if problem.dtype == "float32" else 2)
    if bits > 16:
        integer = n * (PHILOX_INTEGER + HALF_INTEGER)
        return Work(read, written, integer, n * GENERAL_INSTRUCTIONS, l1_gathers=n)
    rotated, shared = problem.rotation > 1, v << bits <= 8192
    each = DECODE_INSTRUCTIONS + rotated * ROTATION_INSTRUCTIONS + problem.digest * DIGEST_INSTRUCTIONS
    integer = n * (DECODE_INTEGER + 0.9 * problem.digest * DIGEST_INSTRUCTIONS)
    gathers = {"shared_gathers" if shared else "l1_gathers": n / v}
    return Work(read, written, integer, n * each, shuffles=n * rotated * ROTATION_SHUFFLES, **gathers)


def _select(problem: Problem) -> Work:
    bits, _, v = problem.code
    width = max(16, 1 << (v - 1).bit_length())
    scores = problem.size << bits
    drawn = -(-problem.size // SELECT_TILE_BLOCKS) * (width << bits)  # candidates, again for every tile
    integer = drawn / 8 * (PHILOX_INTEGER + 8 * HALF_INTEGER)
    return Work(
        8 * v * problem.size, 16 * problem.size, integer, scores * SELECT_INSTRUCTIONS + integer,
        special=scores, flops=4.0 * v * scores, l1_gathers=drawn,
    )  # fmt: skip


def _slide(problem: Problem) -> Work:
    bits, step_bits, v = problem.code
    steps = problem.size / v * (1 + SLIDE_MARGIN * bits / step_bits)
    states, nodes = steps * 2**bits, steps * 2 ** (bits - step_bits)
    sample = problem.selection == "sample"  # Gumbel noise: a Philox call and two logarithms per state
    each = SLIDE_INSTRUCTIONS + (v - 1) * 6 + sample * (PHILOX_INTEGER + 20)
    return Work(
        4 * problem.size, nodes, states * 2, states * each, special=states * 3 * sample,
        l1_reads=states * (SLIDE_READS + v - 1), l2_written=5 * nodes,
    )  # fmt: skip


def _reparameterize(problem: Problem) -> Work:
    mean_kl, n = problem.op.endswith("mean_kl"), problem.size
    variant = f"{problem.op}[{'block_weights=8,' * mean_kl}float32]"
    forward = straight_instructions(variant, f"{problem.op}_kernel", 1024, 111 if mean_kl else 67)
    backward = straight_instructions(variant, f"{problem.op}_backward_kernel", 1024, 165 if mean_kl else 76)
    passes = {"forward": [(8, 4, forward)], "backward": [(12, 8, backward)]}
    passes["step"] = passes["forward"] + passes["backward"]
    read, written, each = (n * sum(column) for column in zip(*passes[problem.stage], strict=True))
    drawn = n * len(passes[problem.stage])
    integer = drawn / 8 * (PHILOX_INTEGER + 8 * HALF_INTEGER)
    return Work(read, written, integer, each, special=drawn * (5 if mean_kl else 2), l1_gathers=drawn)


def _linear(problem: Problem) -> Work:
    (bits, step_bits, v), n = problem.code, problem.size
    rows = n // problem.columns
    read = n * step_bits / v / 8 + 2 * rows + 2 * problem.batch * problem.columns + 2 * (v << bits)
    several = problem.batch > 1
    gathers = {"shared_gathers" if 2 * v << bits <= 32768 else "l1_gathers": n if several else n / v}
    instructions = n * (MATRIX_INSTRUCTIONS if several else VECTOR_INSTRUCTIONS[v])
    flops = 2.0 * problem.batch * n if several else 0
    return Work(read, 2 * problem.batch * rows, n * 4, instructions, flops=flops, **gathers)


_WORK = {
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
