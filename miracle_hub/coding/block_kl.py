"""KL of the blocks of a Mean-Var posterior, with gradients, in little memory.

Written as torch operations it would keep four more numbers per weight for the backward pass than the
parameters that are there anyway; here both passes go over the weights a chunk at a time.
"""

from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from miracle_hub.coding.cpu import in_threads
from miracle_hub.coding.draw_cpu import exp

_CHUNK = 1 << 18  # weights: 1 MiB of each temporary, which stays in the second-level cache


def block_kl_nats(mean: Tensor, log_std: Tensor, log_scales: Tensor, block_weights: int) -> Tensor:
    """KL(q‖p) summed over blocks of consecutive weights, float32 `[blocks]`.

    Args:
        mean, log_std: float32 `[n]`, of q; p has mean 0.
        log_scales: log of p's standard deviation, `[n]` or `[1]`.
    """
    return _BlockKL.apply(mean, log_std, log_scales, block_weights)  # pyright: ignore[reportReturnType]


class _BlockKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mean: Tensor, log_std: Tensor, log_scales: Tensor, block_weights: int) -> Tensor:
        ctx.save_for_backward(mean, log_std, log_scales)
        ctx.block_weights = block_weights
        if not mean.is_cuda:
            return _on_cpu(mean, log_std, log_scales, block_weights)
        blocks = []
        for at in _chunks(mean.numel(), block_weights):
            m, u = _standardized(mean, log_std, log_scales, at)
            each = 0.5 * (m.square() + (torch.expm1(u) - u))
            padded = torch.nn.functional.pad(each, (0, -each.numel() % block_weights))
            blocks.append(padded.view(-1, block_weights).sum(1))
        return torch.cat(blocks)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        mean, log_std, log_scales = ctx.saved_tensors
        by_mean, by_std = torch.empty_like(mean), torch.empty_like(log_std)
        by_scale = torch.zeros_like(log_scales)
        if not mean.is_cuda:
            _back_on_cpu(grads[0], mean, log_std, log_scales, ctx.block_weights, (by_mean, by_std, by_scale))
            return by_mean, by_std, by_scale, None
        for at in _chunks(mean.numel(), ctx.block_weights):
            m, u = _standardized(mean, log_std, log_scales, at)
            first = at.start // ctx.block_weights
            grad = grads[0][first : first + _CHUNK].repeat_interleave(ctx.block_weights)[: m.numel()]
            scale = log_scales[at] if log_scales.numel() > 1 else log_scales
            by_mean[at] = grad * m * (-scale).exp()
            by_std[at] = grad * torch.expm1(u)
            both = -(grad * m.square() + by_std[at])
            if log_scales.numel() > 1:
                by_scale[at] = both
            else:
                by_scale += both.sum()
        return by_mean, by_std, by_scale, None


def _standardized(mean: Tensor, log_std: Tensor, log_scales: Tensor, at: slice) -> tuple[Tensor, Tensor]:
    """m = mean/ρ and u = log (σ/ρ)²."""
    scale = log_scales[at] if log_scales.numel() > 1 else log_scales
    return mean[at] * (-scale).exp(), 2 * (log_std[at] - scale)


def _chunks(n: int, block_weights: int) -> list[slice]:
    """Whole blocks at a time."""
    step = max(1, _CHUNK // block_weights) * block_weights
    return [slice(first, min(first + step, n)) for first in range(0, n, step)]


_jit = njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract", "reassoc", "nsz"})
_f4 = np.float32


def _on_cpu(mean: Tensor, log_std: Tensor, log_scales: Tensor, block_weights: int) -> Tensor:
    out = torch.empty(-(-mean.numel() // block_weights))
    arrays = [x.numpy() for x in (mean.detach(), log_std.detach(), log_scales.detach())]
    tasks = [
        (*arrays, at.start, at.stop, block_weights, out.numpy())
        for at in _chunks(mean.numel(), block_weights)
    ]
    in_threads(_forward, tasks)
    return out


def _back_on_cpu(
    grad: Tensor,
    mean: Tensor,
    log_std: Tensor,
    log_scales: Tensor,
    block_weights: int,
    out: tuple[Tensor, ...],
) -> None:
    arrays = [x.numpy() for x in (grad.contiguous(), mean.detach(), log_std.detach(), log_scales.detach())]
    by_mean, by_std, by_scale = (x.numpy() for x in out)
    chunks, sums = _chunks(mean.numel(), block_weights), {}

    def work(at: slice) -> None:
        arguments: tuple = (*arrays, at.start, at.stop, block_weights, by_mean, by_std, by_scale)
        sums[at.start] = _backward(*arguments)

    in_threads(work, [(at,) for at in chunks])
    if log_scales.numel() == 1:
        by_scale[0] = sum(sums[at.start] for at in chunks)


@_jit
def _excess(u):
    """e^u - 1 - u, by Taylor near 0, where the difference keeps no digit."""
    near = min(max(u, _f4(-0.5)), _f4(0.5))
    taylor = _f4(1 / 720) + near * (_f4(1 / 5040) + near * _f4(1 / 40320))
    taylor = _f4(1 / 6) + near * (_f4(1 / 24) + near * (_f4(1 / 120) + near * taylor))
    taylor = near * near * (_f4(0.5) + near * taylor)
    share = _f4(near == u)
    return share * taylor + (_f4(1.0) - share) * (exp(u) - _f4(1.0) - u)


@_jit
def _forward(mean, log_std, log_scales, start, stop, block_weights, out):
    """KL of the blocks of weights [start, stop)."""
    is_one = log_scales.shape[0] == 1
    each = np.empty(stop - start, np.float32)
    for i in range(start, stop):
        scale = log_scales[0 if is_one else i]
        m = mean[i] * exp(-scale)
        each[i - start] = _f4(0.5) * (m * m + _excess(_f4(2.0) * (log_std[i] - scale)))
    for first in range(start, stop, block_weights):
        total = _f4(0.0)
        for i in range(first, min(first + block_weights, stop)):
            total += each[i - start]
        out[first // block_weights] = total


@_jit
def _backward(grad, mean, log_std, log_scales, start, stop, block_weights, by_mean, by_std, by_scale):
    """The mirror of `_forward`; returns the gradient of the one scale, if there is one."""
    is_one, total = log_scales.shape[0] == 1, 0.0
    for first in range(start, stop, block_weights):
        g, part = grad[first // block_weights], _f4(0.0)
        for i in range(first, min(first + block_weights, stop)):
            scale = log_scales[0 if is_one else i]
            inverse = exp(-scale)
            m, u = mean[i] * inverse, _f4(2.0) * (log_std[i] - scale)
            by_mean[i] = g * m * inverse
            by_std[i] = g * (u + _excess(u))
            part -= g * m * m + by_std[i]
            if not is_one:
                by_scale[i] = -(g * m * m + by_std[i])
        total += part
    return total
