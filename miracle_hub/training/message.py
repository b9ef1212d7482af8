"""What of a stream's message is chosen so far, and the choice of its next steps."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from miracle_hub.code import Code, StreamCode
from miracle_hub.coding.backend import choose
from miracle_hub.coding.encode import pack_states
from miracle_hub.coding.posterior import (
    Posterior,
    importance_cost,
    kl_nats,
    log_importance_weight,
    standard_prior,
)
from miracle_hub.training.blocks import StreamBudget

# Steps of a sliding code that are searched beyond those to choose, in windows: survivors have merged by then
# (coding/sliding.py: at sixteen the error is that of one undivided search to 0.02 %).
_LOOK_AHEAD_WINDOWS = 16


@dataclass(frozen=True)
class Selector:
    """How candidates are chosen.

    Attributes:
        selection: "best" or "sample"; see `coding.encode.encode_stream`.
        generator: the only source of the encoder's randomness.
    """

    selection: str
    generator: torch.Generator


@dataclass(frozen=True)
class Chosen:
    """What a choice cost.

    Attributes:
        block_kl_nats: of the posterior to the prior, float64 `[blocks]`, of the blocks that were touched.
        log_weight_nats: log q/p of the candidates that were chosen.
    """

    block_kl_nats: Tensor
    log_weight_nats: float


@dataclass(frozen=True)
class _Segment:
    """The part of a message that one code is of; its steps and values go on from those before it."""

    code: Code
    n_values: int
    first_step: int
    first_value: int

    @property
    def steps(self) -> slice:
        """Its steps among all."""
        return slice(self.first_step, self.first_step + self.code.steps(self.n_values))

    def firsts(self, steps: Tensor) -> Tensor:
        """The places of the first values of some of its steps."""
        return self.first_value + (steps - self.first_step) * self.code.step_weights

    def values_of(self, steps: Tensor) -> Tensor:
        """The places of the values of some of its steps, the last of which may have fewer."""
        values = (self.firsts(steps)[:, None] + torch.arange(self.code.step_weights)).flatten()
        return values[values < self.first_value + self.n_values]


def _segments(code: StreamCode, n_values: int) -> list[_Segment]:
    found, step, value = [], 0, 0
    for n, own in code.segments(n_values):
        found.append(_Segment(own, n, step, value))
        step, value = step + own.steps(n), value + n
    return found


class Message(nn.Module):
    """A message in the making; of two codes, their messages one after the other.

    Buffers: `states`, int32 `[steps]`, the windows that are chosen; `values`, float32 `[n]` in stream order,
    the candidates that they stand for, in units of the prior; `is_coded`, `[n]`, where they are chosen.
    """

    states: Tensor
    values: Tensor
    is_coded: Tensor

    def __init__(self, code: StreamCode, n_values: int) -> None:
        super().__init__()
        self.code, self.n_values, self.segments = code, n_values, _segments(code, n_values)
        self.register_buffer("values", torch.zeros(n_values))
        self.register_buffer("is_coded", torch.zeros(n_values, dtype=torch.bool))
        self.register_buffer("states", torch.zeros(code.steps(n_values), dtype=torch.int32))

    def n_coded(self) -> int:
        """How many values are chosen."""
        return int(self.is_coded.sum())

    def steps_left(self) -> Tensor:
        """The steps to choose, ascending, int64 on the CPU."""
        return (~self.is_coded[self.firsts().to(self.is_coded.device)]).nonzero().view(-1).cpu()

    def firsts(self) -> Tensor:
        """The places of the first values of all steps, int64 on the CPU."""
        return torch.cat([s.firsts(torch.arange(s.steps.start, s.steps.stop)) for s in self.segments])

    def widths(self) -> Tensor:
        """How many values every step stands for, int64 on the CPU; the last of a code may not use all."""
        return torch.cat(
            [torch.full((s.code.steps(s.n_values),), s.code.step_weights) for s in self.segments]
        )

    def blocks_left(self, budget: StreamBudget) -> Tensor:
        """1 for every block of which something is not chosen, else 0; float32 `[blocks]`."""
        return (budget.sums((~self.is_coded).float()) > 0).float()

    def over(self, values: Tensor, scales: Tensor) -> Tensor:
        """Values `[n]` in units of the weights, but where they are chosen.

        Args:
            scales: of the prior, `[n]` or `[1]`.
        """
        return torch.where(self.is_coded, self.values * scales, values)

    @torch.no_grad()
    def choose(self, steps: Tensor, posterior: Posterior, budget: StreamBudget, selector: Selector) -> Chosen:
        """Choose the windows of some steps.

        Args:
            steps: int64 on the CPU, ascending; windows that overlap go on where others ended.
            posterior: of all values, in units of the prior, on the CPU.
        """
        found = []
        for segment in self.segments:
            own = steps[(steps >= segment.steps.start) & (steps < segment.steps.stop)]
            if len(own):
                found.append(self._choose(segment, own, posterior, budget, selector))
        log_weight = sum(part.log_weight_nats for part in found)
        return Chosen(torch.cat([part.block_kl_nats for part in found]), log_weight)

    def _choose(
        self,
        segment: _Segment,
        steps: Tensor,
        posterior: Posterior,
        budget: StreamBudget,
        selector: Selector,
    ) -> Chosen:
        searched, entry = self._searched(segment, steps)
        part = _part(posterior, segment.values_of(searched))
        cost, backend = importance_cost(part, standard_prior()), choose(device=self.values.device)
        given = (segment.code, selector.selection, selector.generator, entry)
        states = backend.encode_states(cost, *given)[: len(steps)]
        at = segment.values_of(steps)
        z = backend.candidates(states, segment.code).flatten()[: len(at)].cpu()
        self._keep(steps, states, at, z)
        return _measured(_part(posterior, at), z, budget.block_of(at))

    def _searched(self, segment: _Segment, steps: Tensor) -> tuple[Tensor, int | None]:
        """Steps to search for the best windows of some, and the bits that the first of them begins with."""
        code, first = segment.code, int(steps[0])
        if not code.overlap_bits:
            return steps, None
        ahead = _LOOK_AHEAD_WINDOWS * code.window_bits // code.step_bits
        searched = torch.arange(first, min(first + len(steps) + ahead, segment.steps.stop))
        if first == segment.first_step:
            return searched, None
        return searched, int(self.states[first - 1]) & ((1 << code.overlap_bits) - 1)

    def _keep(self, steps: Tensor, states: Tensor, at: Tensor, z: Tensor) -> None:
        device = self.values.device
        self.values[at.to(device)], self.is_coded[at.to(device)] = z.to(device), True
        self.states[steps.to(device)] = states.to(self.states)

    def is_sound(self) -> bool:
        """Whether the windows of a message all of whose windows are chosen stand for the values."""
        backend = choose(device=self.values.device)
        states = self.states.cpu().long()
        parts = [backend.candidates(states[s.steps], s.code).flatten()[: s.n_values] for s in self.segments]
        z = torch.cat(parts)
        return torch.equal(z.to(self.values), self.values)

    def packed(self) -> Tensor:
        """The bytes of a message all of whose windows are chosen, uint8 `[bytes]`."""
        states = self.states.cpu().long().numpy()
        return torch.cat([pack_states(states[s.steps], s.code) for s in self.segments])


def _part(posterior: Posterior, at: Tensor) -> Posterior:
    return Posterior(posterior.mean[at], posterior.variance[at])


def _measured(posterior: Posterior, z: Tensor, block_of_value: Tensor) -> Chosen:
    """KL by blocks and log importance weight, in float64."""
    exact = Posterior(posterior.mean.double(), posterior.variance.double())
    kl, (blocks, place) = kl_nats(exact, standard_prior()), block_of_value.unique(return_inverse=True)
    block_kl = kl.new_zeros(len(blocks)).index_add_(0, place, kl)
    return Chosen(block_kl, log_importance_weight(exact, standard_prior(), z))
