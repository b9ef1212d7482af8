"""The part of a variational model that holds its streams and says which draw of them is in use."""

import torch
from torch import Tensor, nn

from miracle_hub.errors import OptionError
from miracle_hub.training.config import VariationalConfig
from miracle_hub.training.stream import Stream

ATTRIBUTE = "_miracle"  # where a model has it, in a tuple: Sequential would run a child of its own


class Variational(nn.Module):
    """Streams of a model, the number of the draw, and β per block.

    While training, every forward pass of the model has a draw of its own; a weight that is used twice in it,
    or computed again for gradient checkpointing, is the same weight, because noise is a function of the draw's
    number. In evaluation the weights are the posterior's means, without gradients.
    """

    def __init__(self, streams: list[Stream], config: VariationalConfig) -> None:
        super().__init__()
        self.config = config
        self.streams = nn.ModuleList(streams)
        # On the CPU wherever the model is: a kernel's launch must not wait for the device to read it.
        self.draw_number = torch.zeros((), dtype=torch.int64)
        self.kept: dict[int, Tensor] = {}
        self.log_betas: list[Tensor] = []
        if config.parametrization == "mean-var":
            start = torch.tensor(config.beta).log()
            for i, stream in enumerate(streams):
                self.register_buffer(f"log_beta_{i}", start.expand(stream.kl_nats().numel()).clone())

    def begin_pass(self) -> None:
        """Called before every forward pass of the model."""
        self.kept = {}
        if self.training:
            self.draw_number.add_(1)
            # Streams of several tensors are drawn once for all; the others where they are used, so that
            # their weights live no longer than the layer needs them.
            self.kept = {i: s.draw(self.seed()) for i, s in enumerate(self.streams) if len(s.members) > 1}

    def seed(self) -> Tensor:
        """Of the noise: another one for every draw, and for every process of a distributed run."""
        return self.draw_number + ((self.config.seed % 2**16) * 2**47 + _rank() * 2**40)

    def weight(self, stream: int, member: int) -> Tensor:
        """The weights of a tensor in the draw, or their mean."""
        own: Stream = self.streams[stream]  # pyright: ignore[reportAssignmentType]
        if stream not in self.kept:
            values = own.draw(self.seed()) if self.training else own.mean()
            if self.training:
                return own.weight(values, member)
            self.kept[stream] = values
        return own.weight(self.kept[stream], member)

    def train(self, mode: bool = True) -> "Variational":
        self.kept = {}
        return super().train(mode)

    def penalty(self) -> Tensor:
        """Σ β·KL over the blocks that are not coded, in nats; 0 for Mean-KL, whose KL is fixed."""
        terms = [
            (self._log_beta(i).exp() * _uncoded(stream) * stream.kl_nats()).sum()
            for i, stream in enumerate(self.streams)
            if self.config.parametrization == "mean-var"
        ]
        return torch.stack(terms).sum() if terms else next(self.parameters()).new_zeros(())

    @torch.no_grad()
    def anneal(self) -> None:
        """After every step of the optimizer: β grows where a block's KL is above its budget, else shrinks.

        Source: Havasi et al. 2019, algorithm 2, lines 15 to 27.
        """
        if self.config.parametrization != "mean-var":
            return
        step = torch.log1p(torch.tensor(self.config.beta_rate))
        for i, stream in enumerate(self.streams):
            above = stream.kl_nats() > stream.posterior.block_kl_nats
            self._log_beta(i).add_(torch.where(above, step, -step))

    @torch.no_grad()
    def kl_bits(self) -> float:
        """KL of everything that is not coded, in bits."""
        nats = sum(float((_uncoded(s) * s.kl_nats()).sum()) for s in self.streams)
        return nats / float(torch.tensor(2.0).log())

    def _log_beta(self, stream: int) -> Tensor:
        return getattr(self, f"log_beta_{stream}")

    def get_extra_state(self) -> Tensor:
        return self.draw_number

    def set_extra_state(self, state: Tensor) -> None:
        self.draw_number = state.detach().cpu().clone()

    def __getstate__(self) -> dict:
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


def _uncoded(stream: Stream) -> Tensor:
    """1 for every block of which something is not coded."""
    n_blocks, width = stream.kl_nats().numel(), stream.posterior.block_weights
    if stream.is_coded is None:
        return stream.log_scales.new_ones(n_blocks)
    padded = nn.functional.pad(~stream.is_coded, (0, -stream.is_coded.numel() % width))
    return padded.view(-1, width).any(1).float()


def _rank() -> int:
    import torch.distributed as distributed

    return distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else 0
