"""A stream: the tensors that share a message, their posterior, their scales, and what of them is coded."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from miracle_hub.code import Code
from miracle_hub.coding.draw import draw_mean_var
from miracle_hub.coding.matrix import ROW_SCALE_COLUMNS, matrix_columns
from miracle_hub.coding.order import permutation
from miracle_hub.coding.posterior import Cost, Posterior, Prior, importance_cost
from miracle_hub.coding.scales import SMALLEST_SCALE, rounded_scales
from miracle_hub.coding.sharing import Sharing, expand
from miracle_hub.training.posterior import POSTERIORS, RATE, test_channel_share


@dataclass(frozen=True)
class Member:
    """One tensor of a stream."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    sharing: Sharing


_MAX_BLOCK = 1024  # of the draws' kernels
_LEAST_VARIANCE = 1e-12  # keeps costs of a posterior that is nearly a point finite
CODING_BUFFERS = ("coded", "is_coded", "states", "fixed_scales")


class Stream(nn.Module):
    """Tensors that share a message. One tensor without sharing is in its own order; else values are permuted.

    Buffers: `coded` and `states`, candidates and windows chosen so far, and `is_coded`, where, all in stream
    order; `fixed_scales`, the scales as the file holds them; None before coding. `order` and `owner`: of
    every stream element, which value it stands for, counted member after member, and of which member.
    """

    coded: Tensor | None
    is_coded: Tensor | None
    states: Tensor | None
    fixed_scales: Tensor | None
    order: Tensor
    owner: Tensor

    def __init__(
        self,
        members: Sequence[Member],
        weights: Sequence[Tensor],
        code: Code,
        parametrization: str,
        kl_block_weights: int,
        number: int,
        has_row_scales: bool = False,
    ) -> None:
        super().__init__()
        self.members, self.code, self.number = tuple(members), code, number
        block_weights = _block_weights(code, sum(m.sharing.n_values for m in members), kl_block_weights)
        block_kl_nats = block_weights * code.rate * math.log(2)
        for name in CODING_BUFFERS:
            self.register_buffer(name, None)
        self.is_permuted = len(members) > 1 or members[0].sharing.kind != "none"
        self._place_members()
        self.to(weights[0].device)
        values = [
            _shared_values(w, m.sharing, code.seed, i)
            for i, (m, w) in enumerate(zip(members, weights, strict=True))
        ]
        # Zeros stay zeros in a fit without noise; with it, they need some room to move.
        self.scale_of_zeros = SMALLEST_SCALE if POSTERIORS[parametrization].is_noiseless else 0.01
        self.scale_columns = scale_columns(members[0].shape) if has_row_scales else 0
        self.share = test_channel_share(block_kl_nats / block_weights)
        in_order = torch.cat(values)[self.order] if self.is_permuted else values[0]
        scales, make = self._scales_of(in_order), POSTERIORS[parametrization]
        self.log_scales = nn.Parameter(scales.log() / RATE, requires_grad=not make.is_noiseless)
        self.posterior = make(in_order, self.by_value(scales), block_weights, block_kl_nats)

    def _place_members(self) -> None:
        """Buffers that say which value of the stream, with which sign, every weight takes."""
        sizes = torch.tensor([m.sharing.n_values for m in self.members])
        self.n_values = int(sizes.sum())
        if not self.is_permuted:
            return
        order = permutation(self.n_values, self.code)
        place_of = torch.empty_like(order).index_copy_(0, order, torch.arange(self.n_values))
        owner = torch.arange(len(self.members)).repeat_interleave(sizes)
        self.register_buffer("order", order, persistent=False)
        self.register_buffer("owner", owner[order], persistent=False)
        first = 0
        for i, member in enumerate(self.members):
            values, signs = member.sharing.places(self.code.seed, i)
            self.register_buffer(f"place_{i}", place_of[first + values], persistent=False)
            self.register_buffer(f"sign_{i}", signs, persistent=False)
            first += member.sharing.n_values

    def _scales_of(self, values: Tensor) -> Tensor:
        """√(1 - D) of the size of a member's or row's weights; some size where all are 0, as biases are."""
        if self.scale_columns:
            power = values.view(-1, self.scale_columns).square().mean(1)
        elif self.is_permuted:
            sums = values.new_zeros(len(self.members)).index_add_(0, self.owner, values.square())
            power = sums / torch.bincount(self.owner, minlength=len(self.members))
        else:
            power = values.square().mean().view(1)
        return torch.where(power > 0, (self.share * power).sqrt(), self.scale_of_zeros)

    def scales(self) -> Tensor:
        """The prior's scale of every member `[members]`, or row `[rows]`; exact once it is fixed."""
        if self.fixed_scales is not None:
            return self.fixed_scales
        if self.posterior.is_noiseless:  # they follow the weights until they are fixed
            return self._scales_of(self.posterior.weight.detach())
        return (RATE * self.log_scales).exp()

    def by_value(self, scales: Tensor) -> Tensor:
        """`[members]` or `[rows]` → `[n]` in stream order; `[1]` as it is."""
        if self.scale_columns:
            return scales.repeat_interleave(self.scale_columns)
        return scales.index_select(0, self.owner) if self.is_permuted else scales

    def value_log_scales(self) -> Tensor:
        """log ρ of every value in stream order, `[n]` or `[1]`."""
        is_fitted = self.fixed_scales is None and not self.posterior.is_noiseless
        return self.by_value(RATE * self.log_scales if is_fitted else self.scales().log())

    @torch.no_grad()
    def begin_coding(self) -> None:
        """Round the scales as the file holds them, and fix them: what is coded depends on them."""
        if self.coded is None:
            self.fixed_scales = rounded_scales(self.scales().detach())
            self.log_scales.requires_grad_(False)
            self.coded = self.log_scales.new_zeros(self.n_values)
            self.is_coded = torch.zeros_like(self.coded, dtype=torch.bool)
            self.states = torch.zeros(self.code.steps(self.n_values), dtype=torch.int32)

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *arguments: Any, **keywords: Any
    ) -> None:
        """What is coded, and the curvature, come with a state, into a stream that has neither too."""
        if f"{prefix}coded" in state_dict:
            self.begin_coding()
        if (curvature := state_dict.get(f"{prefix}posterior.curvature")) is not None:
            self.posterior.curvature = torch.ones_like(curvature, device=self.log_scales.device)
        super()._load_from_state_dict(state_dict, prefix, *arguments, **keywords)

    def draw(self, seed: Tensor) -> Tensor:
        """Values in stream order: a draw of the posterior, or what is coded."""
        if self.posterior.is_noiseless:
            return self._with_coded(self.posterior.weight)
        if not self.is_permuted and not self.scale_columns:
            return self._with_coded(self.posterior.draw(self.value_log_scales()[0], seed, self.number))
        values = self.posterior.draw(self.log_scales.new_zeros(()), seed, self.number)
        if not self.posterior.standardized:
            return self._with_coded(values)
        if self.scale_columns:
            return self._with_coded(_ScaledRows.apply(values, self.scales(), self.scale_columns))
        return self._with_coded(values * self.by_value(self.scales()))

    def mean(self) -> Tensor:
        """The posterior's mean, or what is coded, in stream order; without gradients."""
        with torch.no_grad():
            if self.posterior.is_noiseless:
                return self._with_coded(self.posterior.weight.detach())
            mean = self.posterior.moments(self.value_log_scales())[0]
            return self._with_coded(mean * self.by_value(self.scales()))

    def sample(self, seed: Tensor) -> Tensor:
        """A draw of the posterior, or what is coded, in stream order; without gradients."""
        with torch.no_grad():
            if not self.posterior.is_noiseless:
                return self.draw(seed)
            mean, variance = self.posterior.moments(self.value_log_scales())
            values = draw_mean_var(mean, 0.5 * variance.log(), seed, self.number)
            return self._with_coded(values * self.by_value(self.scales()))

    def _with_coded(self, values: Tensor) -> Tensor:
        if self.is_coded is None or self.coded is None:
            return values
        return torch.where(self.is_coded, self.coded * self.by_value(self.scales()), values)

    def weight(self, values: Tensor, number: int) -> Tensor:
        """One member's weights in their shape and dtype, from the stream's values."""
        member = self.members[number]
        if self.is_permuted:
            values = expand(values, getattr(self, f"place_{number}"), getattr(self, f"sign_{number}"))
        return values.view(member.shape).to(member.dtype)

    def kl_nats(self) -> Tensor:
        """KL of every block, `[blocks]`."""
        return self.posterior.kl_nats(self.value_log_scales())

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean and variance of every value, `[n]` in stream order, in units of the prior, on the CPU."""
        mean, variance = self.posterior.moments(self.value_log_scales())
        return mean.cpu(), variance.cpu().clamp(min=_LEAST_VARIANCE)

    def cost(self) -> Cost:
        """What encoders minimize, of every value in stream order."""
        return importance_cost(Posterior(*self.moments()), Prior(torch.zeros(1), torch.ones(1)))


def _block_weights(code: Code, n_values: int, wanted: int) -> int:
    """Values that share a KL budget: those of a step of the block code; else about as many as wanted.

    A block is whole steps, so that coding never ends inside one, where what is coded would have a share of
    the rest's budget. Of the lengths near the wanted one that is taken which nearly fills the last block,
    whose budget is the same however short it is.
    """
    if not code.overlap_bits:
        return code.step_weights
    n_steps, most = code.steps(n_values), _MAX_BLOCK // code.step_weights
    middle = min(max(1, round(wanted / code.step_weights)), n_steps)
    lengths = range(max(1, middle * 3 // 4), max(1, min(middle * 5 // 4, most)) + 1)
    length = min(lengths, key=lambda steps: (-n_steps % steps, abs(steps - middle)))
    return length * code.step_weights


def _shared_values(weights: Tensor, sharing: Sharing, seed: int, number: int) -> Tensor:
    """The values whose sharing comes nearest to given weights: means over all weights that take them."""
    flat = weights.detach().float().flatten()
    if sharing.kind == "none":
        return flat
    places, signs = (x.to(flat.device) for x in sharing.places(seed, number))
    sums = flat.new_zeros(sharing.n_values).index_add_(0, places, flat * signs)
    mean = sums / flat.new_zeros(sharing.n_values).index_add_(0, places, torch.ones_like(flat))
    # Means of unrelated weights are too small by the root of their number: keep the size of the weights.
    power = mean.square().mean().sqrt()
    return mean * (flat.square().mean().sqrt() / power) if float(power) > 0 else mean


def scale_columns(shape: tuple[int, ...]) -> int:
    """The length of rows that have a scale of their own; 0 where they are short."""
    columns = matrix_columns(shape)
    return columns if columns >= ROW_SCALE_COLUMNS and columns < math.prod(shape) else 0


class _ScaledRows(torch.autograd.Function):
    """Values `[n]` times the scales `[rows]` of their rows.

    Only the product is kept for the backward pass, as a layer keeps its weight in any case.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, scales: Tensor, columns: int) -> Tensor:
        scaled = (values.view(-1, columns) * scales[:, None]).view(-1)
        ctx.save_for_backward(scaled, scales)
        return scaled

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        scaled, scales = ctx.saved_tensors
        rows = grad.view(scales.numel(), -1)
        by_scales = torch.einsum("rc,rc->r", rows, scaled.view_as(rows)) / scales
        return (rows * scales[:, None]).view(-1), by_scales, None
