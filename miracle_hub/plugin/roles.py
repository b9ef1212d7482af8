"""What a model's class says of the tensors of a checkpoint: parameters, buffers, and what it calls them."""

import json
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from miracle_hub.codec.keeping import Roles
from miracle_hub.codec.naming import CONFIG
from miracle_hub.codec.source import list_tensors, weight_files

_VALUES_ALONE = "values alone: {why}"


def roles_of(folder: Path) -> Roles:
    """What the class that config.json names says of the tensors of a folder's checkpoint.

    The model is built without memory for its weights, and no code of the repository runs. Where that is not
    possible, whatever the reason, the answer says so and names no tensor: then their values decide.
    """
    if not (folder / CONFIG).is_file():
        return Roles(said_by=_VALUES_ALONE.format(why=f"there is no {CONFIG}"))
    names = [tensor.name for tensor in list_tensors(weight_files(folder))]
    try:
        model = _built(folder)
        found = _tensors_of_checkpoint(model, names)
    except Exception as error:  # a stranger's config may break a stranger's class in any way
        if isinstance(error, MemoryError):
            raise
        said = " ".join(str(error).split())[:200]
        return Roles(said_by=_VALUES_ALONE.format(why=f"{type(error).__name__}: {said}"))
    parameters = dict(model.named_parameters(remove_duplicate=False))
    buffers = dict(model.named_buffers(remove_duplicate=False))
    return Roles(
        frozenset(name for name, final in found.items() if final in buffers),
        frozenset(name for name, final in found.items() if final in parameters),
        type(model).__name__,
        {name: final for name, final in found.items() if name != final},
    )


def _built(folder: Path) -> PreTrainedModel:
    """The model on the meta device."""
    stated = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    architectures = stated.get("architectures")
    name = architectures[0] if isinstance(architectures, list) and architectures else ""
    cls: Any = getattr(transformers, name, None) if isinstance(name, str) else None
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what a config asks for: that is for who loads the model
        if isinstance(cls, type) and issubclass(cls, PreTrainedModel):
            return cls._from_config(config)
        return AutoModel.from_config(config, trust_remote_code=False)


def _tensors_of_checkpoint(model: PreTrainedModel, names: Iterable[str]) -> Mapping[str, str]:
    """The model's name of every tensor of a checkpoint, as transformers finds it when it loads them."""
    conversions = get_model_conversion_mapping(model)
    renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
    converters = [c for c in conversions if isinstance(c, WeightConverter)]
    # Buffers that are not persistent too: older versions saved some of them.
    built: dict[str, Tensor] = {**model.state_dict(), **dict(model.named_buffers(remove_duplicate=False))}
    prefix = model.base_model_prefix
    return {name: rename_source_key(name, renamings, converters, prefix, built)[0] for name in names}
