"""One tensor ⇄ one payload: matrix view, rotation, scales, streams."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from miracle_hub.code import Code
from miracle_hub.coding.backend import Backend, choose
from miracle_hub.coding.matrix import CodedRows, MatrixLayout, matrix_columns
from miracle_hub.coding.posterior import squared_error_cost
from miracle_hub.coding.rotation import check_width
from miracle_hub.coding.scales import LARGEST_SCALE, SMALLEST_SCALE, prior_scale, rounded_scales
from miracle_hub.errors import ChecksumError, FormatError, OptionError
from miracle_hub.format.payload import Header, Segment, decode_header, encode_payload

DTYPE_NAMES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float64: "F64",
}
TORCH_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


@dataclass(frozen=True)
class SegmentPlan:
    """A share of a tensor's rows and how to code them."""

    rows: int
    code: Code
    row_scales: bool


def rotated_matrix(weights: Tensor, columns: int, width: int, backend: Backend) -> Tensor:
    """float32 [rows, columns] after an orthonormal Hadamard rotation of each group of `width`."""
    matrix = weights.to(backend.device).float().reshape(-1, columns)
    return backend.hadamard(matrix, width) / math.sqrt(width) if width > 1 else matrix


def encode_tensor(
    weights: Tensor,
    segments: list[SegmentPlan],
    rotation: int,
    *,
    where: str,
    band_columns: int = 0,
    permuted: bool = False,
    selection: str = "best",
    generator: torch.Generator | None = None,
    backend: Backend | None = None,
) -> bytes:
    """The payload of a tensor; `decode_payload` gives its weights back.

    Args:
        weights: any floating dtype and shape, finite, not empty.
        segments: consecutive rows; their row counts add up to the matrix view's rows.
        rotation: width of the Hadamard groups; 1 means none.
        where: the tensor's name, for messages.
        backend: None means the one for the device of `weights`.

    Raises:
        OptionError: the rotation or the segments do not fit the tensor.
    """
    backend = backend or choose(device=weights.device)
    columns = matrix_columns(tuple(weights.shape))
    check_width(rotation, columns, where)
    _check_rows(segments, weights.numel() // columns, where)
    header = Header(
        dtype=DTYPE_NAMES[weights.dtype],
        shape=tuple(weights.shape),
        columns=columns,
        rotation=rotation,
        segments=tuple(Segment(s.rows, s.code, s.row_scales) for s in segments),
        band_columns=band_columns,
        permuted=permuted,
    )
    weights = weights.to(backend.device)
    matrix = rotated_matrix(weights, columns, rotation, backend)
    parts = [
        _encode_segment(rows, segment, header, selection, generator, backend)
        for segment, rows in zip(header.segments, _split_rows(matrix, header), strict=True)
    ]
    decoded, digest = backend.decode_matrix(parts, layout_of(header), torch.float32)
    difference = decoded.view(-1) - weights.float().reshape(-1)
    power = float(weights.double().square().sum())
    error = float(difference.double().square().sum()) / power if power else 0.0
    return encode_payload(replace(header, digest=digest, relative_error=error), _body(parts))


def payload_of_stream(
    shape: tuple[int, ...], dtype: torch.dtype, code: Code, scales: Tensor, message: Tensor
) -> bytes:
    """The payload of a tensor whose weights, in their own order, are a message times its rows' scales.

    Args:
        scales: `[1]`, or one for every row of the matrix view, as the format allows them.
    """
    columns = matrix_columns(shape)
    segment = Segment(math.prod(shape) // columns, code, scales.numel() > 1)
    header = Header(DTYPE_NAMES[dtype], shape, columns, 1, (segment,))
    parts = [CodedRows(segment.rows, code, scales.bfloat16().cpu(), message)]
    _, digest = choose("cpu").decode_matrix(parts, layout_of(header), torch.float32)
    return encode_payload(replace(header, digest=digest), _body(parts))


def _body(parts: list[CodedRows]) -> bytes:
    """Scales and messages as a payload holds them; `coded_rows` reads them back."""
    scales = torch.cat([part.scales.cpu() for part in parts]).view(torch.uint8)
    return b"".join(raw.numpy().tobytes() for raw in (scales, *(part.message.cpu() for part in parts)))


def coded_rows(header: Header, payload: Tensor, start: int) -> Iterator[CodedRows]:
    """The parts of a payload whose body starts at `start`; messages are views of it, on its device."""
    at = start + 2 * header.n_scales
    scales = payload[start:at].clone().view(torch.bfloat16)
    for segment, n_bytes in zip(header.segments, header.message_bytes, strict=True):
        own, scales = scales[: segment.n_scales], scales[segment.n_scales :]
        yield CodedRows(segment.rows, segment.code, own, payload[at : at + n_bytes])
        at += n_bytes


def layout_of(header: Header) -> MatrixLayout:
    """How the rows of a payload's matrix become weights."""
    return MatrixLayout(header.columns, header.rotation, header.band_columns, header.permuted)


def decode_payload(
    payload: Tensor,
    where: str,
    *,
    verify: bool = True,
    rounded: bool = False,
    backend: Backend | str = "auto",
) -> tuple[Tensor, Header]:
    """The weights of a payload in their own shape, on the backend's device, and its header.

    Args:
        payload: uint8 `[bytes]` on any device; its weights exist on the backend's device only.
        where: the tensor's name, for messages.
        verify: compare the digest of the decoded weights with the one in the header.
        rounded: give the weights in the dtype of the source, instead of float32.
        backend: a name means that backend on the payload's device.

    Raises:
        FormatError: and its subclasses, for every way in which the payload can be wrong.
        BackendError: the backend cannot run there.
    """
    backend = choose(backend, payload.device) if isinstance(backend, str) else backend
    header, start = check_payload(payload.cpu().numpy().tobytes(), where)
    parts = list(coded_rows(header, payload.to(backend.device), start))
    dtype = TORCH_DTYPES[header.dtype] if rounded else torch.float32
    decoded, digest = backend.decode_matrix(parts, layout_of(header), dtype)
    if verify and digest != header.digest:
        raise ChecksumError(
            f"{where}: the decoded weights have digest {digest:016x}, the header promises "
            f"{header.digest:016x}; the payload is damaged: download the file again"
        )
    return decoded.view(header.shape), header


def check_payload(data: bytes, where: str) -> tuple[Header, int]:
    """The header of a payload and where its body starts; all is checked that needs no decoding.

    Raises:
        FormatError: and its subclasses, for every way in which the payload can be wrong but its digest.
    """
    header, start = decode_header(data, where)
    body = data[start:]
    check_scale_words(np.frombuffer(body, "<u2", header.n_scales), start, where)
    _check_padding(header, body, start, where)
    return header, start


def _check_rows(segments: list[SegmentPlan], rows: int, where: str) -> None:
    found = [segment.rows for segment in segments]
    if sum(found) != rows or min(found, default=0) < 1:
        raise OptionError(
            f"{where}: expected segments that share {rows} rows, found segments of {found} rows; "
            "give every segment at least one row"
        )


def _split_rows(matrix: Tensor, header: Header) -> tuple[Tensor, ...]:
    return matrix.split([segment.rows for segment in header.segments])


def _encode_segment(
    rows: Tensor,
    segment: Segment,
    header: Header,
    selection: str,
    generator: torch.Generator | None,
    backend: Backend,
) -> CodedRows:
    """One segment, its scales as the file holds them."""
    power = rows.square().mean(1) if segment.row_scales else rows.square().mean().view(1)
    scales = rounded_scales(power.sqrt() * prior_scale(segment.code))
    safe = torch.where(scales > 0, scales, 1.0)
    standardized = (rows / safe[:, None]).flatten()
    order = layout_of(header).order(segment.rows, segment.code)
    order = None if order is None else order.to(rows.device)
    in_order = standardized if order is None else standardized[order]
    message = backend.encode_stream(squared_error_cost(in_order), segment.code, selection, generator)
    z = backend.decode_stream(message, segment.code, rows.numel())
    if order is not None:
        z = torch.empty_like(z).index_copy_(0, order, z)
    fitted = _least_squares_scales(rows, z.view(rows.shape), segment.row_scales) / math.sqrt(header.rotation)
    return CodedRows(segment.rows, segment.code, rounded_scales(fitted).bfloat16(), message)


def _least_squares_scales(rows: Tensor, z: Tensor, per_row: bool) -> Tensor:
    """The scales that fit the chosen candidates best; never negative."""
    product, power = rows * z, z * z
    top, bottom = (product.sum(1), power.sum(1)) if per_row else (product.sum(), power.sum())
    return (top / bottom.clamp(min=torch.finfo(torch.float32).tiny)).clamp(min=0).view(-1)


def check_scale_words(words: np.ndarray, start: int, where: str) -> None:
    """Raise unless every scale (bfloat16 words from byte `start` of a payload on) is 0 or in its bounds.

    Raises:
        FormatError: one is not.
    """
    bits = words.astype(np.uint32) << 16
    values = bits.view(np.float32)
    good = (values == 0) & (bits == 0) | (values >= SMALLEST_SCALE) & (values <= LARGEST_SCALE)
    if not good.all():
        at = int(np.argmin(good))
        raise FormatError(
            f"{where}: scale {at} at byte {start + 2 * at} of the payload: expected 0 or a number from "
            f"2^-64 to 2^64, found {values[at]:g}; the file is damaged: download it again"
        )


def _check_padding(header: Header, body: bytes, start: int, where: str) -> None:
    end = 2 * header.n_scales
    for segment, n_bytes in zip(header.segments, header.message_bytes, strict=True):
        end += n_bytes
        unused = -segment.code.message_bits(segment.rows * header.columns) % 8
        if body[end - 1] & ((1 << unused) - 1):
            raise FormatError(
                f"{where}: byte {start + end - 1} of the payload: expected the last {unused} bits of a "
                f"message to be 0, found {body[end - 1]:08b}; the file is damaged: download it again"
            )
