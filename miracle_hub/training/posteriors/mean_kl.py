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
# Of a block's KL that means may take when they are written; what is left is spread, without which there is no
# noise to go on with. A choice.
_MOST_FOR_MEANS = 0.99
_MOST_GROWTH = 2.0  # of scales, that a write may ask for: a choice


class MeanKL(Fitted):
    """q by its mean and its share of a block's KL.

    Parameters: `tau` and `alpha`, `[n]`, see `coding.draw.draw_mean_kl`.

    Source: Lin et al. 2023 (arXiv:2307.07816); the start is derived here: that of the Gaussian test channel,
    mean (1 - D)·w and variance D·(1 - D)·ρ₀² for weights of variance ρ₀², D = 2^(-2·rate).
    """

    has_noise: ClassVar[bool] = True
    has_penalty: ClassVar[bool] = False

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

    @torch.no_grad()
    def set_mean(self, values: Tensor, are_set: Tensor) -> str | None:
        """See `protocol.Posterior`: a block's KL pays for its means, and what is left is shared as it was.

        Where it cannot, the prior's scales of what is set grow, and noise with them.
        """
        mean, variance = (moment.double() for moment in self.moments())
        left = 0.5 * (variance - 1 - variance.log())
        wanted = torch.where(are_set, values / self.value_scales(), mean)
        growth = self._growth(0.5 * wanted.square(), are_set)
        if not growth <= _MOST_GROWTH:
            return (
                f"expected weights that a block's {float(self.kl_nats().min()):.4g} nats can pay for, found "
                f"some that need {growth:.4g} times the prior's scale, and as much more noise; write before "
                "make_variational, or after remove_variational(model), or raise the budget"
            )
        if growth > 1:
            are_grown = self.layout.mean_squares(are_set.float()) > 0
            self.log_scales.add_(are_grown * (math.log(growth) / RATE))
            wanted = torch.where(are_set, wanted / growth, wanted)
        rest = self.kl_nats() - self.budget.sums(0.5 * wanted.square())
        kappa = 0.5 * wanted.square() + left * self.budget.by_value(rest / self.budget.sums(left), len(left))
        self.tau.copy_((wanted / (2 * kappa).sqrt()).atanh() / RATE)
        self.alpha.copy_(kappa.log() / RATE)
        return None

    def _growth(self, costs: Tensor, are_set: Tensor) -> float:
        """By how much scales must grow for blocks to pay the costs of means, `[n]`, in nats; infinite if no
        growth helps.
        """
        own = self.budget.sums(torch.where(are_set, costs, 0))
        room = _MOST_FOR_MEANS * self.kl_nats() - self.budget.sums(torch.where(are_set, 0, costs))
        needed = torch.where(own > 0, own / room.clamp(min=0), 1).max()
        return max(1.0, float(needed.sqrt()))

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
