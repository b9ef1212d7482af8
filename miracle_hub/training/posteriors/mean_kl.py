"""Mean-KL: a mean and a share of its block's KL per value; the KL is the budget whatever is fitted."""

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from miracle_hub.coding.draw import draw_mean_kl, mean_kl_moments
from miracle_hub.training.blocks import Budget, block_budgets
from miracle_hub.training.posteriors.protocol import Start
from miracle_hub.training.posteriors.scaled import RATE, Fitted

# Nats that a value starts with at least, so that its share can grow. A choice: a tenth of what a value has
# on average at 0.0015 bits, far below every budget there is.
_LEAST_KAPPA = 1e-4
# Between the streams of noise of two parts, far above the number of streams that a model has.
_NEXT_PART = 1 << 24


class MeanKL(Fitted):
    """q by its mean and its share of a block's KL.

    Parameters: `tau` and `alpha`, `[n]`, see `coding.draw.draw_mean_kl`.

    Source: Lin et al. 2023 (arXiv:2307.07816); the start is derived here: that of the Gaussian test channel,
    mean (1 - D)·w and variance D·(1 - D)·ρ₀² for weights of variance ρ₀², D = 2^(-2·rate).
    """

    has_noise: ClassVar[bool] = True

    def __init__(self, start: Start) -> None:
        super().__init__(start)
        by_scale = (start.values / self.layout.by_value(start.scales)).double()
        parts = [_start(by_scale[at], budget) for at, budget in self.parts()]
        tau, alpha = (torch.cat(both) for both in zip(*parts, strict=True))
        self.tau, self.alpha = nn.Parameter(tau), nn.Parameter(alpha)

    def parts(self) -> Sequence[tuple[slice, Budget]]:
        """Values whose blocks are alike, and their budget."""
        return self.budget.parts(self.layout.n_values)

    def draw(self, seed: Tensor, stream_id: int) -> Tensor:
        """See `protocol.Posterior`. One scale is the kernel's work; several follow it."""
        if self.layout.n_scales == 1:
            return self._draw(self.value_log_scales()[0], seed, stream_id)
        z = self._draw(self.log_scales.new_zeros(()), seed, stream_id)
        return self.layout.times(z, self.scales())

    def _draw(self, log_scale: Tensor, seed: Tensor, stream_id: int) -> Tensor:
        draws = []
        for number, (at, budget) in enumerate(self.parts()):
            parameters = (self.tau[at], self.alpha[at], RATE, log_scale)
            noise = (seed, stream_id + number * _NEXT_PART)
            draws.append(draw_mean_kl(*parameters, budget.block_kl_nats, budget.block_weights, *noise))
        return torch.cat(draws) if len(draws) > 1 else draws[0]

    @torch.no_grad()
    def sample(self, seed: Tensor, stream_id: int) -> Tensor:
        """See `protocol.Posterior`."""
        return self.draw(seed, stream_id)

    @torch.no_grad()
    def mean(self) -> Tensor:
        """See `protocol.Posterior`."""
        return self.moments()[0] * self.value_scales()

    def moments(self) -> tuple[Tensor, Tensor]:
        """See `protocol.Posterior`."""
        parts = [
            mean_kl_moments(self.tau[at], self.alpha[at], RATE, b.block_kl_nats, b.block_weights)
            for at, b in self.parts()
        ]
        mean, variance = (torch.cat(both) for both in zip(*parts, strict=True))
        return mean, variance

    def kl_nats(self) -> Tensor:
        """KL of every block, `[blocks]`: what was asked for."""
        return block_budgets(self.budget, self.tau)

    def penalty(self) -> None:
        """Nothing: the KL is fixed."""

    def after_step(self) -> None:
        """Nothing moves but what the optimizer moves."""


def _start(by_scale: Tensor, budget: Budget) -> tuple[Tensor, Tensor]:
    """τ and α of weights in units of the prior."""
    variance, mean = 1 - budget.share, by_scale * budget.share
    kappa = (0.5 * (mean.square() + variance - 1 - math.log(variance))).clamp(min=_LEAST_KAPPA)
    kappa = kappa * (budget.block_kl_nats / budget.by_value(budget.sums(kappa), len(mean)))
    tanh = (mean / (2 * kappa).sqrt()).clamp(-0.99, 0.99)
    return (tanh.atanh() / RATE).float(), (kappa.log() / RATE).float()
