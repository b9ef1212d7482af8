"""Which layer of a model is the first whose output is no number."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from miracle_hub.calibrate.outputs import device_of
from miracle_hub.errors import CalibrationError


def require_finite(model: nn.Module, batch: Mapping[str, Tensor], answer: Tensor) -> None:
    """
    Raises:
        CalibrationError: an answer is NaN or infinite; it names the layer where that begins.
    """
    if bool(torch.isfinite(answer).all()):
        return
    where = first_not_finite(model, batch) or "its answer"
    raise CalibrationError(
        f"{type(model).__name__}: expected finite numbers on all inputs, found NaN or infinity, first in "
        f"{where}; look at these weights and at the data, or compress without calibration (--calibrate none)"
    )


@torch.no_grad()
def first_not_finite(model: nn.Module, batch: Mapping[str, Tensor]) -> str | None:
    """The layer that first gives NaN or infinity for finite inputs, with its class; None if none does."""
    found: list[str] = []

    def look(name: str, module: nn.Module, output: Any) -> None:
        if not found and not all(bool(torch.isfinite(part).all()) for part in _numbers(output)):
            found.append(f"{name or 'the whole'} ({type(module).__name__})")

    handles = [
        module.register_forward_hook(lambda module, _, output, name=name: look(name, module, output))
        for name, module in model.named_modules()
    ]
    try:
        model(**{name: values.to(device_of(model)) for name, values in batch.items()})
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def _numbers(output: Any) -> Iterator[Tensor]:
    """Floating tensors of what a module returns."""
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, Mapping):
        yield from (part for value in output.values() for part in _numbers(value))
    elif isinstance(output, list | tuple):
        yield from (part for value in output for part in _numbers(value))
