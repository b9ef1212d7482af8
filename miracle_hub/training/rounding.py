"""What a repository will hold in fewer bits is rounded in the model, before anybody evaluates it."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from miracle_hub.coding.narrowing import is_held_in_half
from miracle_hub.names import matches
from miracle_hub.training.drawn import DrawnWeight
from miracle_hub.training.model import variational_of
from miracle_hub.training.passes import ATTRIBUTE


def unwrapped(model: nn.Module) -> nn.Module:
    """The module that was made variational, out of what distribution or compilation wraps around it."""
    while ATTRIBUTE not in vars(model):
        inner = getattr(model, "_orig_mod", None) or getattr(model, "module", None)
        if not isinstance(inner, nn.Module):
            break
        model = inner
    return model


def plain_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and persistent buffers that are no part of posteriors, by every name that they have."""
    drawn = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, DrawnWeight))
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor) and not name.startswith(drawn):
            yield name, tensor


def planned_half(model: nn.Module) -> frozenset[str] | None:
    """The vectors that the file of a model has in 16 bits, decided by a budget before training; None where
    their values decide. One that float16 holds no longer keeps its 32 bits.
    """
    plan = variational_of(model).plan
    if plan is None or plan.half is None:
        return None
    tensors = dict(plain_tensors(model))
    return frozenset(name for name in plan.half & set(tensors) if _fits(tensors[name]))


@torch.no_grad()
def _fits(tensor: Tensor) -> bool:
    return bool(tensor.half().isfinite().all())


@torch.no_grad()
def round_as_written(model: nn.Module) -> list[str]:
    """Round what the file of the model will hold in 16 bits, in place; the names of what changed.

    Vectors of weights and biases that are trained beside what is coded. A model without a budget that becomes
    one file, in which they keep their bits, is left as it is.
    """
    model, changed = unwrapped(model), []
    half = planned_half(model)
    if half is None:
        half = _held_in_half(model) if _becomes_a_repository(model) else frozenset()
    for name, tensor in plain_tensors(model):
        rounded = tensor.half().to(tensor.dtype) if name in half else tensor
        if not torch.equal(rounded, tensor):
            tensor.copy_(rounded)
            changed.append(name)
    return changed


def _held_in_half(model: nn.Module) -> frozenset[str]:
    """What values decide, as `codec.plan` does."""
    variational = variational_of(model)
    kept, base = variational.config.modules_to_save or [], variational.base
    own = ((n, t) for n, t in plain_tensors(model) if base is None or n not in base.unchanged)
    return frozenset(name for name, t in own if is_held_in_half(name, t) and not matches(name, kept))


def _becomes_a_repository(model: nn.Module) -> bool:
    """Whether it is a model of transformers, as `compress_model` takes them."""
    is_of_transformers = hasattr(getattr(model, "config", None), "model_type")
    return is_of_transformers and variational_of(model).config.streams == "tensor"
