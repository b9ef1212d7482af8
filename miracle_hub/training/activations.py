"""What an error of a weight costs: the curvature of its layer's squared output error.

Of a layer y = W·x, errors E of W cost E‖E·x‖² = Σ E_ij²·E[x_j²], as far as inputs are uncorrelated: a column
of W matters by the mean square of its input.

Source: LeCun et al. 1990, "Optimal brain damage", for errors weighted by a diagonal of the curvature.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from miracle_hub.errors import TrainingError
from miracle_hub.training.drawn import drawn_attributes
from miracle_hub.training.guard import Snapshot
from miracle_hub.training.model import variational_of
from miracle_hub.training.posteriors.protocol import Weighted
from miracle_hub.training.processes import Processes
from miracle_hub.training.stream import Stream

# Of the mean: a column that no input was seen for may have one tomorrow. How small is a choice.
_LEAST = 0.02
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
# A class that has another forward may pass its inputs in another order.
_FORWARDS = {kind.forward for kind in (nn.Linear, *_CONVOLUTIONS)}


def measure_curvature(
    model: nn.Module, run: Callable[[int], Any], batches: int, processes: Processes | None = None
) -> None:
    """Give posteriors that take it the curvature of their columns, before anything is coded.

    Linear layers and convolutions without groups have one; elsewhere, and for posteriors of other kinds,
    nothing changes. Buffers, the number of the draw and torch's random states are as before.

    MiniLM on SST-2 at 1 bit, 930 steps of refits, held-back rows: 0.092 nats between coded and fitted model
    and 0.288 of relative error in hidden states, against 0.108 and 0.336 of equal curvatures.

    Args:
        run: runs the model, which is in the mode it has, on the i-th batch, as the loss of refits does.
        processes: that share the batches.

    Raises:
        TrainingError: an input of a layer is not finite.
    """
    layers, sums = list(_layers(model)), {}
    if not layers or not batches:
        return
    before, processes = Snapshot(model), processes or Processes()
    hooks = [m.register_forward_pre_hook(_Sum(sums, stream), with_kwargs=True) for m, stream in layers]
    try:
        with processes.together(), torch.random.fork_rng():
            for number in range(processes.rank, batches, processes.count):
                run(number)
    finally:
        for hook in hooks:
            hook.remove()
        before.restore()
    if processes.count > 1:
        sums = _of_all(sums, dict.fromkeys(stream for _, stream in layers), processes)
    for stream, total in sums.items():
        if not bool(total.isfinite().all()):
            raise TrainingError(
                f"{stream.members[0].name}: expected finite inputs of its layer, found {float(total.sum())} "
                f"as the sum of their squares over {batches} batches; nothing is coded: look at the data"
            )
    for stream, total in sums.items():
        assert isinstance(stream.posterior, Weighted)
        relative = (total / total.mean().clamp(min=torch.finfo(total.dtype).tiny)).clamp(min=_LEAST)
        stream.posterior.curvature = (relative / relative.mean()).to(stream.posterior.curvature)


def _of_all(
    sums: dict[Stream, Tensor], streams: Iterable[Stream], processes: Processes
) -> dict[Stream, Tensor]:
    """Sums over the batches of all processes; streams whose layer none of them ran are left out."""
    found = {}
    for stream in streams:
        own = sums.get(stream)
        if own is None:
            own = next(stream.parameters()).new_zeros(math.prod(stream.members[0].shape[1:])).double()
        total = torch.cat([own, own.new_full((1,), stream in sums)])
        processes.add(total)
        if total[-1] > 0:
            found[stream] = total[:-1]
    return found


def _layers(model: nn.Module) -> Iterator[tuple[nn.Module, Stream]]:
    """Layers whose weight has a stream that takes curvature, a column for every input, or input and tap."""
    variational = variational_of(model)
    for module in model.modules():
        is_known = type(module).forward in _FORWARDS and getattr(module, "groups", 1) == 1
        for name, drawn in drawn_attributes(module) if is_known else ():
            stream = variational.streams[drawn.stream]
            takes_it = stream.layout.has_columns and isinstance(stream.posterior, Weighted)
            if name == "weight" and drawn.holder[0] is variational and takes_it:
                yield module, stream


class _Sum:
    """A hook that adds up the squares of a layer's inputs, by column."""

    def __init__(self, sums: dict[Stream, Tensor], stream: Stream) -> None:
        self.sums, self.stream = sums, stream

    @torch.no_grad()
    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        x = inputs[0] if inputs else named["input"]
        if not _is_plain(x):
            return
        taps = 1
        if isinstance(module, _CONVOLUTIONS):
            x = x.movedim(-1 - len(module.kernel_size), -1)  # channels last, with a batch or without one
            taps = math.prod(module.kernel_size)
        squares = x.reshape(-1, x.shape[-1]).double().square().sum(0).repeat_interleave(taps)
        self.sums[self.stream] = self.sums.get(self.stream, 0) + squares


def _is_plain(x: Tensor) -> bool:
    """Whether a tensor has values of its own, in equal rows: nested ones and those of vmap have not."""
    is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor(x)  # pyright: ignore
    return x.layout == torch.strided and not x.is_nested and not is_wrapped
