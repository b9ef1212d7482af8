"""A module ⇄ the file of its weights, on the reading side: imports neither training nor encoders."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from miracle_hub.codec import payloads
from miracle_hub.codec.network import decode_stream_entry, read_network, spec_of
from miracle_hub.coding.backend import choose
from miracle_hub.errors import FormatError
from miracle_hub.format.network import NetworkHeader, SharedSpec, decode_network


def load(path: str | Path, model: nn.Module) -> nn.Module:
    """Fill a module with the weights of a file that `save` wrote, in place, and return it.

    Raises:
        FormatError: and its subclasses: the file is not sound, or is that of another module.
    """
    state = read_state(Path(path), model)
    with torch.no_grad():
        for name, tensor in module_tensors(model).items():
            tensor.copy_(state[name])
    return model


def read_state(path: Path, model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer of a module from a file, checked to be all of them and no others.

    Raises:
        FormatError: and its subclasses: the file is not sound, or is that of another module.
    """
    stream, state = read_network(path)
    expected = module_tensors(model)
    state |= {name: _entry(path, name, state[name], t) for name, t in expected.items() if name in state}
    if stream is not None:
        state |= decode_stream_entry(stream, _specs(expected, state), str(path))
    if set(state) != set(expected):
        raise FormatError(
            f"{path}: expected the tensors of {type(model).__name__}, found one that differs in "
            f"{', '.join(sorted(set(state) ^ set(expected))[:4])}; load it into the module that it was made "
            "from"
        )
    for name, tensor in expected.items():
        _check_shape(path, name, state[name].shape, tensor)
        _check_dtype(path, name, state[name].dtype, tensor.dtype)
    return state


def stream_header(path: Path, model: nn.Module) -> NetworkHeader | None:
    """The header of the stream in a file of `save`; None if the file has no stream.

    Raises:
        FormatError: and its subclasses: the file is not sound, or is that of another module.
    """
    stream, state = read_network(path)
    return (
        None if stream is None else decode_network(stream, _specs(module_tensors(model), state), str(path))[0]
    )


def _specs(expected: dict[str, Tensor], state: Mapping[str, Tensor]) -> tuple[SharedSpec, ...]:
    """The tensors of a module that a file's stream holds: those of numbers that have no entry."""
    missing = {name: t for name, t in expected.items() if name not in state and t.is_floating_point()}
    return tuple(spec_of(name, tensor) for name, tensor in missing.items())


def _entry(path: Path, name: str, stored: Tensor, expected: Tensor) -> Tensor:
    """What an entry of a file holds; a payload is decoded once it is known to have the module's shape.

    Raises:
        FormatError: and its subclasses: it is not sound, or has another shape than the module's.
    """
    payload = payloads.read(stored, name)
    if payload is None:
        return stored
    _check_shape(path, name, payload.facts.shape, expected)
    return payload.decode(choose("cpu"), rounded=True)


def _check_dtype(path: Path, name: str, found: torch.dtype, expected: torch.dtype) -> None:
    """Numbers may come in another precision, but whole, real and complex ones are no substitutes."""
    if (found.is_floating_point, found.is_complex) != (expected.is_floating_point, expected.is_complex):
        raise FormatError(
            f"{path}: {name}: expected {expected}, found {found}; load it into the module that it was made "
            "from"
        )


def _check_shape(path: Path, name: str, found: tuple[int, ...], expected: Tensor) -> None:
    if found != tuple(expected.shape):
        raise FormatError(
            f"{path}: {name}: expected shape {tuple(expected.shape)}, found {tuple(found)}; load it into the "
            "module that it was made from"
        )


def module_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters, tied ones once, and the buffers that a state dict holds."""
    kept = set(model.state_dict(keep_vars=True))
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in kept}
    return {**dict(model.named_parameters()), **buffers}
