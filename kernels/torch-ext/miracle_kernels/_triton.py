"""Triton, or a stand-in where it is not installed: the torch references work without it."""

from functools import wraps
from typing import Any, Callable

import torch
from torch import Tensor

from .errors import KernelUnavailableError

# Any: type checkers cannot follow what `jit` makes of a function's parameters.
triton: Any
try:
    import triton
    import triton.language as tl

    HAS_TRITON = True
except ModuleNotFoundError:  # CPU builds of torch, macOS, Windows

    class _Absent:
        """Takes every decorator and annotation of a kernel and does nothing with it."""

        def __getattr__(self, name: str) -> Any:
            return self

        def __call__(self, function: Any = None, **options: Any) -> Any:
            return self if function is None else function

    triton = tl = _Absent()
    HAS_TRITON = False

INTERPRETED = HAS_TRITON and bool(triton.knobs.runtime.interpret)


def on_its_device(function: Callable) -> Callable:
    """Makes the device of the first tensor current, where Triton launches, while `function` runs."""

    @wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        tensor = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        if not tensor.is_cuda:
            return function(*args, **kwargs)
        with torch.cuda.device(tensor.device):
            return function(*args, **kwargs)

    return guarded


def check_launch(op: str, tensor: Tensor) -> None:
    """Raise unless Triton can run on the device of `tensor`.

    Raises:
        KernelUnavailableError: Triton is missing, or the tensor is on the CPU and kernels are compiled.
    """
    if not HAS_TRITON:
        raise KernelUnavailableError(
            f"{op}: expected the Python package triton, found none; pip install triton, or pass CPU tensors "
            "to the op itself, which then runs the torch reference"
        )
    if tensor.device.type == "cpu" and not INTERPRETED:
        raise KernelUnavailableError(
            f"{op}: expected tensors on a GPU, found {tensor.device}; move them, or set TRITON_INTERPRET=1 "
            "before Python starts to run kernels on the CPU, slowly"
        )
