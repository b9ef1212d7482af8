"""reparameterize_mean_kl: weights drawn from a posterior whose KL is its block's budget by construction.

Blocks are V consecutive weights of the flattened tensor. A softmax shares a block's KL out among them,
κ = κ_block·softmax(alpha); the mean takes what it likes of κ, the variance v ≤ 1 what is left:

    m = √(2κ)·tanh τ,    v - log v = 1 + 2κ·sech² τ,    w = prior_mean + ρ·(m + √v·eps)

with KL = (m² + v - 1 - log v)/2 = κ. A short last block has the whole budget too: its message costs as many
bits. The noise of weight j of block b is that of element b·P + j, P being V rounded up to a power of two.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor

from ._triton import check_launch, on_its_device, tl, triton
from .casting import rounded
from .checks import check_range
from .draws import CHUNK, check_parameters, chunks, noise, noise_torch, save, total
from .errors import KernelInputError
from .mean_kl import mean_kl, mean_kl_torch
from .registration import register, takes
from .tuning import tiles

MAX_BLOCK_WEIGHTS = 1024


@triton.jit(do_not_specialize=["seed", "stream_id"])
def _reparameterize_mean_kl_kernel(
    tau_ptr,  # [n] float32
    alpha_ptr,  # [n] float32
    quantiles_ptr,
    log_scale_ptr,
    prior_ptr,  # [n]
    w_ptr,  # [n]
    n,
    block_kl_nats,
    seed,
    stream_id,
    BLOCK_WEIGHTS: tl.constexpr,
    HAS_PRIOR: tl.constexpr,
    TILE_BLOCKS: tl.constexpr,
    WIDTH: tl.constexpr,  # BLOCK_WEIGHTS rounded up to a power of two
):
    first = tl.program_id(0).to(tl.int64) * TILE_BLOCKS
    blocks, weights = first + tl.arange(0, TILE_BLOCKS), tl.arange(0, WIDTH)
    at = blocks[:, None] * BLOCK_WEIGHTS + weights[None, :]
    mask = (at < n) & (weights < BLOCK_WEIGHTS)[None, :]
    tau = tl.load(tau_ptr + at, mask=mask, other=0.0, cache_modifier=".cg")
    alpha = tl.load(alpha_ptr + at, mask=mask, other=float("-inf"), cache_modifier=".cg")
    eps = noise(first * WIDTH // 8, quantiles_ptr, seed, stream_id, TILE_BLOCKS * WIDTH)
    _, reach, tanh, _, std, _ = mean_kl(tau, alpha, block_kl_nats)
    w = tl.exp(tl.load(log_scale_ptr)) * (reach * tanh + std * tl.reshape(eps, [TILE_BLOCKS, WIDTH]))
    if HAS_PRIOR:
        w += tl.load(prior_ptr + at, mask=mask, other=0.0, cache_modifier=".cg").to(tl.float32)
    tl.store(w_ptr + at, rounded(w, w_ptr.dtype.element_ty), mask=mask, cache_modifier=".cs")


@triton.jit(do_not_specialize=["seed", "stream_id"])
def _reparameterize_mean_kl_backward_kernel(
    grad_w_ptr,  # [n]
    tau_ptr,
    alpha_ptr,
    quantiles_ptr,
    log_scale_ptr,
    grad_tau_ptr,  # [n] float32
    grad_alpha_ptr,  # [n] float32
    grad_log_scale_ptr,  # [tiles] float32
    n,
    block_kl_nats,
    seed,
    stream_id,
    BLOCK_WEIGHTS: tl.constexpr,
    TILE_BLOCKS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * TILE_BLOCKS
    blocks, weights = first + tl.arange(0, TILE_BLOCKS), tl.arange(0, WIDTH)
    at = blocks[:, None] * BLOCK_WEIGHTS + weights[None, :]
    mask = (at < n) & (weights < BLOCK_WEIGHTS)[None, :]
    tau = tl.load(tau_ptr + at, mask=mask, other=0.0, cache_modifier=".cg")
    alpha = tl.load(alpha_ptr + at, mask=mask, other=float("-inf"), cache_modifier=".cg")
    grad_w = tl.load(grad_w_ptr + at, mask=mask, other=0.0, cache_modifier=".cg").to(tl.float32)
    grad_w *= tl.exp(tl.load(log_scale_ptr))
    eps = noise(first * WIDTH // 8, quantiles_ptr, seed, stream_id, TILE_BLOCKS * WIDTH)
    share, reach, tanh, sech, std, h = mean_kl(tau, alpha, block_kl_nats)
    m, drawn = reach * tanh, std * tl.reshape(eps, [TILE_BLOCKS, WIDTH])
    # v - log v - 1 = 2κ·sech² τ: both chains pass through h, which is smooth where dv/dc has its pole, v = 1.
    grad_tau = grad_w * (reach * sech * sech - drawn * h * tanh)
    tl.store(grad_tau_ptr + at, grad_tau, mask=mask, cache_modifier=".cs")
    grad_log_kappa = 0.5 * grad_w * (m + drawn * h)
    block = tl.sum(grad_log_kappa, 1)
    grad_alpha = grad_log_kappa - share * block[:, None]  # pyright: ignore[reportArgumentType]
    tl.store(grad_alpha_ptr + at, grad_alpha, mask=mask, cache_modifier=".cs")
    tl.store(grad_log_scale_ptr + tl.program_id(0), tl.sum(grad_w * (m + drawn)))


class _Forward(NamedTuple):
    """Arguments of `reparameterize_mean_kl`, in the order of its schema."""

    tau: Tensor
    alpha: Tensor
    quantiles: Tensor
    prior_log_scale: Tensor
    prior_mean: Optional[Tensor]
    block_kl_nats: float
    block_weights: int
    seed: int
    stream_id: int
    dtype: torch.dtype = torch.float32


class _Backward(NamedTuple):
    """Arguments of `reparameterize_mean_kl_backward`, in the order of its schema."""

    grad_w: Tensor
    tau: Tensor
    alpha: Tensor
    quantiles: Tensor
    prior_log_scale: Tensor
    block_kl_nats: float
    block_weights: int
    seed: int
    stream_id: int


def _check(given: _Forward) -> None:
    op, tau, alpha, prior_mean = "reparameterize_mean_kl", given.tau, given.alpha, given.prior_mean
    parameters = dict(tau=tau, alpha=alpha, prior_mean=prior_mean)
    noise_of = (given.quantiles, given.prior_log_scale, given.seed, given.stream_id)
    check_parameters(op, parameters, *noise_of, given.dtype)
    _check_blocks(op, given.block_kl_nats, given.block_weights)


def _check_backward(given: _Backward) -> None:
    op, parameters = "reparameterize_mean_kl_backward", dict(tau=given.tau, alpha=given.alpha)
    noise_of = (given.quantiles, given.prior_log_scale, given.seed, given.stream_id)
    check_parameters(op, dict(parameters, grad_w=given.grad_w), *noise_of)
    _check_blocks(op, given.block_kl_nats, given.block_weights)


def _check_blocks(op: str, block_kl_nats: float, block_weights: int) -> None:
    check_range(op, "block_weights", block_weights, 1, MAX_BLOCK_WEIGHTS)
    if not 0 < block_kl_nats < math.inf:
        raise KernelInputError(
            f"{op}: block_kl_nats: expected a finite number of nats above 0, found {block_kl_nats}; pass the "
            "bits of a block's message times ln 2"
        )


@on_its_device
@takes(_Forward, _check)
def reparameterize_mean_kl_triton(given: _Forward) -> Tensor:
    """Mean-KL: w of the shape of `tau`. Gradients reach tau, alpha and prior_log_scale.

    Args:
        tau, alpha: float32, of one shape, without constraints.
        quantiles: float16 `[65536]`, the quantile table of the format.
        prior_log_scale: float32 `[]`, log ρ.
        prior_mean: a constant of the same shape in float32, bfloat16 or float16; none means 0.
        block_kl_nats: KL of every block, above 0: the bits of its message times ln 2.
        block_weights: V, from 1 to 1024.
        seed: a signed 64-bit number, another one for every draw.
        dtype: of w: float32, bfloat16 or float16.

    Raises:
        KernelInputError: a tensor or a number is not as said.
        KernelUnavailableError: there is no Triton, or no GPU.

    Source: the idea is Lin et al. 2023 (arXiv:2307.07816); the formulas are derived here.
    """
    tau, alpha, quantiles, prior_log_scale, prior_mean, block_kl_nats, block_weights = given[:7]
    seed, stream_id, dtype = given[7:]
    op = "reparameterize_mean_kl"
    check_launch(op, tau)
    grid, tile = _launch(op, tau, block_weights)
    w = torch.empty_like(tau, dtype=dtype)
    if grid:
        _reparameterize_mean_kl_kernel[(grid,)](
            tau, alpha, quantiles, prior_log_scale, tau if prior_mean is None else prior_mean, w, tau.numel(),
            block_kl_nats, seed, stream_id, block_weights, HAS_PRIOR=prior_mean is not None,  # pyright: ignore[reportArgumentType]
            enable_fp_fusion=True, **tile,
        )  # fmt: skip
    return w


@takes(_Forward, _check)
def reparameterize_mean_kl_torch(given: _Forward) -> Tensor:
    """The reference of `reparameterize_mean_kl`, float64 inside."""
    tau, alpha, quantiles, prior_log_scale, prior_mean, block_kl_nats, block_weights = given[:7]
    seed, stream_id, dtype = given[7:]
    w, scale = torch.empty_like(tau, dtype=dtype), prior_log_scale.double().exp()
    for at, blocks in _chunks(tau.numel(), block_weights):
        rows = (_rows(tau, at, block_weights, 0.0), _rows(alpha, at, block_weights, -math.inf))
        _, reach, tanh, _, std, _ = mean_kl_torch(*rows, block_kl_nats)
        eps = _noise_rows(blocks, block_weights, quantiles, seed, stream_id)
        drawn = scale * (reach * tanh + std * eps).flatten()[: at.stop - at.start]
        w.view(-1)[at] = (drawn if prior_mean is None else drawn + prior_mean.view(-1)[at]).to(dtype)
    return w


@on_its_device
@takes(_Backward, _check_backward)
def reparameterize_mean_kl_backward_triton(given: _Backward) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of tau, alpha and prior_log_scale from that of w."""
    grad_w, tau, alpha, quantiles, prior_log_scale, block_kl_nats, block_weights, seed, stream_id = given
    op = "reparameterize_mean_kl_backward"
    check_launch(op, tau)
    grid, tile = _launch(op, tau, block_weights)
    grad_tau, grad_alpha, grad_log_scale = torch.empty_like(tau), torch.empty_like(tau), tau.new_empty(grid)
    if grid:
        # Not fused: threads that hold copies of a block's sum of products would round it in different ways
        # where a multiply-add takes in what came by a shuffle, and all of them store it.
        _reparameterize_mean_kl_backward_kernel[(grid,)](
            grad_w, tau, alpha, quantiles, prior_log_scale, grad_tau, grad_alpha, grad_log_scale, tau.numel(),
            block_kl_nats, seed, stream_id, block_weights, enable_fp_fusion=False, **tile,  # pyright: ignore[reportArgumentType]
        )  # fmt: skip
    return grad_tau, grad_alpha, total(grad_log_scale)


@takes(_Backward, _check_backward)
def reparameterize_mean_kl_backward_torch(given: _Backward) -> tuple[Tensor, Tensor, Tensor]:
    """The reference of `reparameterize_mean_kl_backward`, float64 inside."""
    grad_w, tau, alpha, quantiles, prior_log_scale, block_kl_nats, block_weights, seed, stream_id = given
    grad_tau, grad_alpha, scale = torch.empty_like(tau), torch.empty_like(tau), prior_log_scale.double().exp()
    grad_log_scale = [scale * 0]
    for at, blocks in _chunks(tau.numel(), block_weights):
        rows = (_rows(tau, at, block_weights, 0.0), _rows(alpha, at, block_weights, -math.inf))
        share, reach, tanh, sech, std, h = mean_kl_torch(*rows, block_kl_nats)
        drawn = std * _noise_rows(blocks, block_weights, quantiles, seed, stream_id)
        grad, size = scale * _rows(grad_w, at, block_weights, 0.0), at.stop - at.start
        grad_tau.view(-1)[at] = (grad * (reach * sech**2 - drawn * h * tanh)).float().flatten()[:size]
        by_kappa = 0.5 * grad * (reach * tanh + drawn * h)
        by_alpha = by_kappa - share * by_kappa.sum(1, keepdim=True)
        grad_alpha.view(-1)[at] = by_alpha.float().flatten()[:size]
        grad_log_scale.append((grad * (reach * tanh + drawn)).sum())
    return grad_tau, grad_alpha, total(torch.stack(grad_log_scale))


def _rows(tensor: Tensor, at: slice, block_weights: int, fill: float) -> Tensor:
    """float64 `[blocks, V]` of a slice that starts with a block; a short last one is filled up."""
    flat = tensor.view(-1)[at].double()
    missing = -flat.numel() % block_weights
    return torch.nn.functional.pad(flat, (0, missing), value=fill).view(-1, block_weights)


def _noise_rows(blocks: slice, block_weights: int, quantiles: Tensor, seed: int, stream_id: int) -> Tensor:
    width = _width(block_weights)
    elements = slice(blocks.start * width, blocks.stop * width)
    return noise_torch(elements, quantiles, seed, stream_id).view(-1, width)[:, :block_weights]


def _chunks(n: int, block_weights: int) -> Iterator[tuple[slice, slice]]:
    """Slices of weights, and of their blocks."""
    for blocks in chunks(-(-n // block_weights), CHUNK // _width(block_weights)):
        yield slice(blocks.start * block_weights, min(blocks.stop * block_weights, n)), blocks


def _width(block_weights: int) -> int:
    return 1 << (block_weights - 1).bit_length()


def _launch(op: str, tau: Tensor, block_weights: int) -> tuple[int, dict[str, int]]:
    """The number of programs, and the sizes of the tile of each."""
    tile, width = tiles(op, tau.device, block_weights=block_weights), _width(block_weights)
    tile_blocks = max(tile["TILE"] // width, 1)
    blocks = triton.cdiv(tau.numel(), block_weights)
    sizes = dict(TILE_BLOCKS=tile_blocks, WIDTH=width, num_warps=tile["num_warps"])
    return triton.cdiv(blocks, tile_blocks), sizes


def _allocate(given: _Forward) -> Tensor:
    return torch.empty_like(given.tau, dtype=given.dtype)


def _allocate_backward(given: _Backward) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(given.tau), torch.empty_like(given.tau), given.tau.new_empty(())


def _save(ctx: Any, inputs: tuple, output: Any) -> None:
    *tensors, _, ctx.block_kl_nats, ctx.block_weights, seed, stream_id, _ = inputs
    save(ctx, "reparameterize_mean_kl", tuple(tensors), seed, stream_id, ctx.needs_input_grad[4])


def _backward(ctx: Any, grad_w: Tensor) -> tuple[Optional[Tensor], ...]:
    grad_tau, grad_alpha, grad_log_scale = reparameterize_mean_kl_backward(
        grad_w.contiguous(), *ctx.saved_tensors, ctx.block_kl_nats, ctx.block_weights, ctx.seed, ctx.stream_id
    )
    return grad_tau, grad_alpha, None, grad_log_scale, None, None, None, None, None, None


reparameterize_mean_kl = register(
    "reparameterize_mean_kl",
    _Forward,
    triton=reparameterize_mean_kl_triton,
    reference=reparameterize_mean_kl_torch,
    fake=_allocate,
)
reparameterize_mean_kl_backward = register(
    "reparameterize_mean_kl_backward",
    _Backward,
    triton=reparameterize_mean_kl_backward_triton,
    reference=reparameterize_mean_kl_backward_torch,
    fake=_allocate_backward,
)
reparameterize_mean_kl.register_autograd(_backward, setup_context=_save)
