"""The codec of differences of low rank: the product of two thin factors, and, coded after it, what it leaves.

A fine-tuning moves a matrix in few directions more than in all others. Its first singular vectors, as in
Delta-CoMe (Ping et al. 2024, arXiv:2406.08903), take (rows + columns)/(rows · columns) of a matrix each.
Other than there all of them have the same rate, and the second factor is fitted to the first as it decodes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float32
from torch import Tensor

from miracle_hub.code import Code
from miracle_hub.codec.curvature import Curvature
from miracle_hub.codec.dtypes import DTYPE_NAMES, TORCH_DTYPES, as_bytes
from miracle_hub.codec.handed_out import left_by, relative_error, require_finite
from miracle_hub.codec.payloads import Packed, PayloadFacts, Request
from miracle_hub.codec.rates import Chosen, Option
from miracle_hub.codec.trellis import Recipe, TrellisPayload, encode_tensor
from miracle_hub.coding.backend import Backend
from miracle_hub.coding.digest import digest
from miracle_hub.coding.matrix import matrix_columns
from miracle_hub.coding.rotation import widest_rotation
from miracle_hub.errors import ChecksumError, OptionError
from miracle_hub.format.payload import Header, Segment
from miracle_hub.format.spec import TensorSpec
from miracle_hub.format.thin import MAGIC, Parts, ThinHeader, decode_thin, encode_thin, thin_bytes

# Choices.
_RANKS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
_FACTOR_RATES = ((2, 1), (3, 1), (4, 1))
# (k, V) of what the factors leave.
_REST_RATES = ((1, 32), (1, 16), (1, 8), (1, 4), (1, 2), (3, 4), (1, 1), (3, 2), (2, 1))
_FEWEST_ROWS = 32
# Of a rate, that codes of windows of 12 bits make use of: 0.94 to 1 (benchmarks/rate_distortion.py).
_SHARE_OF_RATE = 0.95
# Of the search for singular vectors: directions beyond those that are asked for, and multiplications.
_BEYOND, _POWERS = 8, 3


@dataclass(frozen=True)
class ThinRecipe:
    """How to code a difference.

    Attributes:
        rank: of the product.
        code: of both factors.
        limit: width of their widest Hadamard groups.
        rest: of what the product leaves; None if nothing of it is coded.
        columns: of the matrix view.
    """

    rank: int
    code: Code
    limit: int
    rest: Recipe | None
    columns: int

    def header(self, length: int) -> Header:
        """Of one factor, `[rank, length]`."""
        columns = matrix_columns((self.rank, length))
        segment = Segment(self.rank * length // columns, self.code, row_scales=True)
        return Header("F32", (self.rank, length), columns, widest_rotation(columns, self.limit), (segment,))


@dataclass(frozen=True)
class _Spectrum:
    """Shares of the squared difference that the first singular vectors have, and the matrix's size."""

    rows: int
    columns: int
    shares: list[float]


class Thin:
    """See `payloads.Codec`."""

    name, magic = "thin", MAGIC

    def read(self, data: Tensor, where: str) -> "ThinPayload":
        """
        Raises:
            FormatError: and its subclasses, for every way in which the payload can be wrong but its digests.
        """
        return ThinPayload(data, where)

    def survey(self, spec: TensorSpec, weights: Tensor, request: Request, is_difference: bool = False) -> Any:
        """The first singular values of a difference; None where factors would not be thin."""
        if not is_difference or len(spec.shape) < 2 or not bool(weights.any()):
            return None
        matrix = weights.reshape(spec.shape[0], -1).float()
        if min(matrix.shape) < _FEWEST_ROWS:
            return None
        n = min(_RANKS[-1], min(matrix.shape) // 4)
        _, values, _ = singular(matrix, n)
        power = float(matrix.double().square().sum())
        shares = (values.double().square() / power).tolist()
        return _Spectrum(matrix.shape[0], matrix.shape[1], shares)

    def offers(self, surveys: Sequence[Any], request: Request) -> list[list[Option]]:
        """Factors of some ranks and rates, and what they leave at some rates or not at all."""
        return [self._offers(spectrum, request) for spectrum in surveys]

    def _offers(self, spectrum: _Spectrum, request: Request) -> list[Option]:
        from miracle_hub.codec.ladder import SIZE_EXPONENT, ladder

        n_weights, found = spectrum.rows * spectrum.columns, list[Option]()
        rests = [None, *ladder(request.window_bits, request.seed, _REST_RATES)]
        for rank in (rank for rank in _RANKS if rank <= len(spectrum.shares)):
            for code in ladder(request.window_bits, request.seed, _FACTOR_RATES):
                left = max(0.0, 1 - sum(spectrum.shares[:rank]) * (1 - _left_by(code)) ** 2)
                for rest in rests:
                    recipe = self._recipe(spectrum, rank, code, rest, request)
                    error = left * (1.0 if rest is None else _left_by(rest)) * n_weights**SIZE_EXPONENT
                    shape = (spectrum.rows, spectrum.columns)
                    found.append(Option(recipe, _n_bytes(shape, recipe), error, self.name, splits=False))
        return found

    def _recipe(
        self, spectrum: _Spectrum, rank: int, code: Code, rest: Code | None, request: Request
    ) -> ThinRecipe:
        columns, limit = spectrum.columns, request.rotation
        own = None if rest is None else Recipe(rest, False, columns, widest_rotation(columns, limit))
        return ThinRecipe(rank, code, limit, own, columns)

    def payload_bytes(self, spec: TensorSpec, choice: Chosen) -> int:
        """The exact length of the payload that `encode` will write."""
        return _n_bytes(spec.shape, choice.option.recipe)

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
        """The payload of a difference. Of curvature there is no use.

        Raises:
            OptionError: there is no base, or there are other parts.
        """
        if base is None or earlier:
            raise OptionError(
                f"{where}: expected a difference to a base, found weights; choose another codec"
            )
        recipe: ThinRecipe = choice.option.recipe
        weights = weights.to(backend.device)
        difference = left_by([base.to(backend.device).float()], weights).reshape(len(weights), -1)
        factors = _encoded_factors(difference, recipe, where, backend)
        return encode_sum(weights, base, factors, recipe.rest, where, backend)


THIN = Thin()


def _left_by(code: Code) -> float:
    """Of the square of Gaussian values, by coding them; 2^(-2·rate) would be the least."""
    return 2 ** (-2 * _SHARE_OF_RATE * code.rate)


def _n_bytes(shape: tuple[int, ...], recipe: ThinRecipe) -> int:
    rows, columns = shape[0], 1
    for n in shape[1:]:
        columns *= n
    factors = [recipe.header(length).payload_bytes for length in (rows, columns)]
    rest = 0 if recipe.rest is None else rest_header(shape, recipe.rest).payload_bytes
    return thin_bytes(shape, *factors) + sum(factors) + rest


def rest_header(shape: tuple[int, ...], recipe: Recipe) -> Header:
    """Of what factors leave."""
    rows = 1
    for n in shape:
        rows *= n
    columns = matrix_columns(shape)
    segment = Segment(rows // columns, recipe.code, recipe.row_scales)
    rotation = widest_rotation(columns, recipe.rotation)
    return Header("F32", shape, columns, rotation, (segment,), is_difference=True)


@torch.no_grad()
def singular(matrix: Float32[Tensor, "rows columns"], n: int) -> tuple[Tensor, Tensor, Tensor]:
    """The first singular vectors, `[rows, n]` and `[columns, n]`, and values, `[n]`; the same on every call.

    Source: randomized subspace iteration (Halko, Martinsson and Tropp 2011, arXiv:0909.4061, algorithm 4.4).
    """
    width = min(n + _BEYOND, *matrix.shape)
    generator = torch.Generator().manual_seed(0)
    found = torch.randn(matrix.shape[1], width, generator=generator).to(matrix.device)
    for _ in range(_POWERS):
        q, _ = torch.linalg.qr(matrix @ found)
        found, _ = torch.linalg.qr(matrix.T @ q)
    left, values, right = torch.linalg.svd(matrix @ found, full_matrices=False)
    return left[:, :n], values[:n], (found @ right.T)[:, :n]


def thin_factors(matrix: Float32[Tensor, "rows columns"], rank: int) -> tuple[Tensor, Tensor]:
    """Factors `[rank, rows]` and `[rank, columns]` of a matrix's first singular vectors."""
    left, values, right = singular(matrix, rank)
    roots = values.sqrt()
    return (left * roots).T.contiguous(), (right * roots).T.contiguous()


def product(
    left: Float32[Tensor, "rank rows"], right: Float32[Tensor, "rank columns"]
) -> Float32[Tensor, "rows columns"]:
    """The sum over the rank, in order: each product is rounded, and each sum (FORMAT.md, "Thin payload")."""
    total = left[0, :, None] * right[0]
    for one, other in zip(left[1:], right[1:], strict=True):
        total = total + one[:, None] * other
    return total


def _encoded_factors(
    difference: Tensor, recipe: ThinRecipe, where: str, backend: Backend
) -> tuple[bytes, bytes]:
    """Payloads of both factors; the second makes up for what coding does to the first."""
    left, _ = thin_factors(difference, recipe.rank)
    first = encode_factor(left, recipe, where, backend)
    found = TrellisPayload(as_bytes(first), where).decode(backend, verify=False)
    right = torch.linalg.lstsq(found.T.double(), difference.double()).solution.float()
    return first, encode_factor(right, recipe, where, backend)


def encode_factor(factor: Tensor, recipe: ThinRecipe, where: str, backend: Backend) -> bytes:
    """The payload of one factor, `[rank, length]`."""
    header = recipe.header(factor.shape[1])
    return encode_tensor(factor, header.segments, header.rotation, where=where, backend=backend)


def encode_sum(
    weights: Tensor,
    base: Tensor,
    factors: tuple[bytes, bytes],
    rest: Recipe | None,
    where: str,
    backend: Backend,
) -> bytes:
    """The payload of a tensor's difference to a base, of which factors are coded already.

    Args:
        weights: as the source has them.
        rest: how what the factors leave is coded; None if it is not.

    Raises:
        NonFiniteWeightError: the sum is beyond the dtype.
    """
    base = base.to(backend.device).float()
    left, right = (TrellisPayload(as_bytes(one), where).decode(backend, verify=False) for one in factors)
    found, last = product(left, right).view(weights.shape), b""
    if rest is not None:
        header = rest_header(tuple(weights.shape), rest)
        given = {"where": where, "backend": backend, "earlier": [found], "base": base}
        last = encode_tensor(weights.float(), header.segments, header.rotation, **given)
        found = found + TrellisPayload(as_bytes(last), where).decode(backend, verify=False)
    handed_out = (base + found).to(weights.dtype)
    require_finite(handed_out, where)
    error = relative_error(handed_out, [base], weights)
    own = digest(found.flatten().cpu())
    header = ThinHeader(DTYPE_NAMES[weights.dtype], tuple(weights.shape), error, own)
    return encode_thin(header, Parts(*factors, last))


class ThinPayload:
    """See `payloads.Payload`."""

    def __init__(self, data: Tensor, where: str) -> None:
        """
        Args:
            data: uint8 `[bytes]` on any device.
            where: the tensor's name, for messages.

        Raises:
            FormatError: and its subclasses, for every way in which the payload can be wrong but its digests.
        """
        self.where = where
        self.header, parts = decode_thin(data.detach().cpu().numpy().tobytes(), where)
        self.left, self.right = (TrellisPayload(as_bytes(one), where) for one in (parts.left, parts.right))
        self.rest = TrellisPayload(as_bytes(parts.rest), where) if parts.rest else None

    @property
    def facts(self) -> PayloadFacts:
        """Those of the header, with the codes of all parts."""
        header, rest = self.header, () if self.rest is None else self.rest.facts.codes
        return PayloadFacts(
            codec=THIN.name,
            dtype=header.dtype,
            shape=header.shape,
            digest=header.digest,
            relative_error=header.relative_error,
            codes=(*self.left.facts.codes, *self.right.facts.codes, *rest),
            rotation=self.right.facts.rotation,
            row_scales=True,
            scale=self.right.facts.scale,
            is_difference=True,
        )

    def decode(self, backend: Backend, *, verify: bool = True, rounded: bool = False) -> Tensor:
        """The difference in its own shape.

        Raises:
            ChecksumError: it is not what was compressed.
        """
        left, right = (one.decode(backend, verify=verify) for one in (self.left, self.right))
        found = product(left, right).view(self.header.shape)
        if self.rest is not None:
            found = found + self.rest.decode(backend, verify=verify)
        if verify and (own := digest(found.flatten().cpu())) != self.header.digest:
            raise ChecksumError(
                f"{self.where}: the decoded weights have digest {own:016x}, the header promises "
                f"{self.header.digest:016x}; the payload is damaged: download the file again"
            )
        return found.to(TORCH_DTYPES[self.header.dtype]) if rounded else found

    def packed(self, dtype: torch.dtype | None, backend: str) -> Packed:
        """
        Raises:
            OptionError: always: a difference does not decode alone.
        """
        raise OptionError(
            f"{self.where}: expected a matrix by itself, found a difference to a base; load it dense"
        )
