"""reparameterize: a weight drawn from its posterior, its noise regenerated in the backward pass.

    w = mean + std·eps,    eps[e] = quantiles[half e mod 8 of Philox(key = seed, counter = (e div 8, stream_id, 2))]

e div 8 fills two words. Nothing of the tensor's size is kept between the passes but the parameters, which
exist anyway. Bytes per weight, float32, without a prior mean, forward and backward:

    plain torch   write, read and keep the noise besides
    both ops      12 = 2 parameters + w, then 20 = grad_w + 2 parameters + 2 gradients

A prior mean adds its own bytes to each pass (forward only under Mean-KL); a 16-bit w takes 2 off each.
"""

import math
from typing import Any, Callable, Iterator, Optional, Tuple

import torch
from torch import Tensor

from ._triton import check_launch, tl, triton
from .candidates import philox_halves, philox_halves_torch
from .checks import N_QUANTILES, check_range, check_size, check_stream, check_tensor
from .errors import KernelInputError
from .registration import register
from .tuning import tiles

MAX_BLOCK_WEIGHTS = 1024
NOISE_DOMAIN = 2  # last counter word: 0 draws candidates, 1 permutations

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_CHUNK = 1 << 19  # weights that a reference has in float64 at a time


@triton.jit
def noise(first_group, quantiles_ptr, seed, stream_id, TILE: tl.constexpr):
    """float32 `[TILE]`: the noise from element 8·first_group (int64) on."""
    groups = first_group + tl.arange(0, TILE // 8)
    zero = tl.zeros([TILE // 8], tl.uint32)
    low, high = groups.to(tl.uint32), (groups >> 32).to(tl.uint32)
    halves = philox_halves(low, high, stream_id.to(tl.uint32) + zero, zero + 2, seed)
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
    tl.store(w_ptr + at, mean + tl.exp(log_std) * eps, mask=mask, cache_modifier=".cs")
    m, _, excess = _standardize(mean, log_std, prior_ptr, tl.load(log_scale_ptr), at, mask, HAS_PRIOR)
    tl.store(kl_ptr + tile, 0.5 * tl.sum(tl.where(mask, m * m + excess, 0.0)))


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


@triton.jit
def _solve(excess):
    """u ≤ 0 with e^u - 1 - u = excess, and e^u - 1; excess from 1e-30 to 1e4.

    Both branches are fits to the solution in 40 digits; their relative errors in u are 3e-9 and 4e-8, below
    float32's own. Newton's method takes three steps to the same, each dearer than both.
    """
    s = tl.sqrt(2.0 * excess)
    near = 2.2802562e-4 + s * (-4.5851939e-5 + s * -3.9115310e-5)
    near = 0.16666651 + s * (0.027778853 + s * (0.0037020114 + s * near))
    near = -s * (1.0 + s * near)
    power = tl.exp(-1.0 - excess)  # v is -W(-power), a series in it
    v = 1.6414974 + power * (0.90520926 + power * 14.381613)
    v = power * (1.0000567 + power * (0.99509758 + power * v))
    is_near = excess < 1.0
    return tl.where(is_near, near, v - 1.0 - excess), tl.where(is_near, excess + near, v - 1.0)


@triton.jit
def _mean_kl(tau, alpha, block_kl_nats):
    """What a tile of whole blocks `[blocks, weights]` says, alpha = -inf where there is no weight.

    Returns share of the block's KL, reach = √(2κ), tanh τ, sech² τ, σ/ρ, and h = ∂u/∂log κ.
    """
    top = tl.maximum(tl.max(alpha, 1), -3e38)  # finite where a whole row is missing
    power = tl.exp(alpha - top[:, None])
    share = power / tl.maximum(tl.sum(power, 1), 1.0)[:, None]  # a real row has a 1 in its sum
    size = tl.abs(tau)
    decay = tl.exp(-2.0 * size)
    square = tau * tau
    tanh = -1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835)))
    # Near 0 by Taylor: 1 - decay has lost the digits of a mean that a large κ makes worth keeping.
    tanh = tl.where(size < 0.25, size + size * square * tanh, (1.0 - decay) / (1.0 + decay))
    sech2 = 4.0 * decay / ((1.0 + decay) * (1.0 + decay))
    kappa2 = 2.0 * block_kl_nats * share
    # κ and sech² may underflow; 1e-30 keeps h finite, and its v is 1 in every precision.
    excess = tl.maximum(kappa2 * sech2, 1e-30)
    u, expm1_u = _solve(excess)
    signed = tl.where(tau < 0, -tanh, tanh)
    return share, tl.sqrt(kappa2), signed, sech2, tl.exp(0.5 * u), excess / expm1_u


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
    _, reach, tanh, _, std, _ = _mean_kl(tau, alpha, block_kl_nats)
    w = tl.exp(tl.load(log_scale_ptr)) * (reach * tanh + std * tl.reshape(eps, [TILE_BLOCKS, WIDTH]))
    if HAS_PRIOR:
        w += tl.load(prior_ptr + at, mask=mask, other=0.0, cache_modifier=".cg").to(tl.float32)
    tl.store(w_ptr + at, w, mask=mask, cache_modifier=".cs")


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
    share, reach, tanh, sech2, std, slope = _mean_kl(tau, alpha, block_kl_nats)
    m, drawn = reach * tanh, std * tl.reshape(eps, [TILE_BLOCKS, WIDTH])
    # excess = 2κ·sech² τ, so both chains pass through h = excess/(e^u - 1), which is smooth where v is 1.
    grad_tau = grad_w * (reach * sech2 - drawn * slope * tanh)
    tl.store(grad_tau_ptr + at, grad_tau, mask=mask, cache_modifier=".cs")
    grad_log_kappa = 0.5 * grad_w * (m + drawn * slope)
    grad_alpha = grad_log_kappa - share * tl.sum(grad_log_kappa, 1)[:, None]
    tl.store(grad_alpha_ptr + at, grad_alpha, mask=mask, cache_modifier=".cs")
    tl.store(grad_log_scale_ptr + tl.program_id(0), tl.sum(grad_w * (m + drawn)))
