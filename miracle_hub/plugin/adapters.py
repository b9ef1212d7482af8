"""PEFT reads compressed adapters: both of its readers get dense tensors in place of payloads.

`PeftModel.from_pretrained` and `load_adapter` of PEFT read adapter_model.safetensors by one function of
safetensors, which PEFT calls `safe_load_file`; `load_adapter` of transformers gives its path to
`PreTrainedModel._load_pretrained_model`. Neither has a hook for others: both are wrapped, once, when peft is
imported, and all other files pass through. Where a wrapper is not met, payloads are loaded, whose shapes fit
no factor: an error, never wrong weights.
"""

from collections.abc import Callable, Mapping
from functools import wraps
from inspect import signature
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor

from miracle_hub.codec.naming import ADAPTER

_READ, _LOAD = "safe_load_file", "_load_pretrained_model"
_MARK = "reads_payloads"
State = dict[str, Tensor]


def register(readers: ModuleType) -> None:
    """Wrap both; a second call changes nothing.

    Args:
        readers: peft.utils.save_and_load, imported.

    Raises:
        AttributeError: this PEFT, or this transformers, reads adapters otherwise.
    """
    from transformers.modeling_utils import PreTrainedModel

    read, load = getattr(readers, _READ), getattr(PreTrainedModel, _LOAD)
    if not hasattr(read, _MARK):
        setattr(readers, _READ, _reading(read))
        setattr(PreTrainedModel, _LOAD, staticmethod(_loading(load)))


def _reading(read: Callable[..., State]) -> Callable[..., State]:
    """`safetensors.torch.load_file`, which decodes what is compressed."""

    @wraps(read)
    def wrapped(filename: Any, device: Any = "cpu", *args: Any, **kwargs: Any) -> State:
        decoded = _decoded(filename)
        if decoded is None:
            return read(filename, device, *args, **kwargs)
        return {name: tensor.to(device) for name, tensor in decoded.items()}

    setattr(wrapped, _MARK, True)
    return wrapped


def _loading(load: Callable[..., Any]) -> Callable[..., Any]:
    """Transformers' loader of files or a state dict, which gets the latter of what is compressed."""
    parameters = signature(load)

    @wraps(load)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        given = parameters.bind(*args, **kwargs)
        if (decoded := _decoded_of(given.arguments)) is not None:
            given.arguments |= {"state_dict": decoded, "checkpoint_files": []}
        return load(*given.args, **given.kwargs)

    return wrapped


def _decoded_of(given: Mapping[str, Any]) -> State | None:
    files = given.get("checkpoint_files") or []
    return _decoded(files[0]) if len(files) == 1 and given.get("state_dict") is None else None


def _decoded(filename: Any) -> State | None:
    """The tensors of a compressed adapter, dense, on the CPU; None for any other file.

    Raises:
        FormatError: and its subclasses: the file is not sound.
    """
    path = Path(filename)
    if path.name != ADAPTER:
        return None
    from miracle_hub.codec.decompress import load_state_dict
    from miracle_hub.codec.detector import detect
    from miracle_hub.codec.kinds import Kind

    return load_state_dict(path) if detect(path).kind is Kind.PAYLOADS else None
