"""Variational draws as torch ops: numba on a CPU, miracle_kernels on a GPU; the same noise on both.

    Mean-KL    m = √(2κ)·tanh τ,  κ = block_kl_nats·softmax α,  v - log v = 1 + 2κ·sech² τ,
               w = ρ·(m + √v·eps): the KL of every block is its budget, whatever the parameters are
    Mean-Var   w = mean + e^log_std·eps, whose KL is `coding.posterior.kl_nats`

eps comes from a counter, (seed, stream_id, number of the weight), and is made again in the backward pass:
equal arguments draw equal weights, and nothing of the size of the weights is kept for it. The seed is an
int64 tensor on the CPU, so that torch.compile does not compile another program for every seed.
"""

import math

import numpy as np
import torch
from torch import Tensor
from torch.library import custom_op

from miracle_hub.coding import draw_cpu
from miracle_hub.coding.cpu import in_threads
from miracle_hub.coding.quantiles import quantiles_on

_CHUNK = 1 << 18  # weights whose moments are in float64 at a time


@custom_op("miracle_hub::draw_mean_kl", mutates_args=())
def draw_mean_kl(
    tau: Tensor,
    alpha: Tensor,
    rate: float,
    log_scale: Tensor,
    block_kl_nats: float,
    block_weights: int,
    seed: Tensor,
    stream_id: int,
) -> Tensor:
    """Weights of a Mean-KL posterior. Gradients reach tau, alpha and log_scale.

    Args:
        tau, alpha: float32 `[n]`, without constraints; blocks are consecutive. What the formulas call τ and
            α is `rate` times these, so that all parameters of a model can share a learning rate.
        log_scale: float32 `[]`, log ρ.
        block_kl_nats: KL of every block; a short last one has it too.
        block_weights: from 1 to 1024.
        seed: int64 `[]` on the CPU.

    Source: the idea is Lin et al. 2023 (arXiv:2307.07816); the formulas are derived here.
    """
    if tau.is_cuda:
        from miracle_kernels import reparameterize_mean_kl

        parameters = (rate * tau, rate * alpha, quantiles_on(tau.device), log_scale)
        return reparameterize_mean_kl(*parameters, None, block_kl_nats, block_weights, int(seed), stream_id)
    w, shared = torch.empty_like(tau), _blocks(log_scale, block_kl_nats, block_weights, seed, stream_id)
    arrays = tau.numpy(), alpha.numpy(), np.float32(rate)
    in_threads(
        draw_cpu.mean_kl,
        [(*arrays, *shared, *task, w.numpy()) for task in _tasks(tau.numel(), block_weights)],
    )
    return w


@custom_op("miracle_hub::draw_mean_kl_backward", mutates_args=())
def draw_mean_kl_backward(
    grad_w: Tensor,
    tau: Tensor,
    alpha: Tensor,
    rate: float,
    log_scale: Tensor,
    block_kl_nats: float,
    block_weights: int,
    seed: Tensor,
    stream_id: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of tau, alpha and log_scale from that of w."""
    if tau.is_cuda:
        from miracle_kernels.reparameterize_mean_kl import reparameterize_mean_kl_backward

        parameters = (rate * tau, rate * alpha, quantiles_on(tau.device), log_scale)
        by_tau, by_alpha, by_scale = reparameterize_mean_kl_backward(
            grad_w.contiguous(), *parameters, block_kl_nats, block_weights, int(seed), stream_id
        )
        return by_tau.mul_(rate), by_alpha.mul_(rate), by_scale
    grad_tau, grad_alpha = torch.empty_like(tau), torch.empty_like(tau)
    tasks = _tasks(tau.numel(), block_weights)
    shared = _blocks(log_scale, block_kl_nats, block_weights, seed, stream_id)
    arrays = grad_w.contiguous().numpy(), tau.numpy(), alpha.numpy(), np.float32(rate)
    by_scale = np.zeros(len(tasks))

    def work(number: int, *task: int) -> None:
        arguments = (*arrays, *shared, *task, grad_tau.numpy(), grad_alpha.numpy())
        by_scale[number] = draw_cpu.mean_kl_backward(*arguments)

    in_threads(work, [(number, *task) for number, task in enumerate(tasks)])
    return grad_tau, grad_alpha, log_scale.new_tensor(by_scale.sum())


@custom_op("miracle_hub::draw_mean_var", mutates_args=())
def draw_mean_var(mean: Tensor, log_std: Tensor, seed: Tensor, stream_id: int) -> Tensor:
    """Weights of a Mean-Var posterior, mean + e^log_std·eps. Gradients reach mean and log_std.

    Args:
        mean, log_std: float32 `[n]`.
        seed: int64 `[]` on the CPU.

    Source: Havasi et al. 2019 (arXiv:1810.00440), section 3.3.
    """
    if mean.is_cuda:
        from miracle_kernels import reparameterize

        quantiles, zero = quantiles_on(mean.device), mean.new_zeros(())
        return reparameterize(mean, log_std, quantiles, zero, None, int(seed), stream_id)[0]
    w, key = torch.empty_like(mean), draw_cpu.keys(int(seed), stream_id)
    arrays = mean.numpy(), log_std.numpy(), draw_cpu.table(), key
    in_threads(draw_cpu.mean_var, [(*arrays, *task, w.numpy()) for task in draw_cpu.tasks(mean.numel(), 1)])
    return w


@custom_op("miracle_hub::draw_mean_var_backward", mutates_args=())
def draw_mean_var_backward(grad_w: Tensor, log_std: Tensor, seed: Tensor, stream_id: int) -> Tensor:
    """Gradient of log_std from that of w."""
    if log_std.is_cuda:
        from miracle_kernels.reparameterize import reparameterize_backward

        quantiles, zero = quantiles_on(log_std.device), log_std.new_zeros(())
        # No gradient comes through the KL, whose own mean is of no account then.
        arguments = (grad_w.contiguous(), zero, log_std, log_std, quantiles, zero, None, int(seed), stream_id)
        return reparameterize_backward(*arguments)[1]
    grad_log_std, key = torch.empty_like(log_std), draw_cpu.keys(int(seed), stream_id)
    arrays = grad_w.contiguous().numpy(), log_std.numpy(), draw_cpu.table(), key
    tasks = draw_cpu.tasks(log_std.numel(), 1)
    in_threads(draw_cpu.mean_var_backward, [(*arrays, *task, grad_log_std.numpy()) for task in tasks])
    return grad_log_std


def mean_kl_moments(
    tau: Tensor, alpha: Tensor, rate: float, block_kl_nats: float, block_weights: int
) -> tuple[Tensor, Tensor]:
    """Mean and variance of a Mean-KL posterior in units of the prior, float32 `[n]`, without gradients.

    Newton's method on u = log v in float64: e^u - u = 1 + 2κ·sech² τ, from below.
    """
    moments = []
    for at in range(0, tau.numel(), step := max(1, _CHUNK // block_weights) * block_weights):
        rows, logits = ((rate * x.detach()[at : at + step]).double() for x in (tau, alpha))
        missing = -rows.numel() % block_weights
        logits = torch.nn.functional.pad(logits, (0, missing), value=-math.inf).view(-1, block_weights)
        kappa = block_kl_nats * logits.softmax(1).view(-1)[: rows.numel()]
        excess = (2 * kappa / rows.cosh().square()).clamp(min=1e-30)
        u = torch.where(excess < 1, -(2 * excess).sqrt(), -1 - excess)
        for _ in range(6):
            u = u - (torch.expm1(u) - u - excess) / torch.expm1(u)
        moments.append(torch.stack(((2 * kappa).sqrt() * rows.tanh(), u.exp())).float())
    mean, variance = torch.cat(moments, 1) if moments else tau.new_empty(2, 0)
    return mean, variance


def _blocks(
    log_scale: Tensor, block_kl_nats: float, block_weights: int, seed: Tensor, stream_id: int
) -> tuple:
    """Arguments that the compiled loops over blocks share."""
    scale, width = np.float32(math.exp(float(log_scale))), draw_cpu.width(block_weights)
    key = draw_cpu.keys(int(seed), stream_id)
    return draw_cpu.table(), key, block_weights, width, np.float32(2 * block_kl_nats), scale


def _tasks(n_weights: int, block_weights: int) -> list[tuple[int, int]]:
    return draw_cpu.tasks(-(-n_weights // block_weights), draw_cpu.width(block_weights))


@draw_mean_kl.register_fake
def _(tau, alpha, rate, log_scale, block_kl_nats, block_weights, seed, stream_id) -> Tensor:
    return torch.empty_like(tau)


@draw_mean_kl_backward.register_fake
def _(grad_w, tau, alpha, rate, log_scale, block_kl_nats, block_weights, seed, stream_id):
    return torch.empty_like(tau), torch.empty_like(tau), torch.empty_like(log_scale)


@draw_mean_var.register_fake
def _(mean, log_std, seed, stream_id) -> Tensor:
    return torch.empty_like(mean)


@draw_mean_var_backward.register_fake
def _(grad_w, log_std, seed, stream_id) -> Tensor:
    return torch.empty_like(log_std)


def _save_mean_kl(ctx, inputs, output) -> None:
    tau, alpha, ctx.rate, log_scale, ctx.block_kl_nats, ctx.block_weights, seed, ctx.stream_id = inputs
    ctx.save_for_backward(tau, alpha, log_scale, seed.clone())  # the caller counts it up in place


def _back_mean_kl(ctx, grad_w: Tensor):
    tau, alpha, log_scale, seed = ctx.saved_tensors
    numbers = (ctx.block_kl_nats, ctx.block_weights, seed, ctx.stream_id)
    by_tau, by_alpha, by_scale = draw_mean_kl_backward(grad_w, tau, alpha, ctx.rate, log_scale, *numbers)
    return by_tau, by_alpha, None, by_scale, None, None, None, None


def _save_mean_var(ctx, inputs, output) -> None:
    _, log_std, seed, ctx.stream_id = inputs
    ctx.save_for_backward(log_std, seed.clone())


def _back_mean_var(ctx, grad_w: Tensor):
    log_std, seed = ctx.saved_tensors
    return grad_w, draw_mean_var_backward(grad_w, log_std, seed, ctx.stream_id), None, None


draw_mean_kl.register_autograd(_back_mean_kl, setup_context=_save_mean_kl)
draw_mean_var.register_autograd(_back_mean_var, setup_context=_save_mean_var)
