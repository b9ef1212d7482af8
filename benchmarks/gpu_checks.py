"""Every op against its torch reference, at odd sizes, on random inputs, in memory poisoned with NaN."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from gpu_ops import (
    BLOCK_KL_NATS,
    SEED,
    STREAM_ID,
    code_table,
    load_quantiles,
    random_message,
    random_scales,
    relative,
    require,
)
from torch import Tensor

from miracle_kernels import codebook, decode, decode_linear, select, slide
from miracle_kernels.codebook import codebook_torch, codebook_triton
from miracle_kernels.decode import decode_torch, decode_triton
from miracle_kernels.decode_linear import decode_linear_triton
from miracle_kernels.reparameterize import (
    reparameterize,
    reparameterize_backward_torch,
    reparameterize_torch,
    reparameterize_triton,
)
from miracle_kernels.reparameterize_mean_kl import (
    reparameterize_mean_kl,
    reparameterize_mean_kl_backward_torch,
    reparameterize_mean_kl_torch,
    reparameterize_mean_kl_triton,
)
from miracle_kernels.select import select_triton
from miracle_kernels.slide import slide_torch, slide_triton

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Largest relative error that is allowed of float32 arithmetic, and of a rounded output.
CLOSE = {torch.float32: 1e-5, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}
# Products of decode_linear: sums in float32, inputs rounded to float16.
PRODUCT_CLOSE = {torch.float32: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}


@dataclass(frozen=True)
class Check:
    """One comparison; `run` raises where it fails and returns what it measured."""

    op: str
    name: str
    run: Callable[[torch.device], dict[str, Any]]


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """`torch.empty` gives NaN, or the largest integer, so that an element nobody wrote shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            yield
    finally:
        torch.use_deterministic_algorithms(before)


def check_codebook(device: torch.device, n: int, step_weights: int, dtype: torch.dtype) -> dict[str, Any]:
    """Bit for bit."""
    states = torch.randint(1 << 24, (n,), device=device).to(dtype)
    arguments = (states, load_quantiles(device), step_weights, SEED, 2**31 + 9)
    expected = codebook_torch(*arguments)
    require(torch.equal(codebook_triton(*arguments), expected), "the kernel's candidates differ")
    require(torch.equal(codebook(*arguments), expected), "the op's candidates differ")
    return {}


def check_decode(
    device: torch.device, code: tuple[int, int, int], rows: int, columns: int, rotation: int = 1,
    band: int = 0, first_row: int = 0, has_mean: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Bit for bit in three dtypes, and the digest."""
    total = rows + first_row
    message, scales = random_message(code, total * columns, device), random_scales(total, device)
    mean = torch.randn(rows, columns, device=device) if has_mean else None
    given: Any = (message, code_table(code, device), scales, mean, total, first_row, *code, SEED, STREAM_ID)
    given = (*given, rotation, band, 5, True)
    for dtype in DTYPES:
        expected = torch.empty(rows, columns, dtype=dtype, device=device)
        digest = decode_torch(expected, *given)
        for function in (decode_triton, decode):
            out = torch.full_like(expected, torch.nan)
            found = function(out, *given)
            require(torch.equal(out, expected), f"the weights differ in {dtype}")
            require(int(found) == int(digest), f"the digest differs in {dtype}")
    return {}


def check_select(
    device: torch.device, bits: int, step_weights: int, n: int, selection: str
) -> dict[str, Any]:
    """The log-sum-exp and the choice within 2⁻⁹ of the largest sum of terms; samples by their mean score."""
    quadratic = torch.randn(1, step_weights, device=device).exp().expand(n, -1).contiguous()
    linear = torch.randn(1 if selection == "sample" else n, step_weights, device=device)
    linear = linear.expand(n, -1).contiguous()
    quantiles = load_quantiles(device)
    states = torch.arange(1 << bits, device=device)
    z = codebook_torch(states, quantiles, step_weights, SEED, STREAM_ID).double()
    a, b = 0.5 * quadratic.double(), 0.5 * linear.double()
    scores = b @ z.T - a @ (z * z).T
    bound = 2**-9 * (b.abs() @ z.abs().T + a.abs() @ (z * z).T).amax(1)
    for function in (select_triton, select):
        index, weights, sums = function(quadratic, linear, quantiles, bits, SEED, STREAM_ID, selection, 3)
        require(bool((index >= 0).all()) and bool((index < 1 << bits).all()), "an index is no candidate")
        chosen = scores.gather(1, index[:, None])[:, 0]
        require(bool(((sums - scores.logsumexp(1)).abs() <= bound).all()), "a log-sum-exp is out of bounds")
        require(bool(((weights - chosen).abs() <= 1e-5 * 2**9 * bound).all()), "a log weight is wrong")
        if selection == "best":
            require(bool((chosen >= scores.amax(1) - bound).all()), "a choice is not the best")
        else:
            check_sample(scores[0], chosen, float(bound[0]))
    return {}


def check_sample(scores: Tensor, chosen: Tensor, bound: float) -> None:
    """The chosen scores' mean lies within six standard errors of its expectation (and the stated bound)."""
    p = scores.softmax(0)
    mean = float((p * scores).sum())
    error = float((p * (scores - mean).square()).sum().sqrt()) / chosen.numel() ** 0.5
    found = float(chosen.mean())
    require(abs(found - mean) <= 6 * error + 2 * bound, f"samples score {found}, expected {mean}")


def check_slide(
    device: torch.device, code: tuple[int, int, int], n: int, selection: str, per_weight: bool
) -> dict[str, Any]:
    """The message decodes to the cost that is returned; "best" costs within 0.1 % of an undivided search."""
    # Not below 0, and 1 on average: the error's unit is then the prior's variance.
    quadratic = torch.rand(n, device=device) + 0.5 if per_weight else torch.ones(1, device=device)
    target = torch.randn(n, device=device)
    linear, table = 2 * quadratic * target, code_table(code, device)
    given = (quadratic, linear, table, *code, selection, 3)
    floor = float((quadratic * target**2).sum(dtype=torch.float64))  # cost + floor is a weighted error
    best = float(slide_torch(*given[:-2], "best", 3)[1]) + floor
    excess = 0.0
    for function in (slide_triton, slide):
        message, cost = function(*given)
        z = torch.empty(1, n, device=device)
        one = torch.ones(1, device=device).bfloat16()
        decode_torch(z, message, table, one, None, 1, 0, *code, SEED, STREAM_ID, 1, 0, 0, False)
        decoded = float((z[0] * (quadratic * z[0] - linear)).sum(dtype=torch.float64)) + floor
        require(abs(float(cost) + floor - decoded) <= 1e-5 * floor, "the cost is not what is decoded")
        excess = decoded / best - 1
        require(excess >= -1e-4, "the cost is below the least possible")
        require(
            selection == "sample" or excess <= 1e-3, f"the error is {excess:.2%} above the least possible"
        )
    return {"excess_over_undivided_search": excess}


def close(found: tuple[Tensor, ...], expected: tuple[Tensor, ...], dtype: torch.dtype) -> float:
    """Raise unless all tensors agree; the largest relative error."""
    error = 0.0
    for one, other in zip(found, expected, strict=True):
        error = max(error, relative(one, other)) if not bool(one.isnan().any()) else float("nan")
        require(error <= CLOSE[dtype], f"relative error {error}")
    return error


def check_reparameterize(
    device: torch.device, n: int, dtype: torch.dtype, has_prior: bool, block_weights: int = 0
) -> dict[str, Any]:
    """Weights, KL and gradients against float64; block_weights > 0 is Mean-KL."""
    one, two = 0.05 * torch.randn(n, device=device), torch.randn(n, device=device) / 4 - 2
    log_scale = torch.tensor(-1.0, device=device)
    prior = torch.randn(n, device=device).to(dtype) if has_prior else None
    told = (BLOCK_KL_NATS, block_weights) if block_weights else ()
    given: Any = (one, two, load_quantiles(device), log_scale, prior, *told, SEED, STREAM_ID)
    grad_w, grad_kl = torch.randn(n, device=device).to(dtype), torch.tensor(0.7, device=device)
    functions: Any = (reparameterize_triton, reparameterize_torch, reparameterize)
    if block_weights:
        functions = (reparameterize_mean_kl_triton, reparameterize_mean_kl_torch, reparameterize_mean_kl)
        code: Any = (*given[:4], *given[5:])
        expected = reparameterize_mean_kl_backward_torch(grad_w, *code)
    else:
        expected = reparameterize_backward_torch(grad_w, grad_kl, *given)
    kernel, reference, op = functions
    single = lambda out: out if isinstance(out, tuple) else (out,)  # noqa: E731
    error = close(single(kernel(*given, dtype)), single(reference(*given, dtype)), dtype)
    leaves = [tensor.requires_grad_() for tensor in (one, two, log_scale)]
    drawn = single(op(*given, dtype))
    found = torch.autograd.grad(drawn, leaves, (grad_w, grad_kl)[: len(drawn)])
    return {"relative_error": max(error, close(found, expected, torch.float32))}


def check_decode_linear(
    device: torch.device, code: tuple[int, int, int], batch: int, rows: int, columns: int, rotation: int,
    dtype: torch.dtype,
) -> dict[str, Any]:  # fmt: skip
    """Against the float64 product with the decoded weights."""
    x = torch.randn(batch, columns, device=device).to(dtype)
    message, scales = random_message(code, rows * columns, device), random_scales(rows, device)
    table, weights = code_table(code, device), torch.empty(rows, columns, device=device)
    coded: Any = (*code, SEED, STREAM_ID, rotation, 0)
    stream: Any = (rows, 0, *coded, 0, False)
    decode_torch(weights, message, table, scales, None, *stream)
    expected, error = x.double() @ weights.double().T, 0.0
    for function in (decode_linear_triton, decode_linear):
        found = function(x, message, table, scales, rows, *coded)
        require(found.dtype == dtype and found.shape == expected.shape, "the output has another form")
        require(not bool(found.isnan().any()), "some outputs were not written")
        error = max(error, relative(found, expected))
        require(error <= PRODUCT_CLOSE[dtype], f"relative error {error}")
    return {"relative_error": error}


def checks(device: torch.device) -> list[Check]:
    """All of them; short ones where the kernels are interpreted."""
    tiny = device.type != "cuda"
    n, steps, blocks = (63, 9, 20) if tiny else (4099, 3001, 20_001)
    f32, bf16, f16 = DTYPES
    listed: list[tuple[str, Callable, tuple]] = [
        *(("codebook", check_codebook, (n, v, torch.int64)) for v in (1, 32)),
        ("codebook", check_codebook, (n, 9, torch.int32)),
        ("decode", check_decode, ((12, 2, 1), 7, 1536)), ("decode", check_decode, ((12, 4, 2), 5, 384, 128)),
        ("decode", check_decode, ((10, 2, 1), 9, 63, 1, 40)), ("decode", check_decode, ((13, 5, 2), 3, 1311)),
        ("decode", check_decode, ((12, 2, 1), 3, 512, 128, 0, 2, True)),
        ("decode", check_decode, ((20, 20, 8), 7, 61)), ("decode", check_decode, ((18, 3, 1), 3, 256, 32)),
        *(("select", check_select, (bits, v, 77, "best")) for bits, v in ((5, 5), (10, 32))),
        *(("select", check_select, (bits, v, blocks, "sample")) for bits, v in ((5, 5), (9, 32))),
        *(("slide", check_slide, (code, steps, "best", code[1] > 1))
          for code in ((8, 2, 1), (12, 2, 1), (12, 4, 2), (10, 1, 1))),
        ("slide", check_slide, ((12, 2, 1), steps, "sample", True)),
        ("reparameterize", check_reparameterize, (n, f32, False)),
        *(("reparameterize", check_reparameterize, (n, dtype, True)) for dtype in (bf16, f16)),
        ("reparameterize_mean_kl", check_reparameterize, (n, f32, False, 8)),
        ("reparameterize_mean_kl", check_reparameterize, (n, bf16, True, 20)),
        ("decode_linear", check_decode_linear, ((12, 2, 1), 1, 33, 192, 64, bf16)),
        ("decode_linear", check_decode_linear, ((12, 4, 2), 5, 33, 192, 64, f32)),
        ("decode_linear", check_decode_linear, ((9, 3, 1), 1, 13, 131, 1, f32)),
        ("decode_linear", check_decode_linear, ((12, 8, 4), 64, 65, 256, 128, f16)),
        ("decode_linear", check_decode_linear, ((11, 5, 3), 16, 20, 63, 1, bf16)),
    ]  # fmt: skip
    return [
        Check(op, f"{op} {arguments}", partial(with_seed, run, arguments)) for op, run, arguments in listed
    ]


def with_seed(run: Callable, arguments: tuple, device: torch.device) -> dict[str, Any]:
    """The same random inputs on every run."""
    torch.manual_seed(11)
    return run(device, *arguments)


def run_check(check: Check, device: torch.device) -> dict[str, Any]:
    """What came of a check; an error of any kind is a failure, and is named."""
    try:
        with poisoned_memory():
            found = check.run(device)
            if device.type == "cuda":
                torch.cuda.synchronize()
    except Exception as error:  # a compiler's, a launch's or a comparison's
        text = f"{type(error).__name__}: {error}"
        return {"op": check.op, "check": check.name, "passed": False, "error": text[:600]}
    return {"op": check.op, "check": check.name, "passed": True, **found}
