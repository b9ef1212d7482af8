"""Who codes and decodes: numba on the CPU, or Triton on a GPU. Both give the same weights, bit for bit."""

import logging
import math
from collections.abc import Sequence
from functools import cache
from typing import Protocol

import torch
from torch import Tensor

from miracle_hub.checks import check_choice
from miracle_hub.code import BACKENDS, Code
from miracle_hub.coding.matrix import CodedRows, MatrixLayout
from miracle_hub.coding.posterior import Cost
from miracle_hub.errors import BackendError

_LOGGER = logging.getLogger("miracle_hub")


class Backend(Protocol):
    """An implementation of the code. Tensors come from and go to `device`, messages included."""

    name: str
    device: torch.device

    @property
    def band_weights(self) -> int:
        """How many weights to decode at a time where memory is to be bounded."""
        ...

    def encode_stream(
        self, cost: Cost, code: Code, selection: str, generator: torch.Generator | None
    ) -> Tensor:
        """The message of a stream, uint8 `[bytes]`; see `encode.encode_stream`."""
        ...

    def encode_states(
        self,
        cost: Cost,
        code: Code,
        selection: str,
        generator: torch.Generator | None,
        entry: int | None = None,
    ) -> Tensor:
        """The windows of a stream, or of its next steps, int64 `[steps]`; see `encode.encode_states`.

        The cost may be anywhere; windows come to the CPU, where they are packed.

        Raises:
            OptionError: an unknown selection, or "sample" without a generator.
        """
        ...

    def candidates(self, states: Tensor, code: Code) -> Tensor:
        """What windows from anywhere stand for, float32 `[n, step_weights]`; see `reference.candidates`."""
        ...

    def decode_stream(self, message: Tensor, code: Code, n_weights: int) -> Tensor:
        """Standard normal candidates, float32 `[n_weights]`; see `reference.decode_stream`."""
        ...

    def hadamard(self, values: Tensor, width: int) -> Tensor:
        """See `rotation.hadamard`."""
        ...

    def decode_matrix(
        self, parts: Sequence[CodedRows], layout: MatrixLayout, dtype: torch.dtype
    ) -> tuple[Tensor, int]:
        """Weights `[rows, columns]` in `dtype` (rounded last), and the digest of their float32 values."""
        ...

    def decode_rows(self, out: Tensor, part: CodedRows, layout: MatrixLayout, first_row: int) -> None:
        """Fill `out`, float32 `[n_rows, columns]`, with rows from `first_row` on of a part in plain order."""
        ...

    def multiply(self, x: Tensor, part: CodedRows, layout: MatrixLayout) -> Tensor | None:
        """x·Wᵀ, `[batch, columns]` → `[batch, rows]`, with no weight in memory.

        None where there is no kernel for it: for more than 64 rows of x (one of float32) on a GPU and 16 on
        the CPU, for another dtype than float32, bfloat16 and float16, for permuted streams.
        """
        ...


def choose(backend: str = "auto", device: torch.device | None = None) -> Backend:
    """The backend for tensors on a device.

    Args:
        backend: "cpu", "triton", or "auto": Triton where the tensors are, or can be, on a GPU.
        device: where the tensors are; None means files, which can go anywhere.

    Raises:
        OptionError: an unknown name.
        BackendError: "triton" cannot run here, or not on that device.
    """
    check_choice("backend", backend, BACKENDS)
    if backend == "auto":
        return _automatic(device)
    return _numba() if backend == "cpu" else _triton(device)


def _automatic(device: torch.device | None) -> Backend:
    if device is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type != "cuda":
        _say(logging.INFO, "backend: numba on the CPU (the tensors are on no GPU)")
        return _numba()
    try:
        chosen = _triton(device)
    except BackendError as error:
        _say(logging.WARNING, f"backend: numba on the CPU, though there is a GPU ({error})")
        return _numba()
    _say(logging.INFO, f"backend: Triton on {chosen.device} (the tensors are on a GPU)")
    return chosen


@cache
def _say(level: int, text: str) -> None:
    """Log each choice once per process."""
    _LOGGER.log(level, text)


@cache
def _numba() -> Backend:
    from miracle_hub.coding.numba_backend import NumbaBackend

    return NumbaBackend()


def _triton(device: torch.device | None) -> Backend:
    """
    Raises:
        BackendError: Triton is not installed, or cannot run on the device.
    """
    import miracle_kernels

    if not miracle_kernels.HAS_TRITON:
        raise BackendError(
            "backend: expected the package triton for backend='triton', found none; pip install triton, or "
            "use backend='cpu'"
        )
    if device is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type != "cuda" and not (device.type == "cpu" and miracle_kernels.INTERPRETED):
        raise BackendError(
            f"backend: expected a CUDA or ROCm device for backend='triton', found {device}; use a GPU and a "
            "build of torch that knows it, or backend='cpu' (TRITON_INTERPRET=1 runs Triton on a CPU, slowly)"
        )
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return _triton_on(device)


@cache
def _triton_on(device: torch.device) -> Backend:
    from miracle_hub.coding.triton_backend import TritonBackend

    return TritonBackend(device)


def rotated_matrix(weights: Tensor, columns: int, width: int, backend: Backend) -> Tensor:
    """float32 [rows, columns] after an orthonormal Hadamard rotation of each group of `width`."""
    matrix = weights.to(backend.device).float().reshape(-1, columns)
    return backend.hadamard(matrix, width) / math.sqrt(width) if width > 1 else matrix
