"""Draws of weights by the plain formulas in float64, and the ops that must equal them."""

import torch
from torch import Tensor

from miracle_hub.coding.philox import philox4x32
from miracle_hub.coding.quantiles import quantiles
from miracle_kernels import reparameterize_mean_kl_torch, reparameterize_torch
from miracle_kernels.reparameterize import (
    reparameterize_backward_torch,
    reparameterize_backward_triton,
    reparameterize_triton,
)
from miracle_kernels.reparameterize_mean_kl import (
    reparameterize_mean_kl_backward_torch,
    reparameterize_mean_kl_backward_triton,
    reparameterize_mean_kl_triton,
)

FORWARDS = (reparameterize_triton, reparameterize_torch)
BACKWARDS = (reparameterize_backward_triton, reparameterize_backward_torch)
KL_FORWARDS = (reparameterize_mean_kl_triton, reparameterize_mean_kl_torch)
KL_BACKWARDS = (reparameterize_mean_kl_backward_triton, reparameterize_mean_kl_backward_torch)
SEED, STREAM_ID = 2**40 + 5, 9


def normal(n: int, seed: int) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed))


def noise(n: int, seed: int = SEED, stream_id: int = STREAM_ID, first_group: int = 0) -> Tensor:
    """By the definition: eps[e] = quantiles[half e % 8 of counter (e // 8, stream_id, 2)]."""
    groups = first_group + torch.arange(-(-n // 8))
    words = philox4x32((groups & 0xFFFFFFFF, groups >> 32, stream_id, 2), seed % 2**64)
    words = torch.stack(words, dim=1)
    halves = torch.stack((words & 0xFFFF, words >> 16), dim=2)
    return quantiles()[halves.flatten()[:n]]


def relative(found: Tensor, expected: Tensor) -> float:
    """‖found - expected‖ / ‖expected‖; 0 for two zeros."""
    expected = expected.detach()
    error = (found.cpu().double() - expected).norm()
    return float(error / expected.norm()) if error > 0 else 0.0


def plain_mean_var(
    mean: Tensor, log_std: Tensor, log_scale: Tensor, prior_mean: Tensor, eps: Tensor
) -> tuple[Tensor, Tensor]:
    m, log_v = (mean - prior_mean) / log_scale.exp(), 2 * (log_std - log_scale)
    return mean + log_std.exp() * eps, ((m**2 + torch.expm1(log_v) - log_v) / 2).sum()


def solved(excess: Tensor) -> Tensor:
    """log v ≤ 0 with v - log v - 1 = excess, by Newton; its derivative 1/(v - 1) through one last step."""
    with torch.no_grad():
        u = torch.where(excess < 1, -(2 * excess).sqrt(), -1 - excess)
        for _ in range(9):
            u = u - (torch.expm1(u) - u - excess) / torch.expm1(u)
    return u + (excess - excess.detach()) / torch.expm1(u)


def plain_mean_kl(
    tau: Tensor, alpha: Tensor, log_scale: Tensor, block_kl_nats: float, block_weights: int, eps: Tensor
) -> tuple[Tensor, Tensor]:
    """The weights less their prior mean, and KL(q‖p) of each."""
    kappa = torch.cat([block_kl_nats * block.softmax(0) for block in alpha.split(block_weights)])
    m, u = (2 * kappa).sqrt() * tau.tanh(), solved(2 * kappa / tau.cosh() ** 2)
    return log_scale.exp() * (m + (u / 2).exp() * eps), (m**2 + torch.expm1(u) - u) / 2


def block_noise(n: int, block_weights: int) -> Tensor:
    """Blocks start at multiples of the next power of two."""
    width, blocks = 1 << (block_weights - 1).bit_length(), -(-n // block_weights)
    return noise(blocks * width).view(blocks, width)[:, :block_weights].flatten()[:n]


def gradients(outputs: list[tuple[Tensor, Tensor]], inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(sum((out * grad).sum() for out, grad in outputs), inputs)  # pyright: ignore


def parameters64(one: Tensor, two: Tensor, log_scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    wide = one.cpu().double(), two.cpu().double(), log_scale.cpu().double()
    return wide[0].requires_grad_(), wide[1].requires_grad_(), wide[2].requires_grad_()
