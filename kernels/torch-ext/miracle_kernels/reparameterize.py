"""reparameterize: weights drawn from their posterior, the noise regenerated in the backward pass.

    w = mean + std·eps, eps as in draws.py

Nothing of the tensor's size is kept between the passes but the parameters, which exist anyway. Bytes per
weight in float32 without a prior mean: forward 12 (two parameters read, w written), backward 20 (two
parameters and grad_w read, two gradients written). A prior mean adds its own bytes to each pass (under
Mean-KL to the forward pass only); a 16-bit w takes 2 off each.
"""

# What Triton's language means by these operators is not what its stubs say.
# pyright: reportOperatorIssue=false

from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor

from ._triton import check_launch, on_its_device, tl, triton
from .casting import rounded
from .draws import (
    check_number,
    check_parameters,
    chunks,
    group_of,
    noise,
    noise_torch,
    places,
    save,
    total,
)
from .registration import register, takes
from .tuning import tiles

_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _excess(r, ratio):
    """e^2r - 1 - 2r, where ratio = e^r.

    Near 0, where q = p and the KL vanishes, that difference keeps no digit: there by a polynomial that was
    fitted to it, of relative error 5e-8.
    """
    near = 2.0 + r * (1.3333334 + r * (0.66665272 + r * (0.26666184 + r * (0.089484127 + r * 0.025551146))))
    return tl.where(tl.abs(r) < 0.25, r * r * near, ratio * ratio - (1.0 + 2.0 * r))


@triton.jit
def _standardize(mean, log_std, prior_ptr, log_scale, at, mask, HAS_PRIOR: tl.constexpr):
    """m, r = log(σ/ρ), σ/ρ and (σ/ρ)² - 1 - 2r, where m is the mean in units of the prior."""
    if HAS_PRIOR:
        mean -= tl.load(prior_ptr + at, mask=mask, cache_modifier=".cg").to(tl.float32)
    r = log_std - log_scale
    ratio = tl.exp2(r * _LOG2_E)
    return mean * tl.exp(-log_scale), r, ratio, _excess(r, ratio)


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
    GROUP: tl.constexpr,
    TILE: tl.constexpr,
):
    first, at, mask = places(n, TILE, GROUP)
    mean = tl.load(mean_ptr + first + at, mask=mask, cache_modifier=".cg")
    log_std = tl.load(log_std_ptr + first + at, mask=mask, cache_modifier=".cg")
    log_scale = tl.load(log_scale_ptr)
    m, _, ratio, excess = _standardize(mean, log_std, prior_ptr + first, log_scale, at, mask, HAS_PRIOR)
    # Summed before the noise needs the registers.
    tl.store(kl_ptr + tl.program_id(0), 0.5 * tl.sum(tl.where(mask, tl.sum(m * m + excess, 1, True), 0.0)))
    eps = tl.reshape(noise(first // 8, quantiles_ptr, seed, stream_id, TILE), at.shape)
    w = rounded(mean + tl.exp(log_scale) * ratio * eps, w_ptr.dtype.element_ty)
    tl.store(w_ptr + first + at, w, mask=mask, cache_modifier=".cs")


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
    GROUP: tl.constexpr,
    TILE: tl.constexpr,
):
    first, at, mask = places(n, TILE, GROUP)
    mean = tl.load(mean_ptr + first + at, mask=mask, cache_modifier=".cg")
    log_std = tl.load(log_std_ptr + first + at, mask=mask, cache_modifier=".cg")
    grad_w = tl.load(grad_w_ptr + first + at, mask=mask, cache_modifier=".cg").to(tl.float32)
    grad_kl, log_scale = tl.load(grad_kl_ptr), tl.load(log_scale_ptr)
    m, r, ratio, excess = _standardize(mean, log_std, prior_ptr + first, log_scale, at, mask, HAS_PRIOR)
    growth = 2.0 * r + excess  # v - 1
    # Summed before the noise needs the registers.
    total = tl.sum(tl.where(mask, tl.sum(m * m + growth, 1, True), 0.0))
    tl.store(grad_log_scale_ptr + tl.program_id(0), -grad_kl * total)
    grad_mean = grad_w + grad_kl * tl.exp(-log_scale) * m
    tl.store(grad_mean_ptr + first + at, grad_mean, mask=mask, cache_modifier=".cs")
    eps = tl.reshape(noise(first // 8, quantiles_ptr, seed, stream_id, TILE), at.shape)
    grad_log_std = grad_w * (tl.exp(log_scale) * ratio) * eps + grad_kl * growth
    tl.store(grad_log_std_ptr + first + at, grad_log_std, mask=mask, cache_modifier=".cs")


class _Forward(NamedTuple):
    """Arguments of `reparameterize`, in the order of its schema."""

    mean: Tensor
    log_std: Tensor
    quantiles: Tensor
    prior_log_scale: Tensor
    prior_mean: Optional[Tensor]
    seed: int
    stream_id: int
    dtype: torch.dtype = torch.float32


class _Backward(NamedTuple):
    """Arguments of `reparameterize_backward`, in the order of its schema."""

    grad_w: Tensor
    grad_kl_nats: Tensor
    mean: Tensor
    log_std: Tensor
    quantiles: Tensor
    prior_log_scale: Tensor
    prior_mean: Optional[Tensor]
    seed: int
    stream_id: int


def _check(given: _Forward) -> None:
    mean, log_std, quantiles, prior_log_scale, prior_mean, seed, stream_id, dtype = given
    parameters = dict(mean=mean, log_std=log_std, prior_mean=prior_mean)
    check_parameters("reparameterize", parameters, quantiles, prior_log_scale, seed, stream_id, dtype)


def _check_backward(given: _Backward) -> None:
    grad_w, grad_kl_nats, mean, log_std, quantiles, prior_log_scale, prior_mean, seed, stream_id = given
    op, parameters = "reparameterize_backward", dict(mean=mean, log_std=log_std, prior_mean=prior_mean)
    check_parameters(op, dict(parameters, grad_w=grad_w), quantiles, prior_log_scale, seed, stream_id)
    check_number(op, "grad_kl_nats", grad_kl_nats, mean)


@on_its_device
@takes(_Forward, _check)
def reparameterize_triton(given: _Forward) -> tuple[Tensor, Tensor]:
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
    mean, log_std, quantiles, prior_log_scale, prior_mean, seed, stream_id, dtype = given
    op = "reparameterize"
    check_launch(op, mean)
    tile, w = tiles(op, mean.device), torch.empty_like(mean, dtype=dtype)
    kl_nats = mean.new_empty(triton.cdiv(mean.numel(), tile["TILE"]))
    if mean.numel():
        _reparameterize_kernel[(kl_nats.numel(),)](
            mean, log_std, quantiles, prior_log_scale, mean if prior_mean is None else prior_mean,
            w, kl_nats, mean.numel(), seed, stream_id, HAS_PRIOR=prior_mean is not None,  # pyright: ignore[reportArgumentType]
            enable_fp_fusion=True, GROUP=group_of(mean.numel()), **tile,
        )  # fmt: skip
    return w, total(kl_nats)


@takes(_Forward, _check)
def reparameterize_torch(given: _Forward) -> tuple[Tensor, Tensor]:
    """The reference of `reparameterize`, float64 inside."""
    mean, log_std, quantiles, prior_log_scale, prior_mean, seed, stream_id, dtype = given
    w, kl_nats = torch.empty_like(mean, dtype=dtype), [torch.zeros_like(prior_log_scale).double()]
    for at in chunks(mean.numel()):
        m, u, center, std = _mean_var_torch(mean, log_std, prior_log_scale, prior_mean, at)
        w.view(-1)[at] = (center + std * noise_torch(at, quantiles, seed, stream_id)).to(dtype)
        kl_nats.append(0.5 * (m * m + torch.expm1(u) - u).sum())
    return w, total(torch.stack(kl_nats))


@on_its_device
@takes(_Backward, _check_backward)
def reparameterize_backward_triton(given: _Backward) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of mean, log_std and prior_log_scale from those of w and of kl_nats."""
    grad_w, grad_kl_nats, mean, log_std, quantiles, prior_log_scale, prior_mean, seed, stream_id = given
    op = "reparameterize_backward"
    check_launch(op, mean)
    tile, grad_mean, grad_log_std = tiles(op, mean.device), torch.empty_like(mean), torch.empty_like(mean)
    grad_log_scale = mean.new_empty(triton.cdiv(mean.numel(), tile["TILE"]))
    if mean.numel():
        _reparameterize_backward_kernel[(grad_log_scale.numel(),)](
            grad_w, grad_kl_nats, mean, log_std, quantiles, prior_log_scale,
            mean if prior_mean is None else prior_mean, grad_mean, grad_log_std, grad_log_scale,
            mean.numel(), seed, stream_id, HAS_PRIOR=prior_mean is not None,  # pyright: ignore[reportArgumentType]
            enable_fp_fusion=True, GROUP=group_of(mean.numel()), **tile,
        )  # fmt: skip
    return grad_mean, grad_log_std, total(grad_log_scale)


@takes(_Backward, _check_backward)
def reparameterize_backward_torch(given: _Backward) -> tuple[Tensor, Tensor, Tensor]:
    """The reference of `reparameterize_backward`, float64 inside."""
    grad_w, grad_kl_nats, mean, log_std, quantiles, prior_log_scale, prior_mean, seed, stream_id = given
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


def _allocate(given: _Forward) -> tuple[Tensor, Tensor]:
    return torch.empty_like(given.mean, dtype=given.dtype), given.mean.new_empty(())


def _allocate_backward(given: _Backward) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(given.mean), torch.empty_like(given.mean), given.mean.new_empty(())


def _save(ctx: Any, inputs: tuple, output: Any) -> None:
    *tensors, seed, stream_id, _ = inputs
    save(ctx, "reparameterize", tuple(tensors), seed, stream_id, ctx.needs_input_grad[4])


def _backward(ctx: Any, grad_w: Tensor, grad_kl_nats: Tensor) -> tuple[Optional[Tensor], ...]:
    grad_mean, grad_log_std, grad_log_scale = reparameterize_backward(
        grad_w.contiguous(), grad_kl_nats, *ctx.saved_tensors, ctx.seed, ctx.stream_id
    )
    return grad_mean, grad_log_std, None, grad_log_scale, None, None, None, None


reparameterize = register(
    "reparameterize", _Forward, triton=reparameterize_triton, reference=reparameterize_torch, fake=_allocate
)
reparameterize_backward = register(
    "reparameterize_backward",
    _Backward,
    triton=reparameterize_backward_triton,
    reference=reparameterize_backward_torch,
    fake=_allocate_backward,
)
reparameterize.register_autograd(_backward, setup_context=_save)
