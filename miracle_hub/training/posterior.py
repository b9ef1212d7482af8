"""The parametrizations of a stream's posterior, and how each starts from given weights.

All give the weights of a step of training, tell their KL per block, and give mean and variance per value in
units of the prior, which is what encoders take.
"""

import math

import torch
from torch import Tensor, nn

from miracle_hub.coding.block_kl import block_kl_nats
from miracle_hub.coding.draw import draw_mean_kl, draw_mean_var, mean_kl_moments

# A step of Adam moves a mean by about rate · lr · ρ: at 20 as far as it moves a dense weight, for scales ρ
# near 0.05 (LeNet-5 and MiniLM: 0.05 to 0.07). Shares of the KL and log ρ move with it: on LeNet-5, 4,000
# steps at one thirtieth of this rate had twice the loss (benchmarks/lenet.py --lr 5e-5).
RATE = 20.0
_INITIAL_LOG_STD = -10.0  # of the public code of Havasi et al. 2019
_LEAST_KAPPA = 1e-4  # nats that a value starts with at least, so that its share can grow


class MeanKL(nn.Module):
    """q by its mean and its share of a block's KL; draws are in units of the prior.

    Source: Lin et al. 2023 (arXiv:2307.07816); the start is derived here: that of the Gaussian test channel,
    mean (1 - D)·w and variance D·(1 - D)·ρ₀² for weights of variance ρ₀², D = 2^(-2·rate).
    """

    standardized, is_noiseless = True, False

    def __init__(self, weights: Tensor, scales: Tensor, block_weights: int, block_kl_nats: float) -> None:
        """
        Args:
            weights: `[n]`, in stream order.
            scales: `[n]`, the prior's.
        """
        super().__init__()
        self.block_weights, self.block_kl_nats = block_weights, block_kl_nats
        share = test_channel_share(block_kl_nats / block_weights)
        variance = 1 - share
        mean = (weights / scales).double() * share
        kappa = (0.5 * (mean.square() + variance - 1 - math.log(variance))).clamp(min=_LEAST_KAPPA)
        kappa = kappa * (
            self.block_kl_nats / self._by_block(kappa).repeat_interleave(block_weights)[: kappa.numel()]
        )
        tanh = (mean / (2 * kappa).sqrt()).clamp(-0.99, 0.99)
        self.tau = nn.Parameter((tanh.atanh() / RATE).float())
        self.alpha = nn.Parameter((kappa.log() / RATE).float())

    def _by_block(self, values: Tensor) -> Tensor:
        padded = nn.functional.pad(values, (0, -values.numel() % self.block_weights))
        return padded.view(-1, self.block_weights).sum(1)

    def draw(self, log_scale: Tensor, seed: Tensor, stream_id: int) -> Tensor:
        """Values `[n]` in units of the prior, times e^log_scale, which is `[]`."""
        budget = (self.block_kl_nats, self.block_weights)
        return draw_mean_kl(self.tau, self.alpha, RATE, log_scale, *budget, seed, stream_id)

    def moments(self, log_scales: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance `[n]` in units of the prior, without gradients."""
        return mean_kl_moments(self.tau, self.alpha, RATE, self.block_kl_nats, self.block_weights)

    def kl_nats(self, log_scales: Tensor) -> Tensor:
        """KL of every block, `[blocks]`: what was asked for."""
        n_blocks = -(-self.tau.numel() // self.block_weights)
        return self.tau.new_full((n_blocks,), self.block_kl_nats)


class MeanVar(nn.Module):
    """q by its mean and the logarithm of its standard deviation; draws are in units of the weights.

    Source: Havasi et al. 2019 (arXiv:1810.00440), section 3.3.
    """

    standardized, is_noiseless = False, False

    def __init__(self, weights: Tensor, scales: Tensor, block_weights: int, block_kl_nats: float) -> None:
        super().__init__()
        self.block_weights, self.block_kl_nats = block_weights, block_kl_nats
        self.mean = nn.Parameter(weights.float().clone())
        self.log_std = nn.Parameter(torch.full_like(self.mean, _INITIAL_LOG_STD))

    def draw(self, log_scale: Tensor, seed: Tensor, stream_id: int) -> Tensor:
        return draw_mean_var(self.mean, self.log_std, seed, stream_id)

    def moments(self, log_scales: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            return self.mean * (-log_scales).exp(), (2 * (self.log_std - log_scales)).exp()

    def kl_nats(self, log_scales: Tensor) -> Tensor:
        """KL of every block, `[blocks]`, with gradients."""
        return block_kl_nats(self.mean, self.log_std, log_scales, self.block_weights)


class TestChannel(nn.Module):
    """Weights that are fitted without noise; q is the Gaussian test channel around what they are by then.

    q = N((1 - v)·w, v·ρ²), where ρ is the prior's scale and v = 1/(1 + curvature/λ) a column's noise, is the
    best description of w under squared errors that cost as much as `curvature` says. Of equal curvatures v is
    D = 2^(-2·rate), and ρ² is 1 - D times the mean square of a scale's weights; λ is such that the mean KL is
    the budget if the size of weights does not depend on their column. For what is coded, refits of the rest
    make up; without them it is plain rounding.

    Buffers: `curvature`, of the columns of the weights as a matrix, relative to their mean; `[1]` if it is
    the same for all of them.

    Source: Cover and Thomas 2006, sections 10.3.2 and 10.7, for the channel; Zhou et al. 2017
    (arXiv:1702.03044) for weights that are trained around those that are coded.
    """

    standardized, is_noiseless = False, True
    curvature: Tensor

    def __init__(self, weights: Tensor, scales: Tensor, block_weights: int, block_kl_nats: float) -> None:
        super().__init__()
        self.block_weights, self.block_kl_nats = block_weights, block_kl_nats
        self.weight = nn.Parameter(weights.float().clone())
        self.register_buffer("curvature", torch.ones(1))

    def moments(self, log_scales: Tensor) -> tuple[Tensor, Tensor]:
        wanted = (self.weight.detach() * (-log_scales).exp()).view(-1, self.curvature.numel())
        variance = self._variances()
        return ((1 - variance) * wanted).view(-1), variance.expand_as(wanted).reshape(-1)

    def _variances(self) -> Tensor:
        """v of every column; log λ by bisection."""
        budget, curvature = self.block_kl_nats / self.block_weights, self.curvature.double().cpu()
        power = 1 / test_channel_share(budget)  # mean square of w/ρ

        def variances(log_noise: float) -> Tensor:
            return 1 / (1 + curvature * math.exp(-log_noise))

        low, high = -60.0, 60.0
        for _ in range(50):  # halves of a range over which the KL falls
            v = variances(middle := (low + high) / 2)
            is_above = float(0.5 * ((1 - v).square() * power + v - 1 - v.log()).mean()) > budget
            low, high = (middle, high) if is_above else (low, middle)
        return variances(high).to(self.weight)

    def kl_nats(self, log_scales: Tensor) -> Tensor:
        """KL of every block, `[blocks]`, without gradients."""
        mean, variance = self.moments(log_scales)
        each = 0.5 * (mean.square() + variance - 1 - variance.log())
        missing = -each.numel() % self.block_weights
        return nn.functional.pad(each, (0, missing)).view(-1, self.block_weights).sum(1)


POSTERIORS = {"mean-kl": MeanKL, "mean-var": MeanVar, "test-channel": TestChannel}


def test_channel_share(kl_nats_per_weight: float) -> float:
    """1 - D, the share of a Gaussian weight's variance that its code carries at this rate."""
    return -math.expm1(-2 * kl_nats_per_weight)
