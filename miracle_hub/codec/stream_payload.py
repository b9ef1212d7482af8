"""The payload of a tensor whose message somebody else made, as training does, without rotation."""

import math
from dataclasses import replace

import torch
from torch import Tensor

from miracle_hub.code import StreamCode
from miracle_hub.codec.body import body_of
from miracle_hub.codec.dtypes import DTYPE_NAMES
from miracle_hub.codec.handed_out import require_finite
from miracle_hub.codec.trellis import layout_of
from miracle_hub.coding.backend import choose
from miracle_hub.coding.matrix import CodedRows, matrix_columns
from miracle_hub.format.payload import Header, Segment, encode_payload


def header_of_stream(shape: tuple[int, ...], dtype: str, code: StreamCode, has_row_scales: bool) -> Header:
    """The header of a tensor whose weights, in their own order, are a stream.

    Args:
        dtype: as the format spells it.
        has_row_scales: whether every row of the matrix view has a scale; else every code has one.
    """
    columns = matrix_columns(shape)
    sizes = code.segments(math.prod(shape))
    if not has_row_scales:  # rows are of no account: codes may share one
        columns = math.gcd(columns, *(n for n, _ in sizes))
    segments = tuple(Segment(n // columns, own, has_row_scales) for n, own in sizes)
    return Header(dtype, shape, columns, 1, segments)


def payload_of_stream(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    code: StreamCode,
    scales: Tensor,
    message: Tensor,
    where: str,
    base: Tensor | None = None,
) -> bytes:
    """The payload of a tensor whose weights, in their own order, are a message times its rows' scales.

    Args:
        scales: `[1]`, or one for every row of the matrix view, as the format allows them.
        message: of two codes, both, one after the other.
        where: the tensor's name, for messages.
        base: float32, as many numbers: what the message is the difference to.

    Raises:
        NonFiniteWeightError: its dtype cannot hold such weights.
    """
    header = header_of_stream(shape, DTYPE_NAMES[dtype], code, scales.numel() > 1)
    header = replace(header, is_difference=base is not None)
    words, parts = scales.bfloat16().cpu(), []
    by_row = words if scales.numel() > 1 else words.repeat(len(header.segments))
    messages = message.split(list(header.message_bytes))
    by_segment = by_row.split([segment.n_scales for segment in header.segments])
    for segment, own, bits in zip(header.segments, by_segment, messages, strict=True):
        parts.append(CodedRows(segment.rows, segment.code, own, bits))
    given = dtype if base is None else torch.float32
    weights, digest = choose("cpu").decode_matrix(parts, layout_of(header), given)
    require_finite(weights if base is None else (base.view_as(weights) + weights).to(dtype), where)
    return encode_payload(replace(header, digest=digest), body_of(parts))
