"""The op calls whose launches are compiled ahead of time, and the GPUs they are compiled for.

A variant is a call, not a list of types: what the op would launch (dtypes, alignment, tile sizes, warps)
is what kernels/compile.py compiles, so the report cannot drift from what ships. To add one, append

    Variant("op[what=varies]", lambda: op_triton(a_tensor, another, 5)),

with tensors on the CPU, as small as the choice of tile sizes allows. Give a tensor that may start
anywhere in memory (message bytes) an odd address: `unaligned(...)`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from miracle_kernels.checks import message_bytes
from miracle_kernels.codebook import codebook_triton
from miracle_kernels.decode import decode_triton
from miracle_kernels.decode_linear import decode_linear_triton
from miracle_kernels.reparameterize import reparameterize_backward_triton, reparameterize_triton
from miracle_kernels.reparameterize_mean_kl import (
    reparameterize_mean_kl_backward_triton,
    reparameterize_mean_kl_triton,
)
from miracle_kernels.select import select_triton
from miracle_kernels.slide import slide_triton

# Triton's backend, architecture and threads per warp.
TARGETS: dict[str, tuple[str, int | str, int]] = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}


@dataclass(frozen=True)
class Variant:
    """One op at one problem.

    Args:
        name: the op, with what varies in brackets.
        call: runs the op on CPU tensors; its launches are recorded, none happens.
        matrix: whether at least one launch must use tensor cores.
    """

    name: str
    call: Callable[[], Any]
    matrix: bool = False


def unaligned(n: int, dtype: torch.dtype = torch.uint8) -> Tensor:
    """A tensor `[n]` whose address is no multiple of 16 bytes: a view with an offset, as messages are."""
    return torch.zeros(n + 1, dtype=dtype)[1:]


def quantiles() -> Tensor:
    """Something of the quantile table's shape and dtype; nothing reads its values."""
    return torch.zeros(1 << 16, dtype=torch.float16)


# A seed beyond 32 bits and a size that is no multiple of 16: what Triton specializes least.
SEED = 2**40 + 1
ODD = 1311


def codebook(step_weights: int, n: int = ODD) -> Variant:
    """states → candidates."""

    def call() -> None:
        codebook_triton(torch.zeros(n, dtype=torch.int64), quantiles(), step_weights, SEED, 9)

    return Variant(f"codebook[step_weights={step_weights}{',n=1' * (n == 1)}]", call)


def decode(
    window_bits: int,
    step_bits: int,
    step_weights: int,
    *,
    rows: int = 3,
    columns: int = 4096,
    dtype: torch.dtype = torch.bfloat16,
    rotation: int = 1,
    band_columns: int = 0,
    on_the_fly: bool = False,
    has_mean: bool = False,
    with_digest: bool = False,
) -> Variant:
    """message → weights, of a matrix as wide as a model's; codes are written L.k.V."""
    told = {"rotation": rotation, "band_columns": band_columns, "on_the_fly": on_the_fly}
    told |= {"has_mean": has_mean, "with_digest": with_digest, "rows": rows, "columns": columns}
    usual = {"rotation": 1, "band_columns": 0, "on_the_fly": False, "has_mean": False, "with_digest": False}
    usual |= {"rows": 3, "columns": 4096}
    unusual = [f"{name}={value}" for name, value in told.items() if value != usual[name]]
    name = ",".join([f"code={window_bits}.{step_bits}.{step_weights}", str(dtype)[6:], *unusual])

    def call() -> None:
        message = unaligned(message_bytes(rows * columns, window_bits, step_bits, step_weights))
        table = torch.zeros(1 << window_bits, step_weights, dtype=torch.float16)
        decode_triton(
            torch.zeros(rows, columns, dtype=dtype), message, quantiles() if on_the_fly else table,
            torch.zeros(rows, dtype=torch.bfloat16), torch.zeros(rows, columns) if has_mean else None,
            rows, 0, window_bits, step_bits, step_weights, SEED, 9, rotation, band_columns, 0, with_digest,
        )  # fmt: skip

    return Variant(f"decode[{name}]", call)


def decode_linear(
    window_bits: int,
    step_bits: int,
    step_weights: int,
    batch: int,
    *,
    rows: int = 65,
    columns: int = 8192,
    rotation: int = 128,
) -> Variant:
    """x·Wᵀ from the message, of a matrix as wide as a model's."""

    def call() -> None:
        message = unaligned(message_bytes(rows * columns, window_bits, step_bits, step_weights))
        table = torch.zeros(1 << window_bits, step_weights, dtype=torch.float16)
        decode_linear_triton(
            torch.zeros(batch, columns, dtype=torch.bfloat16), message, table,
            torch.zeros(rows, dtype=torch.bfloat16), rows, window_bits, step_bits, step_weights, SEED, 9,
            rotation, 0,
        )  # fmt: skip

    code = f"{window_bits}.{step_bits}.{step_weights}"
    name = f"code={code},batch={batch},columns={columns},rotation={rotation}" + ",rows=1" * (rows == 1)
    return Variant(f"decode_linear[{name}]", call, matrix=batch > 1)


def reparameterize(dtype: torch.dtype, *, prior_mean: bool = False, n: int = 4 * ODD) -> Variant:
    """Mean and standard deviation → weights and KL, and the gradients."""
    told = str(dtype)[6:] + ",prior_mean" * prior_mean + ",n=1" * (n == 1)

    def call() -> None:
        mean, prior = torch.zeros(n), torch.zeros(n, dtype=dtype) if prior_mean else None
        common = (mean, mean, quantiles(), torch.zeros(()), prior, SEED, 9)
        reparameterize_triton(*common, dtype)
        reparameterize_backward_triton(torch.zeros(n, dtype=dtype), torch.ones(()), *common)

    return Variant(f"reparameterize[{told}]", call)


def reparameterize_mean_kl(block_weights: int, dtype: torch.dtype, n: int = 4 * ODD) -> Variant:
    """Mean and share of a block's KL → weights, and the gradients."""

    def call() -> None:
        tau, scale = torch.zeros(n), torch.zeros(())
        code = (11.0, block_weights, SEED, 9)
        reparameterize_mean_kl_triton(tau, tau, quantiles(), scale, None, *code, dtype)
        grad = torch.zeros(n, dtype=dtype)
        reparameterize_mean_kl_backward_triton(grad, tau, tau, quantiles(), scale, *code)

    told = f"block_weights={block_weights},{str(dtype)[6:]}" + ",n=1" * (n == 1)
    return Variant(f"reparameterize_mean_kl[{told}]", call)


def select(window_bits: int, step_weights: int, selection: str = "best", n: int = ODD) -> Variant:
    """Blocks → choices; as many blocks as fill a tile."""

    def call() -> None:
        coefficients = torch.zeros(n, step_weights)
        select_triton(coefficients, coefficients, quantiles(), window_bits, SEED, 9, selection, SEED)

    name = f"window_bits={window_bits},step_weights={step_weights},{selection}" + ",n=1" * (n == 1)
    return Variant(f"select[{name}]", call, matrix=True)


def slide(
    window_bits: int,
    step_bits: int,
    step_weights: int,
    selection: str = "best",
    *,
    weighted: bool = False,
    steps: int = 1023,
) -> Variant:
    """weights → message; the stream is long enough for two pieces and the piece that joins them."""
    n_weights = steps * step_weights

    def call() -> None:
        slide_triton(
            torch.zeros(n_weights if weighted else 1), torch.zeros(n_weights),
            torch.zeros(1 << window_bits, step_weights, dtype=torch.float16),
            window_bits, step_bits, step_weights, selection, SEED,
        )  # fmt: skip

    name = f"code={window_bits}.{step_bits}.{step_weights},{selection}" + ",weighted" * weighted
    name += ",n=1" * (n_weights == 1)
    return Variant(f"slide[{name}]", call)


VARIANTS: list[Variant] = [
    *(codebook(step_weights) for step_weights in (1, 8, 32)),
    decode(8, 2, 1),
    decode(12, 2, 1),
    decode(12, 2, 1, with_digest=True),
    decode(12, 2, 1, rotation=128),
    decode(12, 2, 1, rotation=128, with_digest=True),
    decode(12, 2, 1, dtype=torch.float32, rotation=4096, has_mean=True, with_digest=True),
    decode(12, 4, 2),
    decode(12, 4, 2, rotation=128),
    decode(16, 2, 1, rotation=128),
    decode(16, 8, 4, rotation=128),
    decode(12, 3, 1, rotation=128, band_columns=256),
    decode(20, 2, 1, on_the_fly=True),
    decode(20, 20, 8, on_the_fly=True),
    decode(20, 20, 8, on_the_fly=True, with_digest=True),
    decode_linear(12, 2, 1, 1),
    decode_linear(12, 4, 2, 1),
    decode_linear(12, 8, 4, 1),
    decode_linear(14, 2, 1, 1, columns=28672),
    decode_linear(12, 3, 1, 1),
    decode_linear(12, 2, 1, 16),
    decode_linear(12, 4, 2, 16),
    decode_linear(12, 8, 4, 64),
    decode_linear(14, 2, 1, 64),
    decode_linear(12, 3, 1, 33, columns=4224),
    reparameterize(torch.float32),
    reparameterize(torch.bfloat16, prior_mean=True),
    reparameterize_mean_kl(8, torch.float32),
    reparameterize_mean_kl(20, torch.bfloat16),
    reparameterize_mean_kl(1024, torch.float32),
    select(20, 32),
    select(20, 32, "sample"),
    select(16, 8),
    select(24, 128, "sample"),
    slide(8, 2, 1),
    slide(12, 2, 1, weighted=True),
    slide(12, 2, 1, "sample", weighted=True),
    slide(12, 4, 2, weighted=True),
    slide(16, 2, 1, weighted=True),
    slide(14, 10, 4, "sample", weighted=True),
    # Triton compiles an argument of 1 as a number, not as a variable.
    codebook(1, n=1),
    decode(12, 2, 1, rows=1, with_digest=True),
    decode(12, 2, 1, rows=5, columns=1),
    decode(12, 3, 2, rows=1, columns=1, on_the_fly=True),
    decode_linear(12, 2, 1, 1, rows=1),
    decode_linear(12, 2, 1, 1, rows=5, columns=1, rotation=1),
    decode_linear(12, 2, 1, 16, rows=1, columns=1, rotation=1),
    select(8, 1, n=1),
    slide(8, 2, 1, steps=1),
    reparameterize(torch.float32, n=1),
    reparameterize_mean_kl(1, torch.float32, n=1),
]
