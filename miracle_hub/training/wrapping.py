"""What wraps a variational model for several devices: DistributedDataParallel works, the rest is refused."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map

from miracle_hub.errors import OptionError
from miracle_hub.training.stream import Stream


class Streams(Protocol):
    """The variational part of a model, as far as wrappers matter."""

    @property
    def streams(self) -> Sequence[Stream]:
        """Whose parameters are trained."""
        ...


# What a wrapper shares gradients of; asked for once, since the answer comes with tensors of their size.
_SHARED: WeakKeyDictionary[DistributedDataParallel, set[Tensor]] = WeakKeyDictionary()
# Models whose refits share gradients themselves, with the wrappers that are silent meanwhile.
_SILENCED: WeakKeyDictionary[Streams, list[DistributedDataParallel]] = WeakKeyDictionary()


def refuse_wrapped(model: nn.Module) -> None:
    """Before conversion: a wrapper has made its plans for the parameters that are replaced.

    Raises:
        OptionError: something of the model is wrapped for distribution, or lies on several devices in parts.
    """
    refuse_sharded(model)
    for name, module in model.named_modules():
        if isinstance(module, DistributedDataParallel | nn.DataParallel):
            raise OptionError(
                f"{name or 'model'}: expected a model that nothing wraps, found {type(module).__name__}; "
                "call make_variational first, and wrap what it returns"
            )


def refuse_sharded(model: nn.Module) -> None:
    """
    Raises:
        OptionError: a parameter lies on several devices in parts.
    """
    for name, parameter in model.named_parameters():
        kind = type(parameter).__name__
        if kind in ("DTensor", "FlatParameter") or hasattr(parameter, "ds_id"):
            raise OptionError(
                f"{name}: expected a whole parameter, found one that is sharded ({kind}, as FSDP, tensor "
                "parallelism and ZeRO-3 have them); train with DistributedDataParallel instead, as torchrun "
                "does without them"
            )


def check_pass(model: nn.Module, variational: Streams) -> None:
    """Before a forward pass: whether what wraps the model knows its parameters.

    Raises:
        OptionError: it does not, so that gradients would not be shared.
    """
    if getattr(model, "_is_replica", False):
        raise OptionError(
            "model: expected one copy in a process, found a replica of nn.DataParallel; start a process per "
            "device with torchrun, or use one device (CUDA_VISIBLE_DEVICES=0)"
        )
    wrapper = _active_wrapper()
    if wrapper is None or not torch.is_grad_enabled() or not wrapper.training:
        return
    if not wrapper.require_backward_grad_sync:
        return
    if (silenced := _SILENCED.get(variational)) is not None:
        wrapper.require_backward_grad_sync = False
        silenced.append(wrapper)
    else:
        _check_known(wrapper, variational)


def _check_known(wrapper: DistributedDataParallel, variational: Streams) -> None:
    if (known := _SHARED.get(wrapper)) is None:
        buckets = wrapper.reducer._get_zeros_like_grad_buckets()
        known = _SHARED[wrapper] = {parameter for bucket in buckets for parameter in bucket.parameters()}
    are_trained = wrapper.find_unused_parameters or all(p.requires_grad for p in known)
    if not are_trained or any(p not in known for p in _trained(variational)):
        raise OptionError(
            "model: expected DistributedDataParallel around a model that did not change since, found other "
            "parameters to train than when it was wrapped; wrap it after make_variational, and anew after "
            "code_model"
        )


def _trained(variational: Streams) -> list[nn.Parameter]:
    return [p for stream in variational.streams for p in stream.parameters() if p.requires_grad]


def _active_wrapper() -> DistributedDataParallel | None:
    return getattr(DistributedDataParallel, "_active_ddp_module", None)


@contextmanager
def own_reduction(variational: Streams) -> Iterator[None]:
    """Refits share gradients themselves: whatever wraps the model leaves them alone meanwhile."""
    _SILENCED[variational] = []
    try:
        yield
    finally:
        for wrapper in _SILENCED.pop(variational):
            wrapper.require_backward_grad_sync = True


def with_penalty(variational: Streams, output: Any) -> Any:
    """A forward pass's output that depends, as the graph has it, on all that the penalty depends on.

    DistributedDataParallel takes what an output does not depend on for unused, shares its gradient at once,
    and fails when the penalty brings another one.
    """
    if _active_wrapper() is None or not torch.is_grad_enabled() or not _has_penalty(variational):
        return output
    parameters = _trained(variational)

    def tied(value: Any) -> Any:
        has_gradient = isinstance(value, Tensor) and value.requires_grad
        return _Tied.apply(value, *parameters) if has_gradient else value

    return tree_map(tied, output)


def _has_penalty(variational: Streams) -> bool:
    return any(stream.posterior.has_penalty for stream in variational.streams)


class _Tied(torch.autograd.Function):
    """A tensor itself; no gradients for the parameters, which only seem to have a part in it."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, *parameters: Tensor) -> Tensor:
        ctx.n_parameters = len(parameters)
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad, *[None] * ctx.n_parameters
