"""The part of a variational model that holds its streams and says which draw of them is in use."""

import math
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, cast

import torch
from torch import Tensor, nn

from miracle_hub.errors import OptionError
from miracle_hub.training.codes import FilePlan
from miracle_hub.training.config import VariationalConfig
from miracle_hub.training.stream import Stream

ATTRIBUTE = "_miracle"  # where a model has it, in a tuple: Sequential would run a child of its own


class Variational(nn.Module):
    """Streams of a model, and the number of the draw.

    While training, every forward pass of the model has a draw of its own; a weight that is used twice in it,
    or computed again for gradient checkpointing, is the same weight, because noise is a function of the
    number of the draw. (So, with gradient checkpointing, `backward` comes before the next forward pass.) In
    evaluation the weights are the posterior's means, without gradients. The test channel has no noise.
    """

    def __init__(
        self, streams: Sequence[Stream], config: VariationalConfig, plan: FilePlan | None = None
    ) -> None:
        """
        Args:
            plan: of the file, where the budget is that of one.
        """
        super().__init__()
        self.config, self.plan = config, plan
        self.streams = cast(Sequence[Stream], nn.ModuleList(streams))
        # On the CPU wherever the model is: a kernel's launch must not wait for the device to read it.
        self.draw_number = torch.zeros((), dtype=torch.int64)
        self.forget()

    def forget(self) -> None:
        """Drop the values of streams that are in use."""
        self.kept: dict[int, Tensor] = {}
        self.used_without_grad: set[tuple[int, int]] = set()
        self.kept_versions: list[int] = []

    def begin_pass(self) -> None:
        """Called before every forward pass of the model."""
        if self.training:
            self.forget()
            self.next_draw()
            # Streams of several tensors are drawn once for all; the others where they are used, so that
            # their weights live no longer than the layer needs them.
            self.kept = {i: s.draw(self.seed()) for i, s in enumerate(self.streams) if len(s.members) > 1}
        else:
            self._forget_if_written()

    def next_draw(self) -> None:
        """Have another draw from now on."""
        # Not in place: a compiled backward pass would read the number of the next draw, and draw other noise.
        self.draw_number = self.draw_number + 1

    def _forget_if_written(self) -> None:
        """Means, which take time, are kept until a parameter or buffer of theirs is written to."""
        if torch.compiler.is_compiling():
            return self.forget()
        versions = [tensor._version for tensor in chain(self.parameters(), self.buffers())]
        if versions != self.kept_versions:
            self.forget()
            self.kept_versions = versions

    def seed(self) -> Tensor:
        """Of the noise: another one for every draw, and for every process of a distributed run."""
        return self.draw_number + ((self.config.seed % 2**16) * 2**47 + (_rank() % 2**7) * 2**40)

    def weight(self, stream: int, member: int) -> Tensor:
        """The weights of a tensor in the draw, or their mean."""
        own = self.streams[stream]
        values = self.kept.get(stream)
        if not self.training and values is None:
            self._forget_if_written()
            with torch.inference_mode(False):  # they may be kept for a pass that has gradients
                values = self.kept[stream] = own.mean()
        elif values is None or self._needs_own_graph(values, stream, member):
            values = own.draw(self.seed())
        return own.weight(values, member)

    def _needs_own_graph(self, values: Tensor, stream: int, member: int) -> bool:
        """Whether the graph that values belong to is of no use.

        Reentrant checkpointing runs a layer without gradients, and again with them in a backward pass of its
        own, which frees all that it went through: the values of a stream would serve for one layer only.
        """
        if torch.is_grad_enabled():
            return (stream, member) in self.used_without_grad
        if self.training and values.requires_grad:
            self.used_without_grad.add((stream, member))
        return False

    def train(self, mode: bool = True) -> "Variational":
        """See `nn.Module`; draws and means are not kept from one mode to the other."""
        self.forget()
        return super().train(mode)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "Variational":
        self.forget()
        return super()._apply(fn, recurse)

    @property
    def has_noise(self) -> bool:
        """Whether training draws weights."""
        return any(stream.posterior.has_noise for stream in self.streams)

    def penalty(self) -> Tensor:
        """What posteriors add to the loss, `[]`, in nats: Σ β·KL over blocks that are not coded, or 0."""
        terms = [term for stream in self.streams if (term := stream.penalty()) is not None]
        return torch.stack(terms).sum() if terms else next(self.parameters()).new_zeros(())

    def after_step(self) -> None:
        """What posteriors do after every step of the optimizer."""
        for stream in self.streams:
            stream.posterior.after_step()

    @torch.no_grad()
    def kl_bits(self) -> float:
        """KL of everything that is not coded, in bits."""
        return sum(float(stream.kl_nats_left().sum()) for stream in self.streams) / math.log(2)

    def get_extra_state(self) -> Tensor:
        """The number of the draw, which state dicts hold."""
        return self.draw_number

    def set_extra_state(self, state: Tensor) -> None:
        """Go on from the number of a draw."""
        self.forget()
        self.draw_number = state.detach().cpu().clone()

    def __getstate__(self) -> dict[str, Any]:
        # Draws belong to the graph of a forward pass, which cannot be copied.
        return {**self.__dict__, "kept": {}}


def variational_of(model: nn.Module) -> Variational:
    """The variational part of a model, which may be wrapped for compilation or distribution.

    Raises:
        OptionError: the model has none.
    """
    for module in model.modules():
        if isinstance(module, Variational):
            return module
    raise OptionError(
        f"model: expected a variational model, found {type(model).__name__} without posteriors; call "
        "make_variational(model, …) first"
    )


def kl_penalty(model: nn.Module) -> Tensor:
    """Σ β·KL in nats, to add to the loss; 0 for posteriors whose KL is fixed.

    Raises:
        OptionError: the model is not variational.
    """
    return variational_of(model).penalty()


def anneal(model: nn.Module) -> None:
    """Move β after a step of the optimizer; posteriors whose KL is fixed have none.

    Raises:
        OptionError: the model is not variational.
    """
    variational_of(model).after_step()


def _rank() -> int:
    import torch.distributed as distributed

    return distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else 0
