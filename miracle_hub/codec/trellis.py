"""The codec of the trellis and of MIRACLE's blocks: one tensor ⇄ one payload."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from miracle_hub.code import Code
from miracle_hub.codec.body import body_of, check_payload, coded_rows
from miracle_hub.codec.curvature import Curvature
from miracle_hub.codec.dtypes import DTYPE_NAMES, TORCH_DTYPES
from miracle_hub.codec.payloads import Packed, PayloadFacts, Request
from miracle_hub.codec.rates import Choice, Chosen, Option
from miracle_hub.coding.backend import Backend, choose, rotated_matrix
from miracle_hub.coding.matrix import ROW_SCALE_COLUMNS, CodedRows, MatrixLayout, matrix_columns
from miracle_hub.coding.posterior import squared_error_cost
from miracle_hub.coding.rotation import check_width, widest_rotation
from miracle_hub.coding.scales import prior_scale, rounded_scales
from miracle_hub.errors import ChecksumError, OptionError
from miracle_hub.format.payload import MAGIC, SCALE_BYTES, Header, Segment, encode_payload
from miracle_hub.format.spec import TensorSpec


@dataclass(frozen=True)
class Recipe:
    """How to code rows of a tensor.

    Attributes:
        columns, rotation: of the matrix view; all recipes of a tensor have the same.
    """

    code: Code
    row_scales: bool
    columns: int
    rotation: int


class Trellis:
    """See `payloads.Codec`."""

    name, magic = "trellis", MAGIC

    def read(self, data: Tensor, where: str) -> "TrellisPayload":
        """
        Raises:
            FormatError: and its subclasses, for every way in which the payload can be wrong but its digest.
        """
        return TrellisPayload(data, where)

    def survey(self, spec: TensorSpec, weights: Tensor, request: Request, is_difference: bool = False) -> Any:
        """Some rows, rotated; None if the tensor's size is beyond that of scales."""
        from miracle_hub.codec.ladder import sample_rows

        columns = matrix_columns(spec.shape)
        rotation = widest_rotation(columns, request.rotation)
        return sample_rows(weights, columns, rotation, request.n_tensors, request.backend, is_difference)

    def offers(self, surveys: Sequence[Any], request: Request) -> list[list[Option]]:
        """Rates from 0.25 to 8 bits per weight, of differences from 1/32 bit; one scale, or one per row."""
        from miracle_hub.codec.ladder import measure_options

        return measure_options(surveys, request)

    def payload_bytes(self, spec: TensorSpec, choice: Chosen) -> int:
        """The exact length of the payload that `encode` will write."""
        recipe: Recipe = choice.option.recipe
        header = Header(spec.dtype, spec.shape, recipe.columns, recipe.rotation, segments_of(choice))
        return header.payload_bytes

    def encode(
        self,
        weights: Tensor,
        choice: Chosen,
        where: str,
        backend: Backend,
        earlier: Sequence[Tensor] = (),
        curvature: Curvature | None = None,
        base: Tensor | None = None,
    ) -> bytes:
        """The payload of the least error that the search finds, squared or as curvature weighs it."""
        given = {"where": where, "backend": backend, "earlier": earlier, "curvature": curvature, "base": base}
        return encode_tensor(weights, segments_of(choice), choice.option.recipe.rotation, **given)


TRELLIS = Trellis()


class TrellisPayload:
    """See `payloads.Payload`."""

    def __init__(self, data: Tensor, where: str) -> None:
        """
        Args:
            data: uint8 `[bytes]` on any device.
            where: the tensor's name, for messages.

        Raises:
            FormatError: and its subclasses, for every way in which the payload can be wrong but its digest.
        """
        self.data, self.where = data, where
        self.header, self.start = check_payload(data.detach().cpu().numpy().tobytes(), where)

    @property
    def facts(self) -> PayloadFacts:
        """What the header says, and the median scale."""
        header = self.header
        end = self.start + SCALE_BYTES * header.n_scales
        scales = self.data[self.start : end].clone().cpu().view(torch.bfloat16)
        return PayloadFacts(
            codec=TRELLIS.name,
            dtype=header.dtype,
            shape=header.shape,
            digest=header.digest,
            relative_error=header.relative_error,
            codes=tuple(segment.code for segment in header.segments),
            rotation=header.rotation,
            row_scales=any(segment.row_scales for segment in header.segments),
            scale=float(np.median(scales.float().numpy())),
            has_rows=is_packable(header) and not header.is_difference,
            is_difference=header.is_difference,
        )

    def decode(self, backend: Backend, *, verify: bool = True, rounded: bool = False) -> Tensor:
        """
        Raises:
            ChecksumError: the weights are not what was compressed.
        """
        header = self.header
        parts = list(coded_rows(header, self.data.to(backend.device), self.start))
        dtype = TORCH_DTYPES[header.dtype] if rounded else torch.float32
        decoded, digest = backend.decode_matrix(parts, layout_of(header), dtype)
        if verify and digest != header.digest:
            raise ChecksumError(
                f"{self.where}: the decoded weights have digest {digest:016x}, the header promises "
                f"{header.digest:016x}; the payload is damaged: download the file again"
            )
        return decoded.view(header.shape)

    def packed(self, dtype: torch.dtype | None, backend: str) -> Packed:
        """
        Raises:
            OptionError: rows of it do not decode alone.
            BackendError: the backend cannot run where the payload is.
        """
        from miracle_hub.codec.packed import PackedMatrix

        return PackedMatrix(self.data, self.where, dtype, backend)


def is_packable(header: Header) -> bool:
    """Whether a payload can stay compressed: a matrix, each of whose rows is whole rows of the payload."""
    return len(header.shape) == 2 and header.shape[1] % header.columns == 0


def refinement(spec: TensorSpec, rotation: int, code: Code) -> Choice:
    """How what earlier stages leave of a tensor is coded: all rows alike.

    Args:
        rotation: width of the widest Hadamard groups.
    """
    columns = matrix_columns(spec.shape)
    recipe = Recipe(code, columns >= ROW_SCALE_COLUMNS, columns, widest_rotation(columns, rotation))
    return Choice(spec.n_weights // columns, Option(recipe, 0, 0.0))


def segments_of(choice: Chosen) -> tuple[Segment, ...]:
    """Of the payload that a choice becomes."""
    return tuple(Segment(rows, recipe.code, recipe.row_scales) for rows, recipe in choice.parts())


def encode_tensor(
    weights: Tensor,
    segments: Sequence[Segment],
    rotation: int,
    *,
    where: str,
    band_columns: int = 0,
    permuted: bool = False,
    selection: str = "best",
    generator: torch.Generator | None = None,
    backend: Backend | None = None,
    earlier: Sequence[Tensor] = (),
    curvature: Curvature | None = None,
    base: Tensor | None = None,
) -> bytes:
    """The payload of a tensor; `decode_payload` gives its weights back.

    Args:
        weights: any floating dtype and shape, finite, not empty.
        segments: consecutive rows; their row counts add up to the matrix view's rows.
        rotation: width of the Hadamard groups; 1 means none.
        where: the tensor's name, for messages.
        backend: None means the one for the device of `weights`.
        earlier: float32 weights of payloads that come before in the tensor's sum: what they leave is coded.
        curvature: with moments of the columns, every band of them makes up for the errors of those before;
            bands are then those of `feedback`.
        base: of any dtype; the payload is the difference to it.

    Raises:
        OptionError: the rotation or the segments do not fit the tensor.
    """
    from miracle_hub.codec.feedback import band_columns as bands_of
    from miracle_hub.codec.feedback import encode_with_feedback
    from miracle_hub.codec.handed_out import decoded_in_range, left_by, relative_error

    backend = backend or choose(device=weights.device)
    columns = matrix_columns(tuple(weights.shape))
    check_width(rotation, columns, where)
    _check_rows(segments, weights.numel() // columns, where)
    factor = None if curvature is None else curvature.factor(rotation, backend)
    width = band_columns if factor is None else bands_of(columns)
    dtype, shape = "F32" if earlier else DTYPE_NAMES[weights.dtype], tuple(weights.shape)
    kind = {"is_difference": base is not None}
    header = Header(dtype, shape, columns, rotation, tuple(segments), width, permuted, **kind)
    weights = weights.to(backend.device)
    earlier = earlier if base is None else [base.to(backend.device).float(), *earlier]
    matrix = rotated_matrix(left_by(earlier, weights), columns, rotation, backend)
    if factor is None:
        parts = _encode_segments(matrix, header, selection, generator, backend)
    else:
        fed = (rotation, factor, backend, header.is_difference)
        parts = encode_with_feedback(matrix, header.segments, *fed)
    handed_out, digest = decoded_in_range(parts, layout_of(header), earlier, weights.dtype, backend)
    error = relative_error(handed_out, earlier, weights)
    return encode_payload(replace(header, digest=digest, relative_error=error), body_of(parts))


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
        verify, rounded: see `payloads.Payload.decode`.
        backend: a name means that backend on the payload's device.

    Raises:
        FormatError: and its subclasses, for every way in which the payload can be wrong.
        BackendError: the backend cannot run there.
    """
    backend = choose(backend, payload.device) if isinstance(backend, str) else backend
    found = TrellisPayload(payload, where)
    return found.decode(backend, verify=verify, rounded=rounded), found.header


def _check_rows(segments: Sequence[Segment], rows: int, where: str) -> None:
    found = [segment.rows for segment in segments]
    if sum(found) != rows or min(found, default=0) < 1:
        raise OptionError(
            f"{where}: expected segments that share {rows} rows, found segments of {found} rows; "
            "give every segment at least one row"
        )


def _encode_segments(
    matrix: Tensor, header: Header, selection: str, generator: torch.Generator | None, backend: Backend
) -> list[CodedRows]:
    parts = zip(header.segments, matrix.split([segment.rows for segment in header.segments]), strict=True)
    return [_encode_segment(rows, own, header, selection, generator, backend) for own, rows in parts]


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
    fitted = _least_squares_scales(rows, z.view(rows.shape), segment.row_scales)
    if header.is_difference:
        fitted = fitted * _gain(rows, fitted[:, None] * z.view(rows.shape))
    fitted = fitted / math.sqrt(header.rotation)
    return CodedRows(segment.rows, segment.code, rounded_scales(fitted).bfloat16(), message)


def _gain(rows: Tensor, found: Tensor) -> float:
    """By which values of least squared error are multiplied; see `aligned`."""
    from miracle_hub.codec.aligned import gain

    power = float(rows.double().square().sum())
    return gain(min(1.0, float((rows - found).double().square().sum()) / power)) if power else 1.0


def _least_squares_scales(rows: Tensor, z: Tensor, per_row: bool) -> Tensor:
    """The scales that fit the chosen candidates best; never negative."""
    product, power = rows * z, z * z
    top, bottom = (product.sum(1), power.sum(1)) if per_row else (product.sum(), power.sum())
    return (top / bottom.clamp(min=torch.finfo(torch.float32).tiny)).clamp(min=0).view(-1)
