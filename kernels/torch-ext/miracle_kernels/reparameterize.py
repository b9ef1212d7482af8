"""reparameterize: weights drawn from their posterior, the noise regenerated in the backward pass.

    w = mean + std·eps
    eps[e] = quantiles[half e % 8 of Philox(key = seed, counter = (e // 8, stream_id, 2))]

e // 8 fills two words. Nothing of the tensor's size is kept between the passes but the parameters, which
exist anyway. Bytes per weight in float32 without a prior mean: forward 12 (two parameters read, w written),
backward 20 (two parameters and grad_w read, two gradients written). A prior mean adds its own bytes to each
pass (under Mean-KL to the forward pass only); a 16-bit w takes 2 off each.
"""

from collections.abc import Iterator
from typing import Any, Optional

import torch
from torch import Tensor

from ._triton import check_launch, on_its_device, tl, triton
from .candidates import philox_halves, philox_halves_torch
from .casting import rounded
from .checks import N_QUANTILES, check_size, check_stream, check_tensor
from .errors import KernelInputError
from .registration import register
from .tuning import tiles

CHUNK = 1 << 19  # weights that a reference holds in float64 at a time

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
    return tl.load(quantiles_ptr + tl.reshape(halves, [TILE]), eviction_policy="evict_last").to(tl.float32)


@triton.jit
def _excess(u, exp_u):
    """e^u - 1 - u. Near 0, where q = p and the KL vanishes, by Taylor: the difference keeps no digit."""
    taylor = 1 / 720 + u * (1 / 5040 + u * (1 / 40320))
    taylor = 0.5 + u * (1 / 6 + u * (1 / 24 + u * (1 / 120 + u * taylor)))
    return tl.where(tl.abs(u) < 0.5, u * u * taylor, exp_u - 1.0 - u)


@triton.jit
def _standardize(mean, log_std, prior_ptr, log_scale, at, mask, HAS_PRIOR: tl.constexpr):
    """m, u = log v and e^u - 1 - u, where m and v are mean and variance in units of the prior."""
    if HAS_PRIOR:
        mean -= tl.load(prior_ptr + at, mask=mask, other=0.0, cache_modifier=".cg").to(tl.float32)
    u = 2.0 * (log_std - log_scale)
    return mean * tl.exp(-log_scale), u, _excess(u, tl.exp(u))


@triton.jit(do_not_specialize=["seed", "stream_id"])
def _reparameterize_kernel(
    mean_ptr,  # [n] float32
    log_std_ptr,  # [n] float32
    quantiles_ptr,  # [65536] float16
    log_scale_ptr,  # [] float32
    prior_ptr,  # [n]
    w_ptr,  # [n]
    kl_ptr,  # [tiles] float32
    n,
    seed,  # signed 64-bit word
    stream_id,
    HAS_PRIOR: tl.constexpr,
    TILE: tl.constexpr,
):
    tile = tl.program_id(0).to(tl.int64)
    at = tile * TILE + tl.arange(0, TILE)
    mask = at < n
    mean = tl.load(mean_ptr + at, mask=mask, other=0.0, cache_modifier=".cg")
    log_std = tl.load(log_std_ptr + at, mask=mask, other=0.0, cache_modifier=".cg")
    eps = noise(tile * (TILE // 8), quantiles_ptr, seed, stream_id, TILE)
    w = rounded(mean + tl.exp(log_std) * eps, w_ptr.dtype.element_ty)
    tl.store(w_ptr + at, w, mask=mask, cache_modifier=".cs")
    m, _, excess = _standardize(mean, log_std, prior_ptr, tl.load(log_scale_ptr), at, mask, HAS_PRIOR)
    tl.store(kl_ptr + tile, tl.sum(tl.where(mask, 0.5 * (m * m + excess), 0.0)))


@triton.jit(do_not_specialize=["seed", "stream_id"])
def _reparameterize_backward_kernel(
    grad_w_ptr,  # [n]
    grad_kl_ptr,  # [] float32
    mean_ptr,
    log_std_ptr,
    quantiles_ptr,
    log_scale_ptr,
    prior_ptr,
    grad_mean_ptr,  # [n] float32
    grad_log_std_ptr,  # [n] float32
    grad_log_scale_ptr,  # [tiles] float32
    n,
    seed,
    stream_id,
    HAS_PRIOR: tl.constexpr,
    TILE: tl.constexpr,
):
    tile = tl.program_id(0).to(tl.int64)
    at = tile * TILE + tl.arange(0, TILE)
    mask = at < n
    mean = tl.load(mean_ptr + at, mask=mask, other=0.0, cache_modifier=".cg")
    log_std = tl.load(log_std_ptr + at, mask=mask, other=0.0, cache_modifier=".cg")
    grad_w = tl.load(grad_w_ptr + at, mask=mask, other=0.0, cache_modifier=".cg").to(tl.float32)
    grad_kl, log_scale = tl.load(grad_kl_ptr), tl.load(log_scale_ptr)
    m, u, excess = _standardize(mean, log_std, prior_ptr, log_scale, at, mask, HAS_PRIOR)
    grad_mean = grad_w + grad_kl * tl.exp(-log_scale) * m
    tl.store(grad_mean_ptr + at, grad_mean, mask=mask, cache_modifier=".cs")
    eps = noise(tile * (TILE // 8), quantiles_ptr, seed, stream_id, TILE)
    grad_log_std = grad_w * tl.exp(log_std) * eps + grad_kl * (u + excess)
    tl.store(grad_log_std_ptr + at, grad_log_std, mask=mask, cache_modifier=".cs")
    tl.store(grad_log_scale_ptr + tile, -grad_kl * tl.sum(tl.where(mask, m * m + u + excess, 0.0)))


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


@on_its_device
def reparameterize_triton(
    mean: Tensor,
    log_std: Tensor,
    quantiles: Tensor,
    prior_log_scale: Tensor,
    prior_mean: Optional[Tensor],
    seed: int,
    stream_id: int,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Mean-Var: w = mean + e^log_std·eps of the shape of `mean`, and Σ KL(q‖p), a float32 number in nats.

    KL = (m² + v - 1 - log v)/2 with m = (mean - prior_mean)/ρ, v = (e^log_std/ρ)², ρ = e^prior_log_scale.
    Gradients reach mean, log_std and prior_log_scale.

    Args:
        mean, log_std: float32, of one shape.
        quantiles: float16 `[65536]`, the quantile table of the format.
        prior_log_scale: float32 `[]`.
        prior_mean: a constant of the same shape in float32, bfloat16 or float16; none means 0.
        seed: a signed 64-bit number, another one for every draw.
        dtype: of w: float32, bfloat16 or float16.

    Raises:
        KernelInputError: a tensor or a number is not as said.
        KernelUnavailableError: there is no Triton, or no GPU.

    Source: Havasi et al. 2019 (arXiv:1810.00440), section 3.3.
    """
    op, parameters = "reparameterize", dict(mean=mean, log_std=log_std, prior_mean=prior_mean)
    check_parameters(op, parameters, quantiles, prior_log_scale, seed, stream_id, dtype)
    check_launch(op, mean)
    tile, w = tiles(op, mean.device), torch.empty_like(mean, dtype=dtype)
    kl_nats = mean.new_empty(triton.cdiv(mean.numel(), tile["TILE"]))
    if mean.numel():
        _reparameterize_kernel[(kl_nats.numel(),)](
            mean, log_std, quantiles, prior_log_scale, mean if prior_mean is None else prior_mean,
            w, kl_nats, mean.numel(), seed, stream_id, HAS_PRIOR=prior_mean is not None, **tile,  # pyright: ignore[reportArgumentType]
        )  # fmt: skip
    return w, total(kl_nats)


def reparameterize_torch(
    mean: Tensor,
    log_std: Tensor,
    quantiles: Tensor,
    prior_log_scale: Tensor,
    prior_mean: Optional[Tensor],
    seed: int,
    stream_id: int,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """The reference of `reparameterize`, float64 inside."""
    parameters = dict(mean=mean, log_std=log_std, prior_mean=prior_mean)
    check_parameters("reparameterize", parameters, quantiles, prior_log_scale, seed, stream_id, dtype)
    w, kl_nats = torch.empty_like(mean, dtype=dtype), [torch.zeros_like(prior_log_scale).double()]
    for at in chunks(mean.numel()):
        m, u, center, std = _mean_var_torch(mean, log_std, prior_log_scale, prior_mean, at)
        w.view(-1)[at] = (center + std * noise_torch(at, quantiles, seed, stream_id)).to(dtype)
        kl_nats.append(0.5 * (m * m + torch.expm1(u) - u).sum())
    return w, total(torch.stack(kl_nats))


@on_its_device
def reparameterize_backward_triton(
    grad_w: Tensor,
    grad_kl_nats: Tensor,
    mean: Tensor,
    log_std: Tensor,
    quantiles: Tensor,
    prior_log_scale: Tensor,
    prior_mean: Optional[Tensor],
    seed: int,
    stream_id: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of mean, log_std and prior_log_scale from those of w and of kl_nats."""
    op, parameters = "reparameterize_backward", dict(mean=mean, log_std=log_std, prior_mean=prior_mean)
    check_parameters(op, dict(parameters, grad_w=grad_w), quantiles, prior_log_scale, seed, stream_id)
    check_number(op, "grad_kl_nats", grad_kl_nats, mean)
    check_launch(op, mean)
    tile, grad_mean, grad_log_std = tiles(op, mean.device), torch.empty_like(mean), torch.empty_like(mean)
    grad_log_scale = mean.new_empty(triton.cdiv(mean.numel(), tile["TILE"]))
    if mean.numel():
        _reparameterize_backward_kernel[(grad_log_scale.numel(),)](
            grad_w, grad_kl_nats, mean, log_std, quantiles, prior_log_scale,
            mean if prior_mean is None else prior_mean, grad_mean, grad_log_std, grad_log_scale,
            mean.numel(), seed, stream_id, HAS_PRIOR=prior_mean is not None, **tile,  # pyright: ignore[reportArgumentType]
        )  # fmt: skip
    return grad_mean, grad_log_std, total(grad_log_scale)


def reparameterize_backward_torch(
    grad_w: Tensor,
    grad_kl_nats: Tensor,
    mean: Tensor,
    log_std: Tensor,
    quantiles: Tensor,
    prior_log_scale: Tensor,
    prior_mean: Optional[Tensor],
    seed: int,
    stream_id: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The reference of `reparameterize_backward`, float64 inside."""
    op, parameters = "reparameterize_backward", dict(mean=mean, log_std=log_std, prior_mean=prior_mean)
    check_parameters(op, dict(parameters, grad_w=grad_w), quantiles, prior_log_scale, seed, stream_id)
    check_number(op, "grad_kl_nats", grad_kl_nats, mean)
    grad_mean, grad_log_std, grad_log_scale = torch.empty_like(mean), torch.empty_like(mean), []
    grad_kl = grad_kl_nats.double()
    for at in chunks(mean.numel()):
        m, u, _, std = _mean_var_torch(mean, log_std, prior_log_scale, prior_mean, at)
        grad, eps = grad_w.view(-1)[at].double(), noise_torch(at, quantiles, seed, stream_id)
        grad_mean.view(-1)[at] = (grad + grad_kl * m / prior_log_scale.double().exp()).float()
        grad_log_std.view(-1)[at] = (grad * std * eps + grad_kl * torch.expm1(u)).float()
        grad_log_scale.append(-grad_kl * (m * m + torch.expm1(u)).sum())
    return grad_mean, grad_log_std, total(torch.stack([grad_kl * 0, *grad_log_scale]))


def _mean_var_torch(
    mean: Tensor, log_std: Tensor, prior_log_scale: Tensor, prior_mean: Optional[Tensor], at: slice
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """float64 m, u = log v, mean and std of a slice."""
    center, log_scale = mean.view(-1)[at].double(), prior_log_scale.double()
    delta = center if prior_mean is None else center - prior_mean.view(-1)[at].double()
    log_ratio = log_std.view(-1)[at].double() - log_scale
    return delta / log_scale.exp(), 2 * log_ratio, center, (log_ratio + log_scale).exp()


def _allocate(
    mean, log_std, quantiles, prior_log_scale, prior_mean, seed, stream_id, dtype=torch.float32
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(mean, dtype=dtype), mean.new_empty(())


def _allocate_backward(
    grad_w, grad_kl_nats, mean, log_std, quantiles, prior_log_scale, prior_mean, seed, stream_id
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(mean), torch.empty_like(mean), mean.new_empty(())


def _save(ctx: Any, inputs: tuple, output: Any) -> None:
    *tensors, seed, stream_id, _ = inputs
    save(ctx, "reparameterize", tuple(tensors), seed, stream_id, ctx.needs_input_grad[4])


def _backward(ctx: Any, grad_w: Tensor, grad_kl_nats: Tensor) -> tuple[Optional[Tensor], ...]:
    grad_mean, grad_log_std, grad_log_scale = reparameterize_backward(
        grad_w.contiguous(), grad_kl_nats, *ctx.saved_tensors, ctx.seed, ctx.stream_id
    )
    return grad_mean, grad_log_std, None, grad_log_scale, None, None, None, None


reparameterize = register(
    "reparameterize", triton=reparameterize_triton, reference=reparameterize_torch, fake=_allocate
)
reparameterize_backward = register(
    "reparameterize_backward",
    triton=reparameterize_backward_triton,
    reference=reparameterize_backward_torch,
    fake=_allocate_backward,
)
reparameterize.register_autograd(_backward, setup_context=_save)
