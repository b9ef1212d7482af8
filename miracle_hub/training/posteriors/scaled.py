"""The prior's side of a posterior: scales that are fitted or follow the weights, until coding fixes them."""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from miracle_hub.coding.scales import rounded_scales
from miracle_hub.training.blocks import Budget, StreamBudget
from miracle_hub.training.layout import Layout
from miracle_hub.training.posteriors.protocol import Start

# A step of Adam moves a mean by about rate · lr · ρ: at 20 as far as it moves a dense weight, for scales ρ
# near 0.05 (LeNet-5 and MiniLM: 0.05 to 0.07). Shares of the KL and log ρ move with it: on LeNet-5, 4,000
# steps at one thirtieth of this rate had twice the loss (benchmarks/lenet.py --lr 5e-5).
RATE = 20.0


def scales_of(values: Tensor, layout: Layout, share: float | Tensor, of_zeros: float | Tensor) -> Tensor:
    """The best scales of a prior, `[scales]`: the root of a share of the values' mean squares.

    Args:
        share: that the code carries of a value's variance, of all scales or of each; see `shares_of`.
        of_zeros: the scale where all values are 0, of all scales or of each.
    """
    power = layout.mean_squares(values)
    return torch.where(power > 0, (share * power).sqrt(), of_zeros)


def shares_of(budget: StreamBudget, layout: Layout, device: torch.device) -> float | Tensor:
    """The share that the code carries of a value's variance; of two codes the mean of each scale's values."""
    if isinstance(budget, Budget):
        return budget.share
    roots = torch.empty(layout.n_values, device=device)
    for at, part in budget.parts(layout.n_values):
        roots[at] = math.sqrt(part.share)
    return layout.mean_squares(roots)


class Scaled(nn.Module, ABC):
    """A posterior with a prior of mean 0.

    Buffers: `fixed_scales`, as the file holds them; None before coding.
    """

    fixed_scales: Tensor | None

    def __init__(self, start: Start) -> None:
        super().__init__()
        self.budget, self.layout = start.budget, start.layout
        self.register_buffer("fixed_scales", None)

    @abstractmethod
    def current_scales(self) -> Tensor:
        """The scales while they are not fixed, `[scales]`."""

    def scales(self) -> Tensor:
        """See `protocol.Posterior`."""
        return self.current_scales() if self.fixed_scales is None else self.fixed_scales

    def value_scales(self) -> Tensor:
        """See `protocol.Posterior`."""
        return self.layout.by_value(self.scales())

    def value_log_scales(self) -> Tensor:
        """log ρ of every value, `[n]` or `[1]`."""
        return self.layout.by_value(self.scales().log())

    @torch.no_grad()
    def fix_scales(self) -> None:
        """See `protocol.Posterior`."""
        self.fixed_scales = rounded_scales(self.scales())


class Fitted(Scaled):
    """A posterior whose prior's scales are fitted with it.

    Attributes:
        log_scales: parameter `[scales]`: `RATE` times it is log ρ; it learns nothing once scales are fixed.
    """

    def __init__(self, start: Start) -> None:
        super().__init__(start)
        self.log_scales = nn.Parameter(start.scales.log() / RATE)

    def current_scales(self) -> Tensor:
        """With gradients."""
        return (RATE * self.log_scales).exp()

    def value_log_scales(self) -> Tensor:
        """log ρ of every value, `[n]` or `[1]`; with gradients while it is fitted."""
        is_fixed = self.fixed_scales is not None
        return super().value_log_scales() if is_fixed else self.layout.by_value(RATE * self.log_scales)

    def fix_scales(self) -> None:
        """See `protocol.Posterior`."""
        super().fix_scales()
        self.log_scales.requires_grad_(False)
