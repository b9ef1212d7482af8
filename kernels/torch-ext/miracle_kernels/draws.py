"""What the draws of both parametrizations share: the noise, in a kernel and in torch, sums and checks.

    eps[e] = quantiles[half e % 8 of Philox(key = seed, counter = (e // 8, stream_id, 2))]

e // 8 fills two words.
"""

from collections.abc import Iterator
from typing import Any, Optional

import torch
from torch import Tensor

from ._triton import tl, triton
from .candidates import philox_halves, philox_halves_torch
from .checks import N_QUANTILES, check_size, check_stream, check_tensor
from .errors import KernelInputError

CHUNK = 1 << 19  # weights that a reference holds in float64 at a time: 4 MiB each, a choice

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# The counter's last word; candidates have 0, permutations 1, the encoders' noise the next (noise.py).
_DOMAIN = tl.constexpr(2)


@triton.jit
def noise(first_group, quantiles_ptr, seed, stream_id, TILE: tl.constexpr):
    """float32 `[TILE]`: the noise from element 8·first_group (int64) on."""
    groups = first_group + tl.arange(0, TILE // 8)
    zero = tl.zeros([TILE // 8], tl.uint32)
    low, high = groups.to(tl.uint32), (groups >> 32).to(tl.uint32)
    halves = philox_halves(low, high, stream_id.to(tl.uint32) + zero, zero + _DOMAIN, seed)
    # The table is all that is read twice: streams pass it by (.cg, .cs), it stays in the first-level cache.
    eps = tl.load(quantiles_ptr + halves, eviction_policy="evict_last")
    return tl.reshape(tl.trans(eps), [TILE]).to(tl.float32)


@triton.jit
def places(n, TILE: tl.constexpr, GROUP: tl.constexpr):
    """A program's tile `[TILE / GROUP, GROUP]`: first element, places after it, mask `[TILE / GROUP, 1]`."""
    first = tl.program_id(0).to(tl.int64) * TILE
    group = (tl.arange(0, TILE // GROUP) * GROUP)[:, None]
    is_inside = group < tl.minimum(n - first, TILE).to(tl.int32)
    return first, group + tl.arange(0, GROUP)[None, :], is_inside


def group_of(n: int) -> int:
    """Elements that are inside or outside a tensor of n together: those of a word of 16 bytes, or one.

    A mask that is said once for four of them lets the compiler read them at once.
    """
    return 1 if n % 4 else 4


def noise_torch(at: slice, quantiles: Tensor, seed: int, stream_id: int) -> Tensor:
    """float16 `[stop - start]`, the reference of `noise`; `at.start` is a multiple of eight."""
    groups = torch.arange(at.start // 8, -(-at.stop // 8), device=quantiles.device)
    counter = (groups & 0xFFFFFFFF, groups >> 32, stream_id, 2)
    return quantiles[philox_halves_torch(counter, seed).flatten()[: at.stop - at.start]]


def chunks(n: int, size: int = CHUNK) -> Iterator[slice]:
    """[0, n) in slices of `size`."""
    return (slice(first, min(first + size, n)) for first in range(0, n, size))


def total(parts: Tensor) -> Tensor:
    """The float32 sum of a kernel's partial sums, in float64: no atomics, the same on every run."""
    return parts.sum(dtype=torch.float64).float()


def check_parameters(
    op: str,
    parameters: dict[str, Optional[Tensor]],
    quantiles: Tensor,
    prior_log_scale: Tensor,
    seed: int,
    stream_id: int,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Raise unless the parameters are tensors of one shape, the first of them float32, and the rest as said.

    Raises:
        KernelInputError: they are not.
    """
    first, like = next((name, tensor) for name, tensor in parameters.items() if tensor is not None)
    for name, tensor in parameters.items():
        if tensor is not None:
            dtypes = _FLOATS if name in ("prior_mean", "grad_w") else (torch.float32,)
            check_tensor(op, name, tensor, dtypes, like)
            if tensor.shape != like.shape:
                raise KernelInputError(
                    f"{op}: {name}: expected shape {tuple(like.shape)} like {first}, found "
                    f"{tuple(tensor.shape)}; it belongs to another layer"
                )
    check_tensor(op, "quantiles", quantiles, (torch.float16,), like)
    check_size(op, "quantiles", quantiles.numel(), N_QUANTILES, "entries")
    check_number(op, "prior_log_scale", prior_log_scale, like)
    check_stream(op, seed, stream_id)
    if dtype not in _FLOATS:
        raise KernelInputError(
            f"{op}: dtype: expected float32, bfloat16 or float16, found {dtype}; choose one of them"
        )


def check_number(op: str, name: str, tensor: Tensor, like: Tensor) -> None:
    """Raise unless `tensor` is a float32 number without dimensions.

    Raises:
        KernelInputError: it is not.
    """
    check_tensor(op, name, tensor, (torch.float32,), like)
    check_size(op, name, tensor.ndim, 0, "dimensions")


def save(ctx: Any, op: str, tensors: tuple, seed: int, stream_id: int, is_learned: bool) -> None:
    """Keep for the backward pass what the caller holds anyway.

    Raises:
        KernelInputError: the prior mean, a constant, requires a gradient.
    """
    if is_learned:
        raise KernelInputError(
            f"{op}: prior_mean: expected a constant, found a tensor that requires a gradient; detach() it"
        )
    ctx.save_for_backward(*tensors)
    ctx.seed, ctx.stream_id = seed, stream_id
