"""The codec of differences in some rows: those of words that a fine-tuning met, of a word table.

What is far from the base is coded as a matrix of its own by the trellis; all other rows are the base's.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from miracle_hub.codec.curvature import Curvature
from miracle_hub.codec.dtypes import TORCH_DTYPES
from miracle_hub.codec.handed_out import left_by
from miracle_hub.codec.payloads import Packed, PayloadFacts, Request
from miracle_hub.codec.rates import Choice, Chosen, Option
from miracle_hub.codec.trellis import TRELLIS, Recipe, TrellisPayload
from miracle_hub.coding.backend import Backend
from miracle_hub.errors import OptionError
from miracle_hub.format.payload import decode_header, encode_payload
from miracle_hub.format.rows import MAGIC, WEIGHTS_PER_BYTE, RowsHeader, decode_rows, encode_rows, rows_bytes
from miracle_hub.format.spec import TensorSpec

# Shares of the squared difference that the rows which are coded have, the farthest first: choices.
_SHARES = (0.5, 0.8, 0.95, 1.0)
# Of the rows; with more of them there is little to save.
_MOST_KEPT = 0.9
_FEWEST_ROWS = 256


@dataclass(frozen=True)
class RowsRecipe:
    """How to code some rows.

    Attributes:
        rows: which, as bits.
        inner: how they are coded.
    """

    rows: bytes
    inner: Recipe

    @property
    def columns(self) -> int:
        """Of the matrix view."""
        return self.inner.columns

    def kept(self, n_rows: int) -> np.ndarray:
        """Whether each row is coded, bool `[rows]`."""
        return _unpacked(self.rows, n_rows)


@dataclass(frozen=True)
class _Some:
    """Rows that may be coded, and the share of the squared difference that they have."""

    rows: np.ndarray
    share: float
    sample: Any


class Rows:
    """See `payloads.Codec`."""

    name, magic = "rows", MAGIC

    def read(self, data: Tensor, where: str) -> "RowsPayload":
        """
        Raises:
            FormatError: and its subclasses, for every way in which the payload can be wrong but its digest.
        """
        return RowsPayload(data, where)

    def survey(self, spec: TensorSpec, weights: Tensor, request: Request, is_difference: bool = False) -> Any:
        """Sets of rows, the farthest from the base; None where these are nearly all of them."""
        if not is_difference or len(spec.shape) < 2 or spec.shape[0] < _FEWEST_ROWS:
            return None
        if spec.n_weights > WEIGHTS_PER_BYTE * rows_bytes(spec.shape):
            return None
        matrix = weights.reshape(spec.shape[0], -1)
        power = matrix.double().square().sum(1).numpy()
        found = [self._some(matrix, power, share, request) for share in _SHARES]
        # The same rows may have several shares.
        kept = {some.rows.tobytes(): some for some in found if some is not None}
        return list(kept.values()) or None

    def _some(self, matrix: Tensor, power: np.ndarray, share: float, request: Request) -> _Some | None:
        order = np.argsort(-power, kind="stable")
        summed = np.cumsum(power[order])
        if not summed[-1] > 0:
            return None
        n_kept = min(int(np.searchsorted(summed, share * summed[-1])) + 1, int((power > 0).sum()))
        if n_kept > _MOST_KEPT * len(power):
            return None
        rows = np.zeros(len(power), bool)
        rows[order[:n_kept]] = True
        own = matrix[torch.from_numpy(rows)]
        spec = TensorSpec("", "F32", tuple(own.shape))
        sample = TRELLIS.survey(spec, own, request, is_difference=True)
        return None if sample is None else _Some(rows, float(summed[n_kept - 1] / summed[-1]), sample)

    def offers(self, surveys: Sequence[Any], request: Request) -> list[list[Option]]:
        """What the trellis offers of each set of rows."""
        from miracle_hub.codec.ladder import SIZE_EXPONENT

        flat = [some for survey in surveys for some in survey]
        offered = iter(TRELLIS.offers([some.sample for some in flat], request))

        def of(some: _Some, option: Option) -> Option:
            n_rows, own = len(some.rows), some.sample.rows * some.sample.columns
            relative = option.error / own**SIZE_EXPONENT
            n_weights = own // int(some.rows.sum()) * n_rows
            error = (some.share * relative + 1 - some.share) * n_weights**SIZE_EXPONENT
            packed = np.packbits(some.rows, bitorder="little").tobytes()
            recipe = RowsRecipe(packed, option.recipe)
            return Option(recipe, option.n_bytes + n_rows // 8, error, self.name, splits=False)

        return [[of(some, option) for some in survey for option in next(offered)] for survey in surveys]

    def payload_bytes(self, spec: TensorSpec, choice: Chosen) -> int:
        """The exact length of the payload that `encode` will write."""
        inner, own = self._inner(spec, choice.option.recipe)
        return rows_bytes(spec.shape) + TRELLIS.payload_bytes(own, inner)

    def _inner(self, spec: TensorSpec, recipe: RowsRecipe) -> tuple[Choice, TensorSpec]:
        """How the rows that are coded are, and what they are."""
        n_kept, columns = int(recipe.kept(spec.shape[0]).sum()), spec.n_weights // spec.shape[0]
        own = TensorSpec(spec.name, spec.dtype, (n_kept, columns))
        rows = n_kept * columns // recipe.inner.columns
        return Choice(rows, Option(recipe.inner, 0, 0.0)), own

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
        """The payload of a difference.

        Raises:
            OptionError: there is no base, or there are other parts.
        """
        if base is None or earlier:
            raise OptionError(
                f"{where}: expected a difference to a base, found weights; choose another codec"
            )
        recipe: RowsRecipe = choice.option.recipe
        kept = torch.from_numpy(recipe.kept(len(weights)))
        own, theirs = (tensor.reshape(len(weights), -1)[kept] for tensor in (weights, base))
        inner, _ = self._inner(TensorSpec(where, "F32", tuple(weights.shape)), recipe)
        payload = TRELLIS.encode(own, inner, where, backend, curvature=curvature, base=theirs)
        header, start = decode_header(payload, where)
        power = _squared(left_by([base.to(weights.dtype).float()], weights))
        left = _squared(left_by([theirs.to(own.dtype).float()], own))
        error = (power - left + header.relative_error * left) / power if power else 0.0
        whole = encode_payload(replace(header, relative_error=error), payload[start:])
        return encode_rows(tuple(weights.shape), recipe.rows, whole)


def _unpacked(packed: bytes, n_rows: int) -> np.ndarray:
    """A bit for each row as bool `[rows]`."""
    return np.unpackbits(np.frombuffer(packed, np.uint8), count=n_rows, bitorder="little").astype(bool)


def _squared(values: Tensor) -> float:
    return float(values.double().square().sum())


ROWS = Rows()


class RowsPayload:
    """See `payloads.Payload`."""

    def __init__(self, data: Tensor, where: str) -> None:
        """
        Args:
            data: uint8 `[bytes]` on any device.
            where: the tensor's name, for messages.

        Raises:
            FormatError: and its subclasses, for every way in which the payload can be wrong but its digest.
        """
        self.where = where
        self.header: RowsHeader = decode_rows(data.detach().cpu().numpy().tobytes(), where)
        self.inner = TrellisPayload(data[self.header.start :], where)

    @property
    def facts(self) -> PayloadFacts:
        """Those of the rows, but for the shape."""
        return replace(self.inner.facts, codec=ROWS.name, shape=self.header.shape, has_rows=False)

    def decode(self, backend: Backend, *, verify: bool = True, rounded: bool = False) -> Tensor:
        """The difference in its own shape; rows that are the base's are zero.

        Raises:
            ChecksumError: the rows are not what was compressed.
        """
        rows = self.inner.decode(backend, verify=verify)
        n_rows, *others = self.header.shape
        whole = torch.zeros(n_rows, math.prod(others), device=rows.device)
        whole[torch.from_numpy(_unpacked(self.header.rows, n_rows)).to(rows.device)] = rows
        whole = whole.view(self.header.shape)
        return whole.to(TORCH_DTYPES[self.header.inner.dtype]) if rounded else whole

    def packed(self, dtype: torch.dtype | None, backend: str) -> Packed:
        """
        Raises:
            OptionError: always: a difference does not decode alone.
        """
        raise OptionError(
            f"{self.where}: expected a matrix by itself, found a difference to a base; load it dense"
        )
