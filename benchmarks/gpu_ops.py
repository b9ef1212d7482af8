"""How the GPU benchmark sets up, times and verifies each problem of gpu_problems.PROBLEMS."""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from floors import Chip, codebook_integer, met, ratio, work, yardstick
from gpu_problems import Problem
from gpu_timing import Call, Timing, device_ms, peak_bytes, time_both, time_calls
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels" / "torch-ext"))

from miracle_kernels import codebook, decode, decode_linear, select, slide
from miracle_kernels.checks import message_bytes
from miracle_kernels.codebook import codebook_torch, codebook_triton
from miracle_kernels.decode import decode_torch, decode_triton
from miracle_kernels.decode_linear import decode_linear_torch, decode_linear_triton
from miracle_kernels.draws import noise_torch
from miracle_kernels.reparameterize import (
    reparameterize,
    reparameterize_backward_triton,
    reparameterize_triton,
)
from miracle_kernels.reparameterize_mean_kl import (
    reparameterize_mean_kl,
    reparameterize_mean_kl_backward_triton,
    reparameterize_mean_kl_triton,
)
from miracle_kernels.select import select_torch, select_triton
from miracle_kernels.slide import slide_triton

ROOT = Path(__file__).resolve().parents[1]
SEED, STREAM_ID = 2**40 + 5, 9
BLOCK_KL_NATS, BLOCK_WEIGHTS = 11.0, 8
# Together, the buffers that a problem rotates among are at least this large: several times an L2 of 60 MB.
ROTATED_BYTES = 1 << 29
MAX_COPIES = 16
# Of a unit Gaussian source under squared error at 2 bits: 1.05·√(1 - 2⁻⁴), as coding/scales.py chooses it.
PRIOR_SCALE = 1.05 * math.sqrt(1 - 4.0**-2)
LARGEST_DISTORTION = 0.0745  # mean squared error at 2 bits, L = 12, after a scale fit
SELECT_BYTES_PER_BLOCK = 8192  # a row of all scores at L = 20 would take 4 MiB


@dataclass
class Prepared:
    """A problem in memory.

    Args:
        calls: the kernel on each set of buffers.
        registered: the same through the torch op, timed as plain launches.
        baseline: what the target compares with.
        verify: raises where a result is wrong; returns what else it learned. It runs after the timing.
        peak_limit: bytes that one call may allocate, its results included.
    """

    calls: list[Call]
    registered: list[Call] = field(default_factory=list)
    baseline: list[Call] = field(default_factory=list)
    verify: Callable[[], dict[str, Any]] = dict
    peak_limit: int | None = None
    graph: bool = True


@dataclass
class Measurement:
    """One problem's result; `ms` is the replayed time where there is one, else the plain one."""

    op: str
    problem: str
    size: int
    ms: float
    plain: Timing
    graph: Timing | None
    floor: str
    floor_ms: float
    ratio: float
    target: float | None
    met: bool | None
    tuned: bool
    details: dict[str, Any]


def load_quantiles(device: torch.device) -> Tensor:
    """The quantile table, read as a file: the package need not be installed."""
    data = (ROOT / "miracle_hub" / "coding" / "quantiles.f16").read_bytes()
    return torch.frombuffer(bytearray(data), dtype=torch.float16).to(device)


def code_table(code: tuple[int, int, int], device: torch.device) -> Tensor:
    """Candidates up to L = 16, else the quantiles."""
    quantiles = load_quantiles(device)
    if code[0] > 16:
        return quantiles
    return codebook_torch(torch.arange(1 << code[0], device=device), quantiles, code[2], SEED, STREAM_ID)


def random_message(code: tuple[int, int, int], n_weights: int, device: torch.device) -> Tensor:
    """Random bytes of the right number."""
    return torch.randint(256, (message_bytes(n_weights, *code),), dtype=torch.uint8, device=device)


def random_scales(rows: int, device: torch.device) -> Tensor:
    """bfloat16 scales of several magnitudes."""
    return torch.randn(rows, device=device).exp2().bfloat16()


def n_copies(n_bytes: float) -> int:
    """Sets of buffers that keep the L2 from holding all of them."""
    return max(1, min(MAX_COPIES, math.ceil(ROTATED_BYTES / max(n_bytes, 1))))


def require(holds: bool, message: str) -> None:
    """Raise unless a check holds.

    Raises:
        AssertionError: it does not.
    """
    if not holds:
        raise AssertionError(message)


def relative(found: Tensor, expected: Tensor) -> float:
    """‖found - expected‖ / ‖expected‖, in float64; NaN where either is."""
    found, expected = found.double(), expected.double()
    error = (found - expected).norm()
    return float(error / expected.norm()) if error != 0 else 0.0


def _codebook(problem: Problem, device: torch.device) -> Prepared:
    n, v = problem.size, problem.code[2]
    quantiles = load_quantiles(device)
    sets = [
        (torch.randint(1 << 24, (n,), dtype=torch.int32, device=device), quantiles, v, SEED, STREAM_ID)
        for _ in range(n_copies(n * (4 + 2 * v)))
    ]

    def verify() -> dict[str, Any]:
        states, *rest = sets[0]
        found = codebook_triton(*sets[0])[-4099:]
        require(torch.equal(found, codebook_torch(states[-4099:], *rest)), "the last candidates differ")  # pyright: ignore
        return {}

    calls: list[Call] = [lambda s=s: codebook_triton(*s) for s in sets]
    return Prepared(calls, [lambda s=s: codebook(*s) for s in sets], verify=verify)


def _decode(problem: Problem, device: torch.device) -> Prepared:
    n, columns, code = problem.size, problem.columns, problem.code
    rows, dtype = n // columns, getattr(torch, problem.dtype)
    table = code_table(code, device)

    def arguments() -> tuple:
        out = torch.full((rows, columns), torch.nan, dtype=dtype, device=device)
        scales, message = random_scales(rows, device), random_message(code, n, device)
        stream = (rows, 0, *code, SEED, STREAM_ID, problem.rotation, 0, 0, problem.digest)
        return out, message, table, scales, None, *stream

    sets = [arguments() for _ in range(n_copies(work(problem).written))]

    def verify() -> dict[str, Any]:
        out, message, table, scales, *_ = sets[0]
        out.fill_(torch.nan)
        digest = decode_triton(*sets[0])
        require(not bool(out.isnan().any()), "some weights were not written")
        stream = (*code, SEED, STREAM_ID, problem.rotation, 0, 0, problem.digest)
        for first in (0, max(0, rows - 3)):
            expected = torch.empty_like(out[first : first + 3])
            decode_torch(expected, message, table, scales, None, rows, first, *stream)
            require(torch.equal(out[first : first + 3], expected), f"rows from {first} on differ")
        return {"digest": int(digest)}

    return Prepared(
        [lambda s=s: decode_triton(*s) for s in sets], [lambda s=s: decode(*s) for s in sets], verify=verify
    )


def _select(problem: Problem, device: torch.device) -> Prepared:
    n, (bits, _, v) = problem.size, problem.code
    # Posteriors of a twentieth to a half of the prior's variance.
    variance = 0.05 + 0.45 * torch.rand(n, v, device=device)
    quadratic, linear = 1 / variance - 1, 2 * torch.randn(n, v, device=device) / variance
    quantiles = load_quantiles(device)
    code = (bits, SEED, STREAM_ID, problem.selection, 7)

    def verify() -> dict[str, Any]:
        some = slice(n - min(64, n), n)
        _, weights, sums = (part[some] for part in select_triton(quadratic, linear, quantiles, *code))
        best = (*code[:3], "best", 7)
        _, top, expected = select_torch(quadratic[some], linear[some], quantiles, *best)
        z = codebook_torch(
            torch.arange(1 << min(bits, 12), device=device), quantiles, v, SEED, STREAM_ID
        ).float()
        terms = 0.5 * quadratic[some].abs() @ (z * z).T + 0.5 * linear[some].abs() @ z.abs().T
        largest = 1.5 * terms.amax(1)  # over all candidates, guessed from the first 4,096
        bound = 2**-9 * largest
        require(bool(((sums - expected).abs() <= bound).all()), "a log-sum-exp is out of bounds")
        if problem.selection == "best":
            require(bool((weights >= top - bound).all()), "a choice is not the best")
        return {"largest_log_sum_error_of_bound": float(((sums - expected).abs() / bound).max())}

    call = lambda: select_triton(quadratic, linear, quantiles, *code)  # noqa: E731
    op = lambda: select(quadratic, linear, quantiles, *code)  # noqa: E731
    return Prepared([call], [op], verify=verify, peak_limit=SELECT_BYTES_PER_BLOCK * n)


def _slide(problem: Problem, device: torch.device) -> Prepared:
    n, code = problem.size, problem.code
    source = torch.randn(n, device=device)
    table = code_table(code, device)
    quadratic, linear = torch.ones(1, device=device), 2 / PRIOR_SCALE * source
    if problem.selection == "sample":  # a posterior of a tenth of the prior's variance
        quadratic, linear = torch.full((n,), 9.0, device=device), 20 / PRIOR_SCALE * source
    arguments = (quadratic, linear, table, *code, problem.selection, 7)

    def verify() -> dict[str, Any]:
        message, cost = slide_triton(*arguments)
        z = torch.empty(1, n, device=device)
        one, stream = torch.ones(1, device=device).bfloat16(), (1, 0, *code, SEED, STREAM_ID, 1, 0, 0, False)
        decode_triton(z, message, table, one, None, *stream)
        z = z[0]
        expected = (z * (quadratic * z - linear)).sum(dtype=torch.float64)
        require(abs(float(cost / expected) - 1) < 1e-5, f"cost {float(cost)}, decoded {float(expected)}")
        fit = (source * z).sum(dtype=torch.float64) ** 2 / z.square().sum(dtype=torch.float64)
        distortion = float((source.square().sum(dtype=torch.float64) - fit) / n)
        if problem.target and n >= 1 << 20:
            require(distortion <= LARGEST_DISTORTION, f"distortion {distortion}, over {LARGEST_DISTORTION}")
        return {"distortion_after_scale_fit": distortion, "prior_scale": PRIOR_SCALE}

    op = lambda: slide(*arguments)  # noqa: E731
    return Prepared([lambda: slide_triton(*arguments)], [op], verify=verify, graph=False)


def _plain_step(one: Tensor, two: Tensor, log_scale: Tensor, grads: tuple[Tensor, Tensor]) -> Call:
    def step() -> Any:
        m, log_v = one / log_scale.exp(), 2 * (two - log_scale)
        w = one + two.exp() * torch.randn_like(one)
        kl_nats = 0.5 * (m**2 + log_v.exp() - 1 - log_v).sum()
        return torch.autograd.grad((w, kl_nats), (one, two, log_scale), grads)

    return step


def _reparameterize(problem: Problem, device: torch.device) -> Prepared:
    n, mean_kl = problem.size, problem.op.endswith("mean_kl")
    one, two = 0.05 * torch.randn(n, device=device), torch.randn(n, device=device) / 4 - 4
    log_scale, quantiles = torch.tensor(-3.0, device=device), load_quantiles(device)
    grad_w, grad_kl = torch.randn(n, device=device), torch.tensor(0.7, device=device)
    told: Any = (BLOCK_KL_NATS, BLOCK_WEIGHTS, SEED, STREAM_ID) if mean_kl else (SEED, STREAM_ID)
    forward, op = (
        (reparameterize_mean_kl_triton, reparameterize_mean_kl)
        if mean_kl
        else (reparameterize_triton, reparameterize)
    )
    first: Any = (one, two, quantiles, log_scale, None, *told, torch.float32)
    if problem.stage == "forward":
        verify = (lambda: {}) if mean_kl else (lambda: _verify_drawn(first))
        return Prepared([lambda: forward(*first)], verify=verify, peak_limit=int(4.05 * n))
    if problem.stage == "backward":
        if mean_kl:
            call = lambda: reparameterize_mean_kl_backward_triton(  # noqa: E731
                grad_w, one, two, quantiles, log_scale, *told
            )
        else:
            call = lambda: reparameterize_backward_triton(grad_w, grad_kl, *first[:-1])  # noqa: E731
        return Prepared([call], peak_limit=int(8.1 * n))
    leaves = tuple(t.requires_grad_() for t in (one, two, log_scale))

    def step() -> Any:
        return torch.autograd.grad(op(*first), leaves, (grad_w,) if mean_kl else (grad_w, grad_kl))

    return Prepared([step], baseline=[_plain_step(one, two, log_scale, (grad_w, grad_kl))], graph=False)


def _verify_drawn(arguments: Any) -> dict[str, Any]:
    mean, log_std, quantiles = arguments[:3]
    n = min(1 << 16, mean.numel())
    w, _ = reparameterize_triton(*arguments)
    eps = noise_torch(slice(0, n), quantiles, SEED, STREAM_ID)
    error = relative(w[:n], mean[:n].double() + log_std[:n].double().exp() * eps)
    require(error < 1e-5, f"the drawn weights are off by {error}")
    return {"relative_error": error}


def _linear(problem: Problem, device: torch.device) -> Prepared:
    columns, code, dtype = problem.columns, problem.code, getattr(torch, problem.dtype)
    rows = problem.size // columns
    x = torch.randn(problem.batch, columns, device=device).to(dtype)
    table, scales = code_table(code, device), random_scales(rows, device)
    stream = (rows, *code, SEED, STREAM_ID, problem.rotation, 0)
    copies = n_copies(work(problem).read)
    sets = [(x, random_message(code, problem.size, device), table, scales, *stream) for _ in range(copies)]
    # Weights of a plausible size; their rotation does not matter to the baseline.
    shape, copies = (rows, columns), max(2, n_copies(2 * problem.size))
    weights = [(torch.randn(shape, device=device) / columns**0.5).to(dtype) for _ in range(copies)]

    def verify() -> dict[str, Any]:
        found, expected = decode_linear_triton(*sets[-1]), decode_linear_torch(*sets[-1])
        error = relative(found, expected)
        require(error <= 2.0**-8, f"the product is off by {error}")
        return {"relative_error": error}

    return Prepared(
        [lambda s=s: decode_linear_triton(*s) for s in sets],
        [lambda s=s: decode_linear(*s) for s in sets],
        [lambda w=w: torch.nn.functional.linear(x, w) for w in weights],
        verify,
    )


PREPARE: dict[str, Callable[[Problem, torch.device], Prepared]] = {
    "codebook": _codebook, "decode": _decode, "select": _select, "slide": _slide, "decode_linear": _linear,
    "reparameterize": _reparameterize, "reparameterize_mean_kl": _reparameterize,
}  # fmt: skip


def small(problem: Problem) -> Problem:
    """A problem that compiles the same kernels in less memory and time."""
    least = {"decode": 64 * problem.columns, "slide": 1 << 18, "codebook": 1 << 16, "reparameterize": 1 << 20}
    return replace(problem, size=min(problem.size, least.get(problem.op.removesuffix("_mean_kl"), 1 << 62)))


def _details(problem: Problem, ms: float, chip: Chip) -> dict[str, Any]:
    done, seconds = work(problem), ms / 1e3
    if problem.op == "slide":
        rate = problem.size / seconds
        return {"weights_per_second": rate, "seconds_for_7e9_weights": 7e9 / rate}
    if problem.op == "select":
        return {"flops_per_second": done.flops / seconds, "scores_per_second": done.special / seconds}
    moved = (done.read + done.written) / seconds
    found = {"bytes_per_second": moved, "share_of_copy_bandwidth": moved / chip.copy_bytes}
    if problem.op == "codebook":
        lanes = chip.processors * chip.clock_hz * chip.integer_lanes
        # Products and logic have a pipe each: if both ran all the time, the floor would be about half.
        found["two_pipe_ratio"] = codebook_integer(problem.size, problem.code[2]) / 2 / lanes / seconds
    return found


def measure(problem: Problem, chip: Chip, device: torch.device, tuned: bool = False) -> Measurement:
    """Time, ratio to the floor or the baseline, peak memory, and whether the timed result was right."""
    prepared = PREPARE[problem.op](problem, device)
    plain, graph = time_both(prepared.calls, device, prepared.graph)
    ms = graph.median_ms if graph else plain.median_ms
    details = _details(problem, ms, chip)
    if prepared.registered and graph:
        details["registered_op_ms"] = time_calls(prepared.registered, device).median_ms
    baseline = None
    if prepared.baseline:
        details["baseline_plain_ms"] = time_calls(prepared.baseline, device).median_ms
        details["baseline_ms"] = device_ms(prepared.baseline, device, prepared.graph)
        baseline = details["baseline_ms"] / 1e3
    details["peak_bytes"] = peak_bytes(prepared.calls[0], device)
    what, floor_seconds = yardstick(problem, chip)
    reached = ratio(problem, ms / 1e3, floor_seconds, baseline)
    good = met(problem, reached)
    if prepared.peak_limit is not None and problem.target is not None:
        details["peak_limit_bytes"] = prepared.peak_limit
        good = bool(good) and details["peak_bytes"] <= prepared.peak_limit + (1 << 20)
    try:
        details |= prepared.verify()
    except AssertionError as error:
        details["wrong"], good = str(error), False
    return Measurement(
        problem.op, problem.label, problem.size, ms, plain, graph, what, 1e3 * floor_seconds, reached,
        problem.target, good, tuned, details,
    )  # fmt: skip
