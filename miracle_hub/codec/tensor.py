"""One tensor ⇄ one payload: matrix view, rotation, scales, streams."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from miracle_hub.coding import cpu
from miracle_hub.coding.encode import encode_stream
from miracle_hub.coding.order import stream_order
from miracle_hub.coding.posterior import squared_error_cost
from miracle_hub.coding.rotation import check_width, widest_rotation
from miracle_hub.config import Code
from miracle_hub.errors import ChecksumError, FormatError, OptionError
from miracle_hub.format.payload import Header, Segment, decode_header, encode_payload

DTYPE_NAMES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float64: "F64",
}
TORCH_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
# Within these bounds scale · z is exact in float32 and never subnormal (README, "Exactness").
_SMALLEST_SCALE, _LARGEST_SCALE = 2.0**-64, 2.0**64
_TASK_WEIGHTS = 1 << 17
# Sizes are met by the row: one of 64 rows at the next rate (a quarter more bits) is 0.4 % of a tensor.
_FEWEST_ROWS = 64
_SHORTEST_ROW = 128
_LONGEST_CUT_ROW = 1024


@dataclass(frozen=True)
class SegmentPlan:
    """A share of a tensor's rows and how to code them."""

    rows: int
    code: Code
    row_scales: bool


def matrix_columns(shape: tuple[int, ...]) -> int:
    """Columns of a tensor's matrix view: all but the first dimension, or the last of stacked matrices.

    Convolutions (out, in, height, width) have one row per output channel; a stack of matrices, such
    as experts (experts, in, out) or position embeddings (1, positions, width), has one row per
    last-dimension vector, so that scales stay local. Vectors and matrices of few rows are cut up.
    """
    stacked = len(shape) == 3 and min(shape[1:]) >= 32
    columns = shape[-1] if stacked or len(shape) == 1 else math.prod(shape[1:])
    n_weights = math.prod(shape)
    if n_weights // columns >= _FEWEST_ROWS:
        return columns
    widths = range(_SHORTEST_ROW, min(_LONGEST_CUT_ROW, n_weights // _FEWEST_ROWS) + 1)
    cuts = [width for width in widths if columns % width == 0]
    return max(cuts, key=lambda width: (widest_rotation(width), width), default=columns)


def prior_scale(code: Code) -> float:
    """The best prior scale for a unit Gaussian source under squared error.

    √(1 - D) at Shannon's D = 2^(-2R), raised where short windows miss the tails. The factors are
    rounded from a grid over the ladder for L = 8 … 16; benchmarks/rate_distortion.py searches near them.
    """
    rate = code.bits_per_weight
    ideal = math.sqrt(1 - 4.0**-rate)
    if rate <= 1:
        return ideal
    if rate <= 2:
        return 1.05 * ideal
    return (1.1 if code.overlap_bits >= 9 else 1.2) * ideal


def rounded_scales(scales: Tensor) -> Tensor:
    """Scales as the format allows them: bfloat16, 0 or within [2⁻⁶⁴, 2⁶⁴]; held as float32."""
    rounded = scales.clamp(max=_LARGEST_SCALE).bfloat16().float()
    return torch.where(rounded >= _SMALLEST_SCALE, rounded, 0.0)


def rotated_matrix(weights: Tensor, columns: int, width: int) -> Tensor:
    """float32 [rows, columns] after an orthonormal Hadamard rotation of each group of `width`."""
    matrix = weights.float().reshape(-1, columns)
    return cpu.hadamard(matrix, width) / math.sqrt(width) if width > 1 else matrix


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
) -> bytes:
    """The payload of a tensor; `decode_payload` gives its weights back.

    Args:
        weights: any floating dtype and shape, finite, not empty.
        segments: consecutive rows; their row counts add up to the matrix view's rows.
        rotation: width of the Hadamard groups; 1 means none.
        where: the tensor's name, for messages.

    Raises:
        OptionError: the rotation or the segments do not fit the tensor.
    """
    columns = matrix_columns(tuple(weights.shape))
    check_width(rotation, columns, where)
    _check_rows(segments, weights.numel() // columns, where)
    matrix = rotated_matrix(weights, columns, rotation)
    header = Header(
        dtype=DTYPE_NAMES[weights.dtype],
        shape=tuple(weights.shape),
        columns=columns,
        rotation=rotation,
        segments=tuple(Segment(s.rows, s.code, s.row_scales) for s in segments),
        band_columns=band_columns,
        permuted=permuted,
    )
    scales, messages = [], []
    for segment, rows in zip(header.segments, _split_rows(matrix, header), strict=True):
        scale, message = _encode_segment(rows, segment, header, selection, generator)
        scales.append(scale / math.sqrt(rotation))
        messages.append(message)
    stored = rounded_scales(torch.cat(scales))
    body = stored.bfloat16().view(torch.uint8).numpy().tobytes()
    body += b"".join(message.numpy().tobytes() for message in messages)
    decoded, digest = _decode_body(header, body)
    difference = decoded.view(-1) - weights.float().reshape(-1)
    power = float(weights.double().square().sum())
    error = float(difference.double().square().sum()) / power if power else 0.0
    return encode_payload(replace(header, digest=digest, relative_error=error), body)


def decode_payload(payload: Tensor, where: str, *, verify: bool = True) -> tuple[Tensor, Header]:
    """The weights of a payload, float32 in their own shape, and its header.

    Args:
        payload: uint8 `[bytes]` on the CPU.
        where: the tensor's name, for messages.
        verify: compare the digest of the decoded weights with the one in the header.

    Raises:
        FormatError: and its subclasses, for every way in which the payload can be wrong.
    """
    data = payload.numpy().tobytes()
    header, start = decode_header(data, where)
    body = data[start:]
    _check_scales(header, body, start, where)
    _check_padding(header, body, start, where)
    decoded, digest = _decode_body(header, body)
    if verify and digest != header.digest:
        raise ChecksumError(
            f"{where}: the decoded weights have digest {digest:016x}, the header promises "
            f"{header.digest:016x}; the payload is damaged: download the file again"
        )
    return decoded.view(header.shape), header


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
) -> tuple[Tensor, Tensor]:
    """Scales (orthonormal units, float32) and message of one segment."""
    power = rows.square().mean(1) if segment.row_scales else rows.square().mean().view(1)
    scales = rounded_scales(power.sqrt() * prior_scale(segment.code))
    safe = torch.where(scales > 0, scales, 1.0)
    standardized = (rows / safe[:, None]).flatten()
    order = _order(segment, header)
    in_order = standardized if order is None else standardized[order]
    message = encode_stream(squared_error_cost(in_order), segment.code, selection, generator)
    z = cpu.decode_stream(message, segment.code, rows.numel())
    if order is not None:
        z = torch.empty_like(z).index_copy_(0, order, z)
    return _least_squares_scales(rows, z.view(rows.shape), segment.row_scales), message


def _least_squares_scales(rows: Tensor, z: Tensor, per_row: bool) -> Tensor:
    """The scales that fit the chosen candidates best; never negative."""
    product, power = rows * z, z * z
    top, bottom = (product.sum(1), power.sum(1)) if per_row else (product.sum(), power.sum())
    return (top / bottom.clamp(min=torch.finfo(torch.float32).tiny)).clamp(min=0).view(-1)


def _order(segment: Segment, header: Header) -> Tensor | None:
    return stream_order(segment.rows, header.columns, header.band_columns, header.permuted, segment.code)


def _streams(header: Header, body: bytes) -> Iterator[tuple[Segment, np.ndarray, np.ndarray]]:
    """Each segment with its scales (float32) and its message (uint8)."""
    raw = torch.frombuffer(bytearray(body[: 2 * header.n_scales]), dtype=torch.bfloat16)
    scales, at = raw.float().numpy(), 2 * header.n_scales
    first = 0
    for segment, n_bytes in zip(header.segments, header.message_bytes, strict=True):
        message = np.frombuffer(body, np.uint8, n_bytes, at)
        yield segment, scales[first : first + segment.n_scales], message
        first, at = first + segment.n_scales, at + n_bytes


def _decode_body(header: Header, body: bytes) -> tuple[Tensor, int]:
    """float32 [rows, columns] and its digest, decoded in parallel bands of rows."""
    out = np.empty((header.rows, header.columns), np.float32)
    tasks, top = [], 0
    for segment, scales, message in _streams(header, body):
        target = out[top : top + segment.rows]
        padded, order = cpu.pad_message(message), _order(segment, header)
        z = None
        if order is not None:
            z = np.empty(target.size, np.float32)
            z[order.numpy()] = cpu.decode_stream(torch.from_numpy(message.copy()), segment.code, target.size)
        step = max(1, _TASK_WEIGHTS // header.columns)
        for row in range(0, segment.rows, step):
            tasks.append((target, padded, z, scales, segment, row, min(step, segment.rows - row), top))
        top += segment.rows
    partial: list[int] = []

    def work(target, padded, z, scales, segment, row, n_rows, top) -> None:
        rows = target[row : row + n_rows]
        flat, first = rows.reshape(-1), row * header.columns
        if z is None:
            cpu.decode_range(padded, segment.code, first, flat)
        else:
            flat[:] = z[first : first + flat.size]
        rows *= scales[row : row + n_rows, None] if segment.row_scales else scales[0]
        if header.rotation > 1:
            cpu.hadamard_rows(flat, header.rotation)
        start = top * header.columns + first
        partial.append(int(cpu.digest_words(flat.view(np.uint32), start)))

    cpu.in_threads(work, tasks)
    return torch.from_numpy(out), sum(partial) % 2**64


def _check_scales(header: Header, body: bytes, start: int, where: str) -> None:
    scales = np.frombuffer(body, "<u2", header.n_scales).astype(np.uint32) << 16
    values = scales.view(np.float32)
    good = (values == 0) & (scales == 0) | (values >= _SMALLEST_SCALE) & (values <= _LARGEST_SCALE)
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
