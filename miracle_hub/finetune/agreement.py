"""The model in memory and the file that it became: the same bits, or it is said where they are not."""

import copy
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import type_before_parametrizations

from miracle_hub.errors import ChecksumError, OptionError
from miracle_hub.training.drawn import drawn_attributes
from miracle_hub.training.rounding import plain_tensors

_LOGGER = logging.getLogger("miracle_hub")


def require_own_tensors(model: Any) -> None:
    """Before anything is coded or written: a stranger has the class and the config, and no more.

    Raises:
        OptionError: the model has other tensors than its class makes of its config. Of those,
            `from_pretrained` would leave some out, and draw others at random.
    """
    kind, found = type_before_parametrizations(model), _tensors(model)
    with torch.device("meta"):
        own = _tensors(kind(copy.deepcopy(model.config)))
    for name in sorted(own.keys() | found.keys()):
        texts = [_said(name, tensors) for tensors in (found, own)]
        if texts[0] != texts[1]:
            raise OptionError(
                f"model: expected the tensors that {kind.__name__} makes of its config, as from_pretrained "
                f"does, found {name}: {texts[0]} in the model, {texts[1]} in what is loaded; change the "
                "config with the model (num_labels, num_hidden_layers, tie_word_embeddings, …), call "
                "prune.remove, write a class of your own, or call save and load, which take any module"
            )
    _require_own_ties(kind.__name__, found, own)


def _require_own_ties(kind: str, found: "_Tensors", own: "_Tensors") -> None:
    firsts: dict[Any, str] = {}
    for name, (_, key) in found.items():
        first = firsts.setdefault(key, name)
        if own[first][1] != own[name][1]:
            raise OptionError(
                f"model: expected weights that {kind} ties by its config, found that {name} is {first}, and "
                "would be another tensor when it is loaded; set config.tie_word_embeddings with the model, "
                "or give each a tensor of its own, before make_variational"
            )


_Tensors = Mapping[str, tuple[tuple[int, ...], Any]]  # name → shape, and what is equal where tensors are tied


def _tensors(model: nn.Module) -> _Tensors:
    """All that a state dict of the ordinary model has."""
    found: dict[str, tuple[tuple[int, ...], Any]] = {
        name: (tuple(tensor.shape), id(tensor)) for name, tensor in plain_tensors(model)
    }
    for prefix, module in model.named_modules(remove_duplicate=False):
        for name, drawn in drawn_attributes(module):
            member = drawn.holder[0].streams[drawn.stream].members[drawn.member]
            found[f"{prefix}.{name}".lstrip(".")] = (member.shape, (drawn.stream, drawn.member))
    return found


def _said(name: str, tensors: _Tensors) -> str:
    return str(list(tensors[name][0])) if name in tensors else "none"


def require_same(path: Path, found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """
    Raises:
        ChecksumError: what was written does not decode to the model's weights.
    """
    for name, tensor in expected.items():
        # One that is loaded in another dtype has the same values in it.
        if not torch.equal(found[name].cpu(), tensor.cpu().to(found[name].dtype)):
            raise ChecksumError(
                f"{path}: {name}: what was written does not decode to the model's weights; report this"
            )


@torch.no_grad()
def adopt(model: nn.Module, loaded: nn.Module) -> list[str]:
    """Give a variational model what is loaded from its file but for what is coded, which is there already.

    Args:
        loaded: what a stranger has of the file.

    Returns:
        The names of tensors whose values changed.
    """
    found, changed = loaded.state_dict(), []
    for name, tensor in plain_tensors(model):
        written = found[name].to(tensor)
        if not torch.equal(written, tensor):
            tensor.copy_(written)
            changed.append(name)
    return changed + [name for name, module, key in _unsaved(model) if _replaced(loaded, name, module, key)]


def _unsaved(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Buffers that no file holds, which a loaded model works out by itself: full name, module, own name."""
    for where, module in model.named_modules():
        for key in sorted(module._non_persistent_buffers_set):
            if module._buffers.get(key) is not None and "parametrizations" not in where:
                yield f"{where}.{key}".lstrip("."), module, key


def _replaced(loaded: nn.Module, name: str, module: nn.Module, key: str) -> bool:
    """Give a module the buffer of the loaded one, dtype included; whether it is another one."""
    own, other = module._buffers[key], loaded.get_buffer(name)
    assert own is not None
    if own.dtype == other.dtype and torch.equal(own.cpu(), other):
        return False
    module._buffers[key] = other.to(own.device)
    return True


def say_what_changed(path: Path, names: Sequence[str]) -> None:
    """A line of the log, if tensors of the model in memory are not what they were."""
    if names:
        _LOGGER.warning(
            "%s: %d tensors of the model in memory changed to what the file holds, such as %s: evaluations "
            "from now on are those of the file, earlier ones may differ",
            path, len(names), names[0],
        )  # fmt: skip


def say_other_dtypes(path: Path, dense: nn.Module, loaded: nn.Module) -> None:
    """A line of the log, if `from_pretrained` gives a tensor in another dtype than it is evaluated in.

    transformers loads a model in the one dtype of its config, but for modules that its class names.
    """
    found, own = loaded.state_dict(), dense.state_dict()
    if others := [name for name, tensor in own.items() if tensor.dtype != found[name].dtype]:
        name = others[0]
        _LOGGER.warning(
            "%s: %d tensors are loaded in another dtype than the model in memory has, such as %s: %s in "
            "memory, %s from the file, so that answers differ; cast the model to what from_pretrained gives "
            "before make_variational",
            path, len(others), name, own[name].dtype, found[name].dtype,
        )  # fmt: skip
