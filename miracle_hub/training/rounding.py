"""What a repository will hold in fewer bits is rounded in the model, before anybody evaluates it."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from miracle_hub.coding.narrowing import half_holds, is_narrowable
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


@torch.no_grad()
def round_as_written(model: nn.Module) -> list[str]:
    """Round what a repository of the model will hold in 16 bits, in place; the names of what changed.

    Vectors of weights and biases that are trained beside what is coded. A model that becomes one file, in
    which they keep their bits, is left as it is.
    """
    model, changed = unwrapped(model), []
    if not _becomes_a_repository(model):
        return changed
    kept = variational_of(model).config.modules_to_save or []
    for name, tensor in plain_tensors(model):
        if tensor.dtype != torch.float32 or not is_narrowable(name, tensor.shape) or matches(name, kept):
            continue
        rounded = tensor.half().float()
        if half_holds(tensor) and not torch.equal(rounded, tensor):
            tensor.copy_(rounded)
            changed.append(name)
    return changed


def _becomes_a_repository(model: nn.Module) -> bool:
    """Whether it is a model of transformers, as `compress_model` takes them."""
    is_of_transformers = hasattr(getattr(model, "config", None), "model_type")
    return is_of_transformers and variational_of(model).config.streams == "tensor"
