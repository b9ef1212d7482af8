"""The part of a variational model that says which draw of its weights is in use, and hands them out."""

import math
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from miracle_hub.errors import OptionError, WrittenWeightError
from miracle_hub.training.based import TrainingBase
from miracle_hub.training.codes import FilePlan
from miracle_hub.training.config import VariationalConfig
from miracle_hub.training.loans import Loans, Seen, is_wrapped
from miracle_hub.training.noise import noise_seed
from miracle_hub.training.passes import ATTRIBUTE, install
from miracle_hub.training.stream import Stream


class Variational(nn.Module):
    """The streams of a model, which belong to the modules whose weights they are, and the number of the draw.

    While training, every forward pass of the model has a draw of its own; a weight that is used twice in it,
    or computed again for gradient checkpointing, is the same weight, because noise is a function of the
    number of the draw. (So, with gradient checkpointing, `backward` comes before the next forward pass.) In
    evaluation the weights are the posterior's means; they have gradients where there is no noise.

    What is written into a weight between passes is written into its posterior, or refused.
    """

    def __init__(
        self,
        streams: Sequence[Stream],
        config: VariationalConfig,
        plan: FilePlan | None = None,
        base: TrainingBase | None = None,
    ) -> None:
        """
        Args:
            plan: of the file, where the budget is that of one.
            base: to which the streams are differences; they hold what they need of its tensors.
        """
        super().__init__()
        self.config, self.plan, self.base = config, plan, base
        self.streams = tuple(streams)
        # On the CPU wherever the model is: a kernel's launch must not wait for the device to read it.
        self.draw_number = torch.zeros((), dtype=torch.int64)
        self.tables: dict[str, Tensor] = {}  # buffers that no file holds, as they were
        self.n_passes = 0
        self.loans = Loans()
        self.drawn_at: int | None = None
        self.forget()

    def forget(self) -> None:
        """Drop the values of streams that are in use."""
        self.kept: dict[int, Tensor] = {}
        self.kept_of: dict[int, Seen] = {}
        self.used_without_grad: set[tuple[int, int]] = set()

    def begin_pass(self, training: bool) -> None:
        """Called before every forward pass of the model.

        Raises:
            WrittenWeightError: a weight was written to that cannot be.
        """
        if training != self.training:  # a module that holds it was frozen, as embeddings may be
            self.train(training)
        is_compiling = torch.compiler.is_compiling()
        if not is_compiling:
            self.settle()
        if self.training:
            self.next_draw()
            self.drawn_at = None if is_compiling else self._n_writes()
            # Streams of several tensors are drawn once for all; the others where they are used, so that
            # their weights live no longer than the layer needs them.
            joint = {i: stream for i, stream in enumerate(self.streams) if len(stream.members) > 1}
            for stream in joint.values():
                _refuse_gradients(stream)
            self.kept = {i: stream.draw(self.seed()) for i, stream in joint.items()}
        elif is_compiling:
            self.forget()
        else:
            self.kept = {i: values for i, values in self.kept.items() if self._is_up_to_date(i)}

    def next_draw(self) -> None:
        """Have another draw from now on."""
        self.forget()
        # Not in place: a compiled backward pass would read the number of the next draw, and draw other noise.
        self.draw_number = self.draw_number + 1

    def _is_up_to_date(self, stream: int) -> bool:
        """Means that take time are kept until what they are made of is another."""
        seen = self.kept_of.get(stream)
        return seen is not None and seen.is_now(self.streams[stream].tensors())

    def _n_writes(self) -> int:
        """How often the optimizer, or anybody else, has written to the posteriors."""
        return sum(p._version for stream in self.streams for p in stream.parameters())

    def seed(self) -> Tensor:
        """Of the noise: another one for every draw, and for every process of a distributed run."""
        return self.draw_number + noise_seed(self.config.seed, _rank())

    def weight(self, stream: int, member: int) -> Tensor:
        """The weights of a tensor in the draw, or their mean.

        Raises:
            WrittenWeightError: it was written to and cannot be.
        """
        if self._is_passing():
            return self.in_use(stream, member)
        key = (stream, member)
        self.settle(key)
        if self.training:
            self._draw_anew_after_a_step()
        weight = self.in_use(stream, member)
        if is_wrapped(weight):
            return weight
        return self.loans.lend(key, weight, self.streams[stream].owns(weight))

    def _draw_anew_after_a_step(self) -> None:
        """Modules may be called one by one, step after step, without a pass of the model."""
        n_writes = self._n_writes()
        if self.drawn_at is not None and self.drawn_at != n_writes:
            self.next_draw()
        self.drawn_at = n_writes

    def _is_passing(self) -> bool:
        """Whether a module runs, forward or backward, so that nobody else sees the weight."""
        if torch.compiler.is_compiling() or self.n_passes:
            return True
        return torch._C._current_graph_task_id() != -1

    def in_use(self, stream: int, member: int) -> Tensor:
        """What `weight` gives, for those who do not hand it on."""
        values = self._drawn(stream, member) if self.training else self._mean(stream)
        return self.streams[stream].weight(values, member)

    def mean(self, stream: int, member: int) -> Tensor:
        """The weights that evaluation has, by themselves."""
        self.settle((stream, member))
        own = self.streams[stream]
        return own.weight(own.mean(), member).detach().clone()

    def _drawn(self, stream: int, member: int) -> Tensor:
        values = self.kept.get(stream)
        if values is None or self._needs_own_graph(values, stream, member):
            _refuse_gradients(self.streams[stream])
            return self.streams[stream].draw(self.seed())
        return values

    def _mean(self, stream: int) -> Tensor:
        own = self.streams[stream]
        if not own.posterior.has_noise and torch.is_grad_enabled():
            return own.draw(self.seed())
        values = self.kept.get(stream)
        if values is None or not (self._is_passing() or self._is_up_to_date(stream)):
            values = self._mean_anew(stream)
        return values

    def _mean_anew(self, stream: int) -> Tensor:
        own = self.streams[stream]
        _refuse_gradients(own)
        with torch.inference_mode(False):  # they may be kept for a pass that has gradients
            values = own.mean()
            if not is_wrapped(values):
                self.kept[stream] = values
                if own.posterior.has_noise and not torch.compiler.is_compiling():
                    self.kept_of[stream] = Seen(own.tensors())
        return values

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

    def settle(self, key: tuple[int, int] | None = None) -> None:
        """Write what was written into weights into their posteriors.

        Args:
            key: of the only one to look at.

        Raises:
            WrittenWeightError: one cannot be; all are as they were before.
        """
        for (stream, member), weight in list(self.loans.written(key)):
            own = self.streams[stream]
            self.forget()
            if self.training and own.posterior.has_noise:
                raise WrittenWeightError(
                    f"{own.members[member].name}: expected no writes into a draw, which lasts for one "
                    "forward pass, found one; call model.eval() before, so that means are written"
                )
            own.write(member, weight)

    def check(self) -> None:
        """Called before weights are coded, or written to a file.

        Raises:
            WrittenWeightError: what evaluation has is not what the posteriors say.
        """
        self.settle()
        for i, values in self.kept.items() if not self.training else ():
            own = self.streams[i]
            if self._is_up_to_date(i) and not torch.equal(values, own.mean()):
                self.forget()
                raise WrittenWeightError(
                    f"{own.members[0].name}: expected the weights that the posterior has, found others in "
                    "use; do not write into weights while the model runs, as a hook may do"
                )

    def write(self, stream: int, member: int, weight: Any) -> None:
        """Have the posterior's mean at given weights.

        Raises:
            WrittenWeightError: it cannot be, or the weights are those of another posterior.
        """
        name, key = self.streams[stream].members[member].name, (stream, member)
        owner = self.loans.owner(weight) if isinstance(weight, Tensor) else None
        if owner is not None and owner != key:
            other = self.streams[owner[0]].members[owner[1]].name
            raise WrittenWeightError(
                f"{name}: expected weights of its own, found those of {other}; tie weights before "
                "make_variational, or after remove_variational(model)"
            )
        if owner == key:
            return self.settle(key)
        self.streams[stream].write(member, weight)
        self.forget()

    def train(self, mode: bool = True) -> "Variational":
        """See `nn.Module`; draws and means are not kept from one mode to the other."""
        self.settle()
        self.forget()
        return super().train(mode)

    @property
    def has_noise(self) -> bool:
        """Whether training draws weights."""
        return any(stream.posterior.has_noise for stream in self.streams)

    def tensors(self) -> Iterator[Tensor]:
        """Parameters and buffers of all streams."""
        return chain.from_iterable(stream.tensors() for stream in self.streams)

    def penalty(self) -> Tensor:
        """What posteriors add to the loss, `[]`, in nats: Σ β·KL over blocks that are not coded, or 0."""
        terms = [term for stream in self.streams if (term := stream.penalty()) is not None]
        return torch.stack(terms).sum() if terms else self.streams[0].scales().new_zeros(())

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
        self.settle()
        return {**self.__dict__, "kept": {}, "kept_of": {}, "loans": Loans(), "n_passes": 0}


def variational_of(model: nn.Module) -> Variational:
    """The variational part of a model, which may be wrapped, or be what a wrapper left of one.

    Raises:
        OptionError: the model has none.
    """
    found: Variational | None = None
    for module in model.modules():
        held = vars(module).get("holder")
        if isinstance(held, tuple) and isinstance(held[0], Variational):
            found = held[0]
            break
    if found is None:
        raise OptionError(
            f"model: expected a variational model, found {type(model).__name__} without posteriors; call "
            "make_variational(model, …) first"
        )
    if not any(ATTRIBUTE in vars(module) for module in model.modules()):
        install(model, found)  # the model of before was a wrapper that is gone
    return found


def _refuse_gradients(stream: Stream) -> None:
    """
    Raises:
        OptionError: torch.func asks for gradients of a posterior with noise, for which it has no rules.
    """
    if not stream.posterior.has_noise or torch.compiler.is_compiling():
        return
    if any(torch._C._functorch.is_gradtrackingtensor(p) for p in stream.parameters()):  # pyright: ignore
        raise OptionError(
            f"{stream.members[0].name}: expected loss.backward() for a posterior with noise, found "
            "torch.func asking for gradients; use torch.autograd, or parametrization='test-channel'"
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
