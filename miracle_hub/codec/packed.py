"""A weight matrix that stays compressed in memory: products decode a bounded band of its rows at a time.

A product allocates its result and, whatever the size of the matrix, at most `BAND_BYTES` for the band that
is decoded, as much again for each cast of it, and the compressed bytes of that band. A single row that is
longer than a band is decoded whole. Payloads with a banded or permuted order, which the compressor does
not write by default, have their rows spread over the message: they are decoded whole for each product.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from miracle_hub.codec.tensor import TORCH_DTYPES, check_payload, coded_rows, decode_payload
from miracle_hub.coding import cpu
from miracle_hub.config import Code
from miracle_hub.errors import OptionError
from miracle_hub.format.payload import Header

# One task per processor and band: with two per processor they wait for the threads of the matrix
# product, which spin (4096 × 4096 at 2 bits on 2 cores: 0.37 s instead of 0.05 s).
_MOST_TASKS = 8
_TASK_WEIGHTS = 1 << 17
BAND_BYTES = 4 * _MOST_TASKS * _TASK_WEIGHTS
# Below this a thread costs more than it saves.
_FEWEST_WEIGHTS = 1 << 16
_HALF_PRECISION = (torch.bfloat16, torch.float16)


class _Stream(NamedTuple):
    """One segment's code, rows, scales and message, and where its rows are in the matrix."""

    code: Code
    rows: int
    scales: np.ndarray
    message: np.ndarray
    top: int


class PackedMatrix:
    """A payload of a two-dimensional weight W `[rows, columns]`, parsed, not decoded.

    Immutable; it refers to the payload's memory where that is on the CPU, and copies it otherwise.
    """

    def __init__(
        self, payload: Tensor, where: str, dtype: torch.dtype | None = None, backend: str = "auto"
    ) -> None:
        """
        Args:
            payload: uint8 `[bytes]` on any device.
            where: the tensor's name, for messages.
            dtype: of the layer; weights are rounded to their source's dtype and then to this one, as a
                dense load rounds them. None means the source's.
            backend: "auto", "cpu" or "triton"; see `packed_linear`.

        Raises:
            FormatError: and its subclasses: the payload is not sound.
            OptionError: it is no matrix that can be multiplied row by row.
        """
        self.payload, self.where, self.backend = payload, where, backend
        on_cpu = payload.detach().cpu()
        self.header, start = check_payload(on_cpu.numpy().tobytes(), where)
        if not is_packable(self.header):
            raise OptionError(
                f"{where}: expected a matrix whose rows are whole rows of the payload, found shape "
                f"{self.header.shape} in rows of {self.header.columns}; load this tensor dense"
            )
        self.source_dtype = TORCH_DTYPES[self.header.dtype]
        self.dtype = dtype or self.source_dtype
        self._streams = list(_placed(self.header, on_cpu, start))

    @property
    def rows(self) -> int:
        return self.header.shape[0]

    @property
    def columns(self) -> int:
        return self.header.shape[1]

    def dense(self) -> Tensor:
        """W in the layer's dtype on the CPU, bit for bit that of a dense load; its digest is compared.

        Raises:
            ChecksumError: the decoded weights are not those that were compressed.
        """
        return self._rounded(self._whole(verify=True))

    def linear(self, x: Tensor) -> Tensor:
        """x·Wᵀ: `[..., columns]` → `[..., rows]`, in x's dtype and on its device; not differentiable.

        Raises:
            OptionError: the last dimension of x is not `columns`.
        """
        flat = self._matrix(x, self.columns)
        out = flat.new_empty(len(flat), self.rows)
        for rows, weights in self._bands():
            out[:, rows] = flat @ weights.to(x.device, x.dtype).T
        return out.view(*x.shape[:-1], self.rows)

    def matmul(self, x: Tensor) -> Tensor:
        """x·W: `[..., rows]` → `[..., columns]`, in x's dtype and on its device; not differentiable.

        Bands add up in float32 where x has 16 bits.

        Raises:
            OptionError: the last dimension of x is not `rows`.
        """
        flat = self._matrix(x, self.rows)
        dtype = torch.float32 if x.dtype in _HALF_PRECISION else x.dtype
        out = flat.new_zeros(len(flat), self.columns, dtype=dtype)
        for rows, weights in self._bands():
            # By way of x's dtype: the weights that `linear` multiplies with.
            out.addmm_(flat[:, rows].to(dtype), weights.to(x.device, x.dtype).to(dtype))
        return out.to(x.dtype).view(*x.shape[:-1], self.columns)

    def _matrix(self, x: Tensor, width: int) -> Tensor:
        if x.shape[-1:] != (width,):
            raise OptionError(
                f"{self.where}: expected inputs whose last dimension is {width}, found shape "
                f"{tuple(x.shape)}; the weight is {self.rows} × {self.columns}"
            )
        return x.reshape(-1, width)

    def _rounded(self, weights: Tensor) -> Tensor:
        return weights.to(self.source_dtype).to(self.dtype)

    def _whole(self, *, verify: bool) -> Tensor:
        # A user's `with torch.device(...)` must not move the decoder's work.
        with torch.device("cpu"):
            return decode_payload(self.payload.detach().cpu(), self.where, verify=verify)[0]

    def _bands(self) -> Iterator[tuple[slice, Tensor]]:
        """Rows of W from the top, on the CPU; each band is overwritten by the next."""
        step = max(1, _TASK_WEIGHTS // self.columns) * _n_tasks()
        whole = self._whole(verify=False) if is_reordered(self.header) else None
        folds = self.columns // self.header.columns
        buffer = np.empty((min(step, self.rows) * folds, self.header.columns), np.float32)
        for top in range(0, self.rows, step):
            n_rows = min(step, self.rows - top)
            if whole is None:
                self._fill(top * folds, buffer[: n_rows * folds])
                band = torch.from_numpy(buffer[: n_rows * folds]).view(n_rows, self.columns)
            else:
                band = whole[top : top + n_rows]
            yield slice(top, top + n_rows), self._rounded(band)

    def _fill(self, first: int, out: np.ndarray) -> None:
        """Decode consecutive rows of the payload's matrix, whichever segments they lie in."""
        step, tasks = len(out) if out.size < _FEWEST_WEIGHTS else -(-len(out) // _n_tasks()), []
        for stream in self._streams:
            low = max(first, stream.top)
            high = min(first + len(out), stream.top + stream.rows)
            for row in range(low, high, step):
                target = out[row - first : min(row + step, high) - first]
                tasks.append((stream, row - stream.top, target, self.header.rotation))
        cpu.in_threads(_decode_rows, tasks)


def is_packable(header: Header) -> bool:
    """Whether a payload can stay compressed: a matrix, each of whose rows is whole rows of the payload."""
    return len(header.shape) == 2 and header.shape[1] % header.columns == 0


def is_reordered(header: Header) -> bool:
    """Whether a row's weights are spread over the message."""
    return header.permuted or 0 < header.band_columns < header.columns


def packed_linear(x: Tensor, packed: PackedMatrix) -> Tensor:
    """x·Wᵀ, differentiable in x: what `torch.nn.functional.linear` computes without a bias.

    Under autocast in its dtype, as there. The backward pass decodes again.

    Args:
        x: `[..., columns]`; `packed.backend` says who decodes.
    """
    # GPU SEAM: where x.is_cuda and packed.backend is not "cpu", the kernel decode_linear belongs here.
    return _product(x, packed, transposed=False)


def packed_matmul(x: Tensor, packed: PackedMatrix) -> Tensor:
    """x·W, differentiable in x; see `packed_linear`.

    Args:
        x: `[..., rows]`.
    """
    return _product(x, packed, transposed=True)


def _product(x: Tensor, packed: PackedMatrix, *, transposed: bool) -> Tensor:
    kind = x.device.type
    if not (torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)):
        return _Product.apply(x, packed, transposed)  # pyright: ignore[reportReturnType]
    # What autocast does to the inputs of a linear layer; inside a Function it would do it once more.
    x = x if x.dtype == torch.float64 else x.to(torch.get_autocast_dtype(kind))
    with torch.autocast(kind, enabled=False):
        return _Product.apply(x, packed, transposed)  # pyright: ignore[reportReturnType]


class _Product(torch.autograd.Function):
    """Each of the two products is the other one's derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: PackedMatrix, transposed: bool) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.packed, ctx.transposed = packed, transposed
        return packed.matmul(x) if transposed else packed.linear(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _Product.apply(gradient, ctx.packed, not ctx.transposed), None, None


def _n_tasks() -> int:
    return min(cpu.n_threads(), _MOST_TASKS)


def _placed(header: Header, payload: Tensor, start: int) -> Iterator[_Stream]:
    top = 0
    for part in coded_rows(header, payload, start):
        yield _Stream(part.code, part.rows, part.scales.float().numpy(), part.message.numpy(), top)
        top += part.rows


def _decode_rows(stream: _Stream, row: int, out: np.ndarray, rotation: int) -> None:
    """Rows `row`, `row` + 1, … of a segment in plain order, float32, from their part of the message."""
    code, first, flat = stream.code, row * out.shape[1], out.reshape(-1)
    # Eight steps are a whole number of bytes: the part that is copied and padded starts at one.
    step = first // code.step_weights // 8 * 8
    low, high = step * code.step_bits // 8, code.message_bytes(first + flat.size)
    cpu.decode_range(cpu.pad_message(stream.message[low:high]), code, first - step * code.step_weights, flat)
    scales = stream.scales
    out *= scales[row : row + len(out), None] if scales.size > 1 else scales[0]
    if rotation > 1:
        cpu.hadamard_rows(flat, rotation)
