"""The base of a model that is to be fine-tuned, by the names that the model in memory has."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from miracle_hub.codec.detector import TO_DECODE
from miracle_hub.codec.differences import Differences
from miracle_hub.codec.dtypes import EXACT_DTYPES
from miracle_hub.codec.repository import open_repository
from miracle_hub.errors import OptionError
from miracle_hub.finetune.budget import is_hub_model
from miracle_hub.format.spec import TensorSpec
from miracle_hub.hub.resolve import local_folder
from miracle_hub.names import matches
from miracle_hub.training.based import TrainingBase
from miracle_hub.training.config import VariationalConfig

_SPELLED = {dtype: name for name, dtype in EXACT_DTYPES.items()}


def training_base(model: nn.Module, config: VariationalConfig) -> TrainingBase | None:
    """What the options say that differences are to; None if they say nothing.

    Raises:
        OptionError: the model becomes no repository, which alone can state a base.
        SourceError: there is no such base, or it has no tensor of the model.
        BaseModelError: it cannot be read, or has a base itself.
    """
    if config.base is None:
        return None
    if not is_hub_model(model):
        raise OptionError(
            f"base: expected a model of transformers, whose repository states its base, found "
            f"{type(model).__name__}; leave base out"
        )
    state = {n: t.detach() for n, t in model.state_dict(keep_vars=True).items() if isinstance(t, Tensor)}
    folder = local_folder(config.base, taken=TO_DECODE)
    tensors = _tensors_of(folder, state)
    kept = config.modules_to_save or []
    unchanged = frozenset(
        name for name, theirs in tensors.items() if not matches(name, kept) and _is_same(state[name], theirs)
    )
    return TrainingBase(folder, unchanged, tensors)


def _tensors_of(folder: Path, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a base by all names that the model has for them, of which files have one of tied tensors."""
    specs = [TensorSpec(name, _SPELLED[t.dtype], tuple(t.shape)) for name, t in state.items()]
    # A model in memory has no folder whose type could be compared: names and shapes tell.
    differences = Differences.of(folder, folder, specs, lambda path: open_repository(path).tensors)
    found = {spec.name: theirs for spec in specs if (theirs := differences.theirs(spec)) is not None}
    by_memory = {_memory(state[name]): theirs.load().cpu() for name, theirs in found.items()}
    return {name: by_memory[key] for name, t in state.items() if (key := _memory(t)) in by_memory}


def _memory(tensor: Tensor) -> tuple[int, torch.Size]:
    return tensor.data_ptr(), tensor.shape


def _is_same(own: Tensor, theirs: Tensor) -> bool:
    return torch.equal(own.cpu(), theirs.to(own.dtype))
