"""The Mean-KL posterior of whole blocks of weights, inside a kernel and in torch.

    κ = κ_block·softmax(alpha),    m = √(2κ)·tanh τ,    v - log v = 1 + 2κ·sech² τ, v ≤ 1

Mean m and variance v are in units of the prior.
"""

import torch
from torch import Tensor

from ._triton import tl, triton


@triton.jit
def _solve(s):
    """√v and h = d/(v - 1), where v ≤ 1 solves v - log v = 1 + d with d = s²/2.

    Two polynomials fitted to the solution in 40 digits, with relative errors in √v of 2e-8 (d < 1) and 8e-8.
    Newton's method on log v takes three steps to the same, each dearer than this.
    """
    d = 0.5 * s * s
    near = -6.9984765e-3 + s * (-6.3742830e-4 + s * (-9.5693243e-5 + s * 1.0634382e-4))
    near = 0.49999912 + s * (-0.041654812 + s * near)  # (1 - √v)/s
    root = tl.exp(-0.5 - 0.5 * d)
    power = root * root  # v = -W(-power), a series in it
    far = 0.62172505 + power * (1.1171751 + power * (0.66336864 + power * 10.437796))
    far = root * (0.99999992 + power * (0.50004003 + power * far))
    is_near = d < 1.0
    std = tl.where(is_near, 1.0 - s * near, far)
    h = tl.where(is_near, 0.5 * s, d) / tl.where(is_near, near * (s * near - 2.0), far * far - 1.0)
    return std, h


@triton.jit
def mean_kl(tau, alpha, block_kl_nats):
    """What a tile of whole blocks `[blocks, weights]` says, alpha = -inf where there is no weight.

    Returns share of the block's KL, reach = √(2κ), tanh τ, sech τ, σ/ρ, and h = ∂log v/∂log κ.
    """
    top = tl.maximum(tl.max(alpha, 1), -3e38)  # finite where a whole row is missing
    power = tl.exp(alpha - top[:, None])
    per_power = 1.0 / tl.maximum(tl.sum(power, 1), 1.0)  # a real row has a 1 in its sum
    reach = tl.sqrt(power * (2.0 * block_kl_nats * per_power)[:, None])
    decay = tl.exp(-tl.abs(tau))
    square, decay2 = tau * tau, decay * decay
    inverse = 1.0 / (1.0 + decay2)
    # Near 0 by Taylor: 1 - decay2 has lost the digits of a mean that a large κ makes worth keeping.
    near = tau + tau * square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835))))
    far = (1.0 - decay2) * inverse
    tanh = tl.where(square < 0.0625, near, tl.where(tau < 0.0, -far, far))
    sech = 2.0 * decay * inverse
    std, h = _solve(1.4142135 * reach * sech)
    return power * per_power[:, None], reach, tanh, sech, std, h


def mean_kl_torch(tau: Tensor, alpha: Tensor, block_kl_nats: float) -> tuple[Tensor, ...]:
    """The reference of `mean_kl`, by Newton's method on u = log v: e^u - u = c."""
    share = alpha.softmax(1)
    reach, tanh, sech = (2 * block_kl_nats * share).sqrt(), tau.tanh(), 1 / tau.cosh()
    excess = (reach * sech).square().clamp(min=1e-30)  # c - 1; below, v is 1 and Newton's step 0/0
    u = torch.where(excess < 1, -(2 * excess).sqrt(), -1 - excess)
    for _ in range(6):
        u = u - (torch.expm1(u) - u - excess) / torch.expm1(u)
    return share, reach, tanh, sech, (0.5 * u).exp(), excess / torch.expm1(u)
