"""A stream: the tensors that share a message, their posterior, and what of it is coded."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from miracle_hub.code import StreamCode
from miracle_hub.coding import posterior as coding
from miracle_hub.errors import OptionError, WrittenWeightError
from miracle_hub.training.blocks import StreamBudget
from miracle_hub.training.layout import Layout, Member
from miracle_hub.training.message import Chosen, Message, Selector
from miracle_hub.training.posteriors.protocol import Posterior

# It keeps costs of a posterior that is nearly a point finite in float32. A value's KL is cut by it above 49
# bits, more than twice the largest rate: only blocks that give nearly everything to one value go so far.
_LEAST_VARIANCE = 1e-30
# Ends of the names in a stream's state that are there, or have their size, only since coding has begun.
BEGUN = tuple(f"message.{name}" for name in ("values", "is_coded", "states")) + (
    "posterior.fixed_scales",
    "posterior.curvature",
)


class Stream(nn.Module):
    """Tensors that share a message.

    Attributes:
        layout: which values they have, and in which order.
        posterior: of these values, and the scales of their prior.
        code: of the message.
        number: of the stream in its model; also of its noise.
        message: what of it is chosen so far; None before coding.
    """

    layout: Layout
    posterior: Posterior
    message: Message | None

    def __init__(self, layout: Layout, posterior: Posterior, code: StreamCode, number: int) -> None:
        super().__init__()
        self.code, self.number = code, number
        self.layout, self.posterior = layout, posterior
        self.register_module("message", None)

    @property
    def members(self) -> tuple[Member, ...]:
        """The tensors, in their order."""
        return self.layout.members

    @property
    def n_values(self) -> int:
        """How many values are coded."""
        return self.layout.n_values

    @property
    def budget(self) -> StreamBudget:
        """The KL that the message pays for."""
        return self.posterior.budget

    def n_coded(self) -> int:
        """How many values are coded by now."""
        return 0 if self.message is None else self.message.n_coded()

    def begin_coding(self) -> Message:
        """Round the scales as the file holds them, and fix them: what is coded depends on them."""
        if self.message is None:
            self.posterior.fix_scales()
            device = self.posterior.scales().device
            self.message = Message(self.code, self.n_values).to(device)
        return self.message

    def code_steps(self, steps: Tensor, selector: Selector) -> Chosen:
        """Choose candidates for some steps of the message, and fix the values to them."""
        message, posterior = self.begin_coding(), coding.Posterior(*self.moments())
        return message.choose(steps, posterior, self.budget, selector)

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *arguments: Any, **keywords: Any
    ) -> None:
        """What is coded comes with a state, into a stream where nothing is."""
        if f"{prefix}message.states" in state_dict:
            self.begin_coding()
        super()._load_from_state_dict(state_dict, prefix, *arguments, **keywords)

    def draw(self, seed: Tensor) -> Tensor:
        """Values `[n]` of a step of training in stream order, or what is coded."""
        return self._with_coded(self.posterior.draw(seed, self.number))

    def mean(self) -> Tensor:
        """Values `[n]` to evaluate at in stream order, or what is coded; without gradients."""
        with torch.no_grad():
            return self._with_coded(self.posterior.mean())

    def sample(self, seed: Tensor) -> Tensor:
        """A draw of the posterior, or what is coded, in stream order; without gradients."""
        with torch.no_grad():
            return self._with_coded(self.posterior.sample(seed, self.number))

    def _with_coded(self, values: Tensor) -> Tensor:
        return values if self.message is None else self.message.over(values, self.posterior.value_scales())

    def weight(self, values: Tensor, number: int) -> Tensor:
        """One member's weights in their shape and dtype, from the stream's values."""
        return self.layout.weight(values, number)

    def tensors(self) -> list[Tensor]:
        """Parameters and buffers."""
        return list(chain(self.parameters(), self.buffers()))

    def owns(self, weight: Tensor) -> bool:
        """Whether a tensor lies in the memory of the posterior's parameters."""
        own = {p.untyped_storage().data_ptr() for p in self.parameters()}
        return weight.untyped_storage().data_ptr() in own

    @torch.no_grad()
    def write(self, number: int, weight: Any) -> None:
        """Have one member's mean at given weights.

        Raises:
            WrittenWeightError: coding has begun, they are no such weights, or the posterior cannot have them.
        """
        member = self.members[number]
        if self.message is not None:
            raise WrittenWeightError(
                f"{member.name}: expected no writes once coding has begun, found one, which no file could "
                "show; merge and write before code_model, or call remove_variational(model), write, and make "
                "it variational and code it again"
            )
        wanted = f"{member.dtype} {member.shape}"
        found = f"{weight.dtype} {tuple(weight.shape)}" if isinstance(weight, Tensor) else repr(weight)
        if found != wanted:
            raise WrittenWeightError(
                f"{member.name}: expected weights of {wanted}, found {found}; change shapes (as "
                "resize_token_embeddings does) and dtypes before make_variational, or after "
                "remove_variational(model)"
            )
        if not bool(weight.isfinite().all()):
            raise WrittenWeightError(
                f"{member.name}: expected finite weights, found NaN or infinity; what was written is dropped"
            )
        values, are_written = self.layout.written(weight, number)
        is_shared = member.sharing.kind != "none"
        if is_shared and not torch.equal(self.layout.weight(values, number), weight.float().to(member.dtype)):
            raise WrittenWeightError(
                f"{member.name}: expected equal weights where they share a value, found others; write before "
                "make_variational, or share less"
            )
        if misfit := self.posterior.set_mean(values, are_written):
            raise WrittenWeightError(f"{member.name}: {misfit}")

    def cast(self, number: int, fn: Callable[[Tensor], Tensor]) -> None:
        """Hand out a member in another dtype; the posterior keeps its own."""
        members = list(self.members)
        empty = torch.empty(0, dtype=members[number].dtype, device=self.scales().device)
        members[number] = replace(members[number], dtype=fn(empty).dtype)
        self.layout.members = tuple(members)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Stream":
        """Devices change; dtypes are those of weights, not of what they are made from."""

        def on_device(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(on_device, recurse)

    def scales(self) -> Tensor:
        """The prior's, `[scales]`: one for every member, or row; those of the file once coding has begun."""
        return self.posterior.scales()

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean and variance of every value, `[n]` in stream order, in units of the prior, on the CPU."""
        mean, variance = self.posterior.moments()
        return mean.cpu(), variance.cpu().clamp(min=_LEAST_VARIANCE)

    def kl_nats(self) -> Tensor:
        """KL of every block, `[blocks]`."""
        return self.posterior.kl_nats()

    def kl_nats_left(self) -> Tensor:
        """KL of every block, `[blocks]`; 0 of those that are coded."""
        return self._where_left(self.kl_nats())

    def penalty(self) -> Tensor | None:
        """What the blocks that are not coded add to the loss, `[]`, in nats; None for nothing."""
        by_block = self.posterior.penalty()
        return None if by_block is None else self._where_left(by_block).sum()

    def _where_left(self, blocks: Tensor) -> Tensor:
        return blocks if self.message is None else blocks * self.message.blocks_left(self.budget)


def message_of(stream: Stream) -> Tensor:
    """The message of a stream that is coded, uint8 `[bytes]`.

    Raises:
        OptionError: something of it is not coded.
        WrittenWeightError: the message stands for other values than those in use.
    """
    if stream.message is None or stream.n_coded() < stream.n_values:
        raise OptionError(
            f"{stream.members[0].name}: expected a coded stream, found one that is not; call "
            "code_model(model, …) first"
        )
    if not stream.message.is_sound():
        raise WrittenWeightError(
            f"{stream.members[0].name}: expected a message that stands for the weights in use, found "
            "another: its buffers were averaged or written to; average before code_model, or parameters alone"
        )
    return stream.message.packed()
