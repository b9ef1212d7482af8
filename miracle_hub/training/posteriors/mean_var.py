"""Mean-Var: a mean and a standard deviation per value; the KL comes to its budget by annealing."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from miracle_hub.coding.block_kl import block_kl_nats
from miracle_hub.coding.draw import draw_mean_var
from miracle_hub.training.blocks import block_budgets
from miracle_hub.training.posteriors.annealing import Annealing
from miracle_hub.training.posteriors.protocol import Start
from miracle_hub.training.posteriors.scaled import Fitted

_INITIAL_LOG_STD = -10.0  # of the public code of Havasi et al. 2019


class MeanVar(Fitted):
    """q by its mean and the logarithm of its standard deviation, in units of the weights.

    Parameters: `mean_values` and `log_std`, `[n]`; `annealing` has β.

    Source: Havasi et al. 2019 (arXiv:1810.00440), section 3.3.
    """

    has_noise: ClassVar[bool] = True
    has_penalty: ClassVar[bool] = True

    def __init__(self, start: Start) -> None:
        super().__init__(start)
        self.mean_values = nn.Parameter(start.values.float().clone())
        self.log_std = nn.Parameter(torch.full_like(self.mean_values, _INITIAL_LOG_STD))
        n_blocks = self.budget.n_blocks(start.values.numel())
        self.annealing = Annealing(n_blocks, start.beta, start.beta_rate)

    def draw(self, seed: Tensor, stream_id: int) -> Tensor:
        """See `protocol.Posterior`."""
        return draw_mean_var(self.mean_values, self.log_std, seed, stream_id)

    @torch.no_grad()
    def sample(self, seed: Tensor, stream_id: int) -> Tensor:
        """See `protocol.Posterior`."""
        return self.draw(seed, stream_id)

    @torch.no_grad()
    def mean(self) -> Tensor:
        """See `protocol.Posterior`."""
        return self.moments()[0] * self.value_scales()

    @torch.no_grad()
    def set_mean(self, values: Tensor, are_set: Tensor) -> None:
        """See `protocol.Posterior`."""
        self.mean_values.copy_(torch.where(are_set, values, self.mean_values))

    @torch.no_grad()
    def moments(self) -> tuple[Tensor, Tensor]:
        """See `protocol.Posterior`."""
        log_scales = self.value_log_scales()
        return self.mean_values * (-log_scales).exp(), (2 * (self.log_std - log_scales)).exp()

    def kl_nats(self) -> Tensor:
        """KL of every block, `[blocks]`, with gradients."""
        log_scales = self.value_log_scales()
        parts = [
            block_kl_nats(
                self.mean_values[at],
                self.log_std[at],
                log_scales[at] if log_scales.numel() > 1 else log_scales,
                budget.block_weights,
            )
            for at, budget in self.budget.parts(self.layout.n_values)
        ]
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def penalty(self) -> Tensor:
        """β·KL of every block, `[blocks]`, in nats."""
        return self.annealing.beta() * self.kl_nats()

    @torch.no_grad()
    def after_step(self) -> None:
        """β grows where a block's KL is above its budget, else shrinks."""
        self.annealing.move(self.kl_nats() > block_budgets(self.budget, self.mean_values))
