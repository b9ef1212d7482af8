"""How the values of a stream lie: whose they are, in which order, and which scale each of them has."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from miracle_hub.code import StreamCode
from miracle_hub.coding.matrix import FEWEST_ROWS, ROW_SCALE_COLUMNS, matrix_columns
from miracle_hub.coding.order import permutation
from miracle_hub.coding.sharing import Sharing, expand
from miracle_hub.training.loans import is_wrapped


@dataclass(frozen=True)
class Member:
    """One tensor of a stream.

    Attributes:
        name: of the parameter in its model.
        shape: of the parameter.
        dtype: of the parameter.
        sharing: which of its values its weights take.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    sharing: Sharing


class Layout(Protocol):
    """The places of a stream's values; all its tensors are on one device.

    Attributes:
        members: the tensors that share the stream.
        n_values: of all of them.
        n_scales: scales of the prior.
        has_columns: whether values are a matrix, row by row, whose columns a layer's inputs meet.
        base: float32 `[n]`, to which values are differences; None for 0.
    """

    members: tuple[Member, ...]
    n_values: int
    n_scales: int
    has_columns: ClassVar[bool]
    base: Tensor | None

    def start(self, weights: Sequence[Tensor]) -> Tensor:
        """The values, float32 `[n]` in stream order, that come nearest to the members' weights."""
        ...

    def by_value(self, scales: Tensor) -> Tensor:
        """`[scales]` → `[n]` in stream order; one scale stays `[1]`."""
        ...

    def times(self, values: Tensor, scales: Tensor) -> Tensor:
        """Values `[n]` times their scales `[scales]`; gradients reach both."""
        ...

    def mean_squares(self, values: Tensor) -> Tensor:
        """`[n]` → `[scales]`: of the values that share a scale."""
        ...

    def weight(self, values: Tensor, number: int) -> Tensor:
        """The weights of a member in its shape and dtype, from the values of the stream."""
        ...

    def written(self, weight: Tensor, number: int) -> tuple[Tensor, Tensor]:
        """Values `[n]` that give a member these weights, and which of them do; the others are 0."""
        ...


class Matrix(nn.Module):
    """One tensor in its own order, with a scale for every row, or one for all of it.

    The base is no buffer: no state holds it, and no process need send it to others.
    """

    has_columns: ClassVar[bool] = True

    def __init__(self, member: Member, has_row_scales: bool, base: Tensor | None = None) -> None:
        """
        Args:
            member: a tensor none of whose weights share values.
            base: of the member's shape and any dtype, to which values are differences.
        """
        super().__init__()
        self.base = None if base is None else base.detach().float().flatten()
        self.members, self.n_values = (member,), member.sharing.n_values
        self.columns = (scale_columns(member.shape) if has_row_scales else 0) or self.n_values
        self.n_scales = self.n_values // self.columns

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Matrix":
        if self.base is not None:
            self.base = self.base.to(fn(self.base.new_empty(0)).device)
        return super()._apply(fn, recurse)

    def start(self, weights: Sequence[Tensor]) -> Tensor:
        """The weights themselves, or what they have beyond the base."""
        return self.written(weights[0].detach(), 0)[0]

    def by_value(self, scales: Tensor) -> Tensor:
        """`[rows]` → `[n]`; one scale stays `[1]`."""
        return scales if self.n_scales == 1 else scales.repeat_interleave(self.columns)

    def times(self, values: Tensor, scales: Tensor) -> Tensor:
        """Rows times their scales; one tensor of the size of the values is kept for the backward pass."""
        return _ScaledRows.apply(values, scales, self.columns)  # pyright: ignore[reportReturnType]

    def mean_squares(self, values: Tensor) -> Tensor:
        """Of rows, `[rows]`."""
        return values.view(-1, self.columns).square().mean(1)

    def weight(self, values: Tensor, number: int) -> Tensor:
        """The values as a tensor, or, added to the base as readers add them, the sum."""
        total = values if self.base is None else self.base + values
        return total.view(self.members[number].shape).to(self.members[number].dtype)

    def written(self, weight: Tensor, number: int) -> tuple[Tensor, Tensor]:
        """See `Layout`: all of them; with a base the sum may differ from the weight by its rounding."""
        values = weight.float().flatten()
        values = values if self.base is None else values - self.base.to(values.device)
        return values, torch.ones_like(values, dtype=torch.bool)


class Joint(nn.Module):
    """Several tensors, or one whose weights share values: permuted, with one scale per tensor.

    Attributes:
        order, owner: of every stream element which value it stands for, counted member after member, and of
            which member.
        places, signs: of every member, which element of the stream, with which sign, every weight takes.

    They are no buffers: whoever averages buffers must not average indices.
    """

    has_columns: ClassVar[bool] = False
    base: Tensor | None = None

    def __init__(self, members: Sequence[Member], code: StreamCode) -> None:
        """
        Args:
            code: whose seed fixes the permutation and which weights share a value.
        """
        super().__init__()
        self.members, self.n_scales, self.seed = tuple(members), len(members), code.seed
        sizes = torch.tensor([m.sharing.n_values for m in members])
        self.n_values = int(sizes.sum())
        order = permutation(self.n_values, code)
        place_of = torch.empty_like(order).index_copy_(0, order, torch.arange(self.n_values))
        owner = torch.arange(len(members)).repeat_interleave(sizes)
        self.order, self.owner = order, owner[order]
        firsts = (sizes.cumsum(0) - sizes).tolist()
        taken = [member.sharing.places(code.seed, i) for i, member in enumerate(members)]
        self.places = tuple(place_of[first + at] for first, (at, _) in zip(firsts, taken, strict=True))
        self.signs = tuple(signs for _, signs in taken)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Joint":
        self.order, self.owner = fn(self.order), fn(self.owner)
        self.places, self.signs = tuple(map(fn, self.places)), tuple(map(fn, self.signs))
        return super()._apply(fn, recurse)

    def start(self, weights: Sequence[Tensor]) -> Tensor:
        """Of values that several weights take, the mean, at the size of the weights."""
        pairs = enumerate(zip(self.members, weights, strict=True))
        return torch.cat([_shared_values(w, m.sharing, self.seed, i) for i, (m, w) in pairs])[self.order]

    def by_value(self, scales: Tensor) -> Tensor:
        """`[members]` → `[n]` in stream order."""
        return scales.index_select(0, self.owner)

    def times(self, values: Tensor, scales: Tensor) -> Tensor:
        """Values times the scales of their members."""
        return values * self.by_value(scales)

    def mean_squares(self, values: Tensor) -> Tensor:
        """Of members, `[members]`."""
        sums = values.new_zeros(self.n_scales).index_add_(0, self.owner, values.square())
        return sums / torch.bincount(self.owner, minlength=self.n_scales)

    def weight(self, values: Tensor, number: int) -> Tensor:
        """The values of a member, each in all its places."""
        places, signs = self.places[number], self.signs[number]
        # torch.func knows no ops of ours.
        own = values[places] * signs if is_wrapped(values) else expand(values, places, signs)
        return own.view(self.members[number].shape).to(self.members[number].dtype)

    def written(self, weight: Tensor, number: int) -> tuple[Tensor, Tensor]:
        """See `Layout`: of weights that share a value, the last one's."""
        values, places = torch.zeros(self.n_values, device=weight.device), self.places[number]
        values[places] = weight.float().flatten() * self.signs[number]
        return values, torch.zeros_like(values, dtype=torch.bool).index_fill_(0, places, True)


def layout_of(
    members: Sequence[Member], code: StreamCode, has_row_scales: bool, base: Tensor | None = None
) -> Matrix | Joint:
    """One tensor without sharing lies in its own order; all others are permuted together.

    Args:
        has_row_scales: of a tensor in its own order.
        base: to which such a tensor's values are differences.
    """
    if len(members) == 1 and members[0].sharing.kind == "none":
        return Matrix(members[0], has_row_scales, base)
    return Joint(members, code)


def scale_columns(shape: tuple[int, ...]) -> int:
    """The length of rows that have a scale of their own; 0 where they are short."""
    columns = matrix_columns(shape)
    return columns if columns >= ROW_SCALE_COLUMNS and columns < math.prod(shape) else 0


def row_values(shape: tuple[int, ...], has_row_scales: bool) -> int:
    """Values of a tensor that two codes do not share between them: a row that has a scale, or else a row of
    one of 64 at least, which meets sizes to 0.4 % between rates that are a quarter apart.
    """
    if has_row_scales and (columns := scale_columns(shape)):
        return columns
    columns, n_values = matrix_columns(shape), math.prod(shape)
    if n_values // columns >= FEWEST_ROWS:
        return columns
    small = [width for width in range(1, n_values // FEWEST_ROWS + 1) if columns % width == 0]
    return max(small, default=1)


def _shared_values(weights: Tensor, sharing: Sharing, seed: int, number: int) -> Tensor:
    """The values whose sharing comes nearest to given weights: means over all weights that take them."""
    flat = weights.detach().float().flatten()
    if sharing.kind == "none":
        return flat
    places, signs = (x.to(flat.device) for x in sharing.places(seed, number))
    sums = flat.new_zeros(sharing.n_values).index_add_(0, places, flat * signs)
    mean = sums / flat.new_zeros(sharing.n_values).index_add_(0, places, torch.ones_like(flat))
    # Means of unrelated weights are too small by the root of their number: keep the size of the weights.
    power = mean.square().mean().sqrt()
    return mean * (flat.square().mean().sqrt() / power) if float(power) > 0 else mean


class _ScaledRows(torch.autograd.Function):
    """Values `[n]` times the scales `[rows]` of their rows.

    Only the product is kept for the backward pass, as a layer keeps its weight in any case.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, scales: Tensor, columns: int) -> Tensor:
        scaled = (values.view(-1, columns) * scales[:, None]).view(-1)
        ctx.save_for_backward(scaled, scales)
        return scaled

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        scaled, scales = ctx.saved_tensors
        rows = grad.view(scales.numel(), -1)
        by_scales = torch.einsum("rc,rc->r", rows, scaled.view_as(rows)) / scales
        return (rows * scales[:, None]).view(-1), by_scales, None
