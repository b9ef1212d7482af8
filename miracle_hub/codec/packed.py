"""A weight matrix that stays compressed in memory: products decode a bounded band of its rows at a time.

A product allocates its result and, whatever the size of the matrix, at most four bytes for each of the
backend's `band_weights`, as much again for each cast of the band, and its compressed bytes. Small batches are
multiplied straight from the message, without any band. A single row that is longer than a band
is decoded whole. A row of a payload in bands of columns, as calibration writes them, is decoded from its
pieces, one in every band. Payloads with a permuted order, which the compressor does not write, have their
weights spread over the message: they are decoded whole for each product.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from miracle_hub.codec.body import check_payload, coded_rows
from miracle_hub.codec.dtypes import TORCH_DTYPES
from miracle_hub.codec.payloads import Packed
from miracle_hub.codec.trellis import decode_payload, is_packable, layout_of
from miracle_hub.coding.backend import choose
from miracle_hub.coding.matrix import CodedRows
from miracle_hub.errors import OptionError
from miracle_hub.format.payload import Header

_HALF_PRECISION = (torch.bfloat16, torch.float16)


class _Placed(NamedTuple):
    """Coded rows, and where the first of them is in the payload's matrix."""

    top: int
    part: CodedRows


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
            backend: who decodes: "cpu", "triton", or "auto" for the GPU where the payload is on one.

        Raises:
            BackendError: the backend cannot run where the payload is.
            FormatError: and its subclasses: the payload is not sound.
            OptionError: it is no matrix that can be multiplied row by row.
        """
        self.payload, self.where = payload, where
        self.backend = choose(backend, payload.device)
        self.header, start = check_payload(payload.detach().cpu().numpy().tobytes(), where)
        if not is_packable(self.header):
            raise OptionError(
                f"{where}: expected a matrix whose rows are whole rows of the payload, found shape "
                f"{self.header.shape} in rows of {self.header.columns}; load this tensor dense"
            )
        self.source_dtype = TORCH_DTYPES[self.header.dtype]
        self.dtype = dtype or self.source_dtype
        self.layout = layout_of(self.header)
        self._parts = list(_placed(self.header, payload.detach().to(self.backend.device), start))

    @property
    def shape(self) -> tuple[int, ...]:
        """Rows and columns."""
        return self.header.shape

    @property
    def rows(self) -> int:
        """Of the matrix."""
        return self.header.shape[0]

    @property
    def columns(self) -> int:
        """Of the matrix."""
        return self.header.shape[1]

    def dense(self) -> Tensor:
        """W in the layer's dtype on the backend's device, bit for bit that of a dense load.

        Its digest is compared.

        Raises:
            ChecksumError: the decoded weights are not those that were compressed.
        """
        return self._rounded(self._whole(verify=True))

    def linear(self, x: Tensor) -> Tensor:
        """x·Wᵀ: `[..., columns]` → `[..., rows]`, in x's dtype and on its device; not differentiable.

        Raises:
            OptionError: the last dimension of x is not `columns`, or x is not floating.
        """
        flat = self._matrix(x, self.columns)
        out = flat.new_empty(len(flat), self.rows)
        if not self._multiply(flat, out):
            for rows, weights in self._bands():
                out[:, rows] = flat @ weights.to(x.device, x.dtype).T
        return out.view(*x.shape[:-1], self.rows)

    def matmul(self, x: Tensor) -> Tensor:
        """x·W: `[..., rows]` → `[..., columns]`, in x's dtype and on its device; not differentiable.

        Bands add up in float32 where x has 16 bits.

        Raises:
            OptionError: the last dimension of x is not `rows`, or x is not floating.
        """
        flat = self._matrix(x, self.rows)
        dtype = torch.float32 if x.dtype in _HALF_PRECISION else x.dtype
        out = flat.new_zeros(len(flat), self.columns, dtype=dtype)
        for rows, weights in self._bands():
            # By way of x's dtype: the weights that `linear` multiplies with.
            out.addmm_(flat[:, rows].to(dtype), weights.to(x.device, x.dtype).to(dtype))
        return out.to(x.dtype).view(*x.shape[:-1], self.columns)

    def _multiply(self, x: Tensor, out: Tensor) -> bool:
        """Fill `out` straight from the message, if rows are rows of the payload and there is a kernel."""
        if self.columns != self.header.columns:
            return False
        for top, part in self._parts:
            product = self.backend.multiply(x, part, self.layout)
            if product is None:
                return False
            out[:, top : top + part.rows] = product
        return True

    def _matrix(self, x: Tensor, width: int) -> Tensor:
        if not x.is_floating_point():
            raise OptionError(
                f"{self.where}: expected inputs of a floating dtype, found {x.dtype}; convert them with .to()"
            )
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
            return decode_payload(self.payload.detach(), self.where, verify=verify, backend=self.backend)[0]

    def _bands(self) -> Iterator[tuple[slice, Tensor]]:
        """Rows of W from the top, on the backend's device; each band is overwritten by the next."""
        step = max(1, self.backend.band_weights // self.columns)
        whole = self._whole(verify=False) if is_reordered(self.header) else None
        folds = self.columns // self.header.columns
        shape = (min(step, self.rows) * folds, self.header.columns)
        buffer = torch.empty(shape, dtype=torch.float32, device=self.backend.device)
        for top in range(0, self.rows, step):
            n_rows = min(step, self.rows - top)
            if whole is None:
                self._fill(top * folds, buffer[: n_rows * folds])
                band = buffer[: n_rows * folds].view(n_rows, self.columns)
            else:
                band = whole[top : top + n_rows]
            yield slice(top, top + n_rows), self._rounded(band)

    def _fill(self, first: int, out: Tensor) -> None:
        """Decode consecutive rows of the payload's matrix, whichever segments they lie in."""
        for top, part in self._parts:
            low, high = max(first, top), min(first + len(out), top + part.rows)
            if low < high:
                self.backend.decode_rows(out[low - first : high - first], part, self.layout, low - top)


def is_reordered(header: Header) -> bool:
    """Whether a row's weights are spread over the message, in no order of their own."""
    return header.permuted


def packed_linear(x: Tensor, packed: Packed) -> Tensor:
    """x·Wᵀ, differentiable in x: what `torch.nn.functional.linear` computes without a bias.

    Under autocast in its dtype, as there. The backward pass decodes again.

    Args:
        x: `[..., columns]`.
    """
    return _product(x, packed, transposed=False)


def packed_matmul(x: Tensor, packed: Packed) -> Tensor:
    """x·W, differentiable in x; see `packed_linear`.

    Args:
        x: `[..., rows]`.
    """
    return _product(x, packed, transposed=True)


def _product(x: Tensor, packed: Packed, *, transposed: bool) -> Tensor:
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
    def forward(ctx: Any, x: Tensor, packed: Packed, transposed: bool) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.packed, ctx.transposed = packed, transposed
        return packed.matmul(x) if transposed else packed.linear(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _Product.apply(gradient, ctx.packed, not ctx.transposed), None, None


def _placed(header: Header, payload: Tensor, start: int) -> Iterator[_Placed]:
    top = 0
    for part in coded_rows(header, payload, start):
        yield _Placed(top, part)
        top += part.rows
