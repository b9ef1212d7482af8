"""How a stream starts from the weights of a model: its code, its layout, its posterior."""

from collections.abc import Sequence

import torch
from torch import Tensor

from miracle_hub.code import StreamCode
from miracle_hub.training.blocks import budget_of
from miracle_hub.training.config import VariationalConfig
from miracle_hub.training.layout import Layout, Member, layout_of
from miracle_hub.training.posteriors.protocol import Start
from miracle_hub.training.posteriors.registry import POSTERIORS
from miracle_hub.training.posteriors.scaled import scales_of, shares_of
from miracle_hub.training.stream import Stream

# The prior's scale where all weights are 0, as biases often are: noise needs some room to move them. A
# choice, of the size of small weights.
_SCALE_OF_ZEROS = 0.01
# The same of differences, in root mean squares of what they are added to: fine-tunes move weights by a few
# hundredths of it, and noise of that size leaves a model what it is. A choice.
_SCALE_BESIDE_BASE = 0.05


def stream_of(
    members: Sequence[Member],
    weights: Sequence[Tensor],
    config: VariationalConfig,
    code: StreamCode,
    number: int,
    base: Tensor | None = None,
) -> Stream:
    """A stream whose posterior starts at given weights, on their device.

    Args:
        number: of the stream in its model.
        base: the mean of the prior of its only member, in its shape; None for 0.
    """
    has_row_scales = config.streams == "tensor" and config.scales == "row"
    layout = layout_of(members, code, has_row_scales, base).to(weights[0].device)
    values = layout.start(weights)
    budget = budget_of(code, layout.n_values, config.kl_block_weights)
    scales = scales_of(values, layout, shares_of(budget, layout, values.device), _scale_of_zeros(layout))
    assert config.parametrization is not None
    start = Start(values, scales, layout, budget, config.beta, config.beta_rate)
    return Stream(layout, POSTERIORS[config.parametrization](start), code, number)


def _scale_of_zeros(layout: Layout) -> float | Tensor:
    """The prior's scales, one for all or `[scales]`, where all values are 0."""
    if layout.base is None:
        return _SCALE_OF_ZEROS
    power = layout.mean_squares(layout.base)
    return torch.where(power > 0, _SCALE_BESIDE_BASE * power.sqrt(), _SCALE_OF_ZEROS)
