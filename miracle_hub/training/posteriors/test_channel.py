"""The test channel: weights that are fitted without noise, and a posterior that is made of them at last."""

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from miracle_hub.coding.draw import draw_mean_var
from miracle_hub.coding.scales import SMALLEST_SCALE
from miracle_hub.training.blocks import Budget
from miracle_hub.training.posteriors.protocol import Start
from miracle_hub.training.posteriors.scaled import Scaled, scales_of, shares_of


class TestChannel(Scaled):
    """Weights that are fitted without noise; q is the Gaussian test channel around what they are by then.

    q = N((1 - v)·w, v·ρ²), where ρ is the prior's scale and v = 1/(1 + curvature/λ) a column's noise, is the
    best description of w under squared errors that cost as much as `curvature` says. Of equal curvatures v is
    D = 2^(-2·rate), and ρ² is 1 - D times the mean square of a scale's weights, which it follows until it is
    fixed; λ is such that the mean KL is the budget if the size of weights does not depend on their column.
    For what is coded, refits of the rest make up; without them it is plain rounding.

    Parameters: `weight`, `[n]`. Buffers: `curvature`, see `protocol.Weighted`.

    Source: Cover and Thomas 2006, sections 10.3.2 and 10.7, for the channel; Zhou et al. 2017
    (arXiv:1702.03044) for weights that are trained around those that are coded.
    """

    has_noise: ClassVar[bool] = False
    has_penalty: ClassVar[bool] = False
    curvature: Tensor

    def __init__(self, start: Start) -> None:
        super().__init__(start)
        self.weight = nn.Parameter(start.values.float().clone())
        self.register_buffer("curvature", torch.ones(1))

    def current_scales(self) -> Tensor:
        """Those of the weights, without gradients; zeros stay zeros, for there is no noise to move them."""
        weight = self.weight.detach()
        share = shares_of(self.budget, self.layout, weight.device)
        return scales_of(weight, self.layout, share, SMALLEST_SCALE)

    def draw(self, seed: Tensor, stream_id: int) -> Tensor:
        """The weights themselves."""
        return self.weight

    @torch.no_grad()
    def sample(self, seed: Tensor, stream_id: int) -> Tensor:
        """See `protocol.Posterior`."""
        mean, variance = self.moments()
        return draw_mean_var(mean, 0.5 * variance.log(), seed, stream_id) * self.value_scales()

    def mean(self) -> Tensor:
        """The weights themselves, as they are without being coded."""
        return self.weight.detach()

    @torch.no_grad()
    def set_mean(self, values: Tensor, are_set: Tensor) -> None:
        """See `protocol.Posterior`."""
        self.weight.copy_(torch.where(are_set, values, self.weight))

    def moments(self) -> tuple[Tensor, Tensor]:
        """See `protocol.Posterior`."""
        by_scale = self.weight.detach() * (-self.value_log_scales()).exp()
        rows = by_scale.view(-1, self.curvature.numel())
        parts = [(at, self._variances(budget)) for at, budget in self.budget.parts(by_scale.numel())]
        variance = torch.cat([by_column.expand_as(rows).reshape(-1)[at] for at, by_column in parts])
        return (1 - variance) * by_scale, variance

    def _variances(self, budget: Budget) -> Tensor:
        """v of every column; log λ by bisection."""
        curvature, power = self.curvature.double().cpu(), 1 / budget.share  # mean square of w/ρ

        def variances(log_noise: float) -> Tensor:
            return 1 / (1 + curvature * math.exp(-log_noise))

        low, high = -60.0, 60.0
        for _ in range(50):  # halves of a range over which the KL falls
            v = variances(middle := (low + high) / 2)
            is_above = float(0.5 * ((1 - v).square() * power + v - 1 - v.log()).mean()) > budget.kl_nats
            low, high = (middle, high) if is_above else (low, middle)
        return variances(high).to(self.weight)

    def kl_nats(self) -> Tensor:
        """KL of every block, `[blocks]`, without gradients."""
        mean, variance = self.moments()
        return self.budget.sums(0.5 * (mean.square() + variance - 1 - variance.log()))

    def penalty(self) -> None:
        """Nothing: the posterior is made when it is coded."""

    def after_step(self) -> None:
        """Nothing moves but what the optimizer moves."""

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *arguments: Any, **keywords: Any
    ) -> None:
        """The curvature comes with a state, into a posterior that has not measured it too."""
        if (curvature := state_dict.get(f"{prefix}curvature")) is not None:
            self.curvature = torch.ones_like(curvature, device=self.weight.device)
        super()._load_from_state_dict(state_dict, prefix, *arguments, **keywords)
