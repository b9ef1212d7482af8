"""Weights that were handed out between passes, and what was written into them since, by whatever way.

torch counts the writes into a tensor, but not those through `.data`, numpy or a tensor that replaces its
memory; so what is handed out is kept beside a copy, and compared when the model is next used, saved or coded.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Key = tuple[int, int]  # of a weight: its stream, and its number in it
_OWN_REFERENCES = 2  # to a tensor that nobody else has: the loan's, and that of who counts
_MOST_HELD = 3  # of one weight, besides the last one: a choice


@dataclass(frozen=True)
class _Loan:
    """A weight that somebody may hold.

    Attributes:
        tensor: what was handed out.
        before: its values then; None if it is the posterior's own memory, where writes are none of our
            business unless they put another memory in its place.
        pointer: of its memory.
    """

    tensor: Tensor
    before: Tensor | None
    pointer: int

    def is_written(self) -> bool:
        if self.before is not None:
            return not _are_equal(self.tensor.detach(), self.before)
        return self.tensor.data_ptr() != self.pointer


class Loans:
    """The weights of a model that were handed out since it was last used."""

    def __init__(self) -> None:
        self._open: dict[Key, list[_Loan]] = {}

    def lend(self, key: Key, weight: Tensor, is_alias: bool) -> Tensor:
        """The weight to hand out: the tensor of last time, while its values are the same.

        Args:
            is_alias: whether it is the posterior's own memory.
        """
        held = [loan for loan in self._open.get(key, []) if sys.getrefcount(loan.tensor) > _OWN_REFERENCES]
        for loan in self._open.get(key, []):
            is_same = loan.before is not None and not weight.requires_grad
            if is_same and _are_equal(weight, loan.tensor.detach()):
                return loan.tensor
        before = None if is_alias else weight.detach().clone()
        # With a graph it is another tensor every time; those of before that somebody has are kept too.
        self._open[key] = [*held[-_MOST_HELD:], _Loan(weight, before, weight.data_ptr())]
        return weight

    def owner(self, tensor: Tensor) -> Key | None:
        """Whose weight a tensor is, if it was handed out."""
        every = ((key, loan) for key, loans in self._open.items() for loan in loans)
        return next((key for key, loan in every if loan.tensor is tensor), None)

    def written(self, key: Key | None = None) -> Iterator[tuple[Key, Tensor]]:
        """Weights that were written to, with what they are now; they are not kept any longer.

        Args:
            key: of the only one to look at, which stays; None means all, which are given back.
        """
        for own in list(self._open) if key is None else [key]:
            loans = self._open.pop(own, [])
            found = [loan.tensor.detach() for loan in loans if loan.is_written()]
            if not found and key is not None:
                self._open[own] = loans
            yield from ((own, weight) for weight in found[-1:])


class Seen:
    """What tensors were, to tell whether they are still the same: the very tensors, with the same values."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = list(tensors)
        self._values = [tensor.detach().clone() for tensor in tensors]

    def is_now(self, tensors: Sequence[Tensor]) -> bool:
        """Whether nothing was written to them, nor put in their place."""
        if len(tensors) != len(self._tensors):
            return False
        return all(
            tensor is before and _are_equal(tensor.detach(), values)
            for tensor, before, values in zip(tensors, self._tensors, self._values, strict=True)
        )


def is_wrapped(tensor: Tensor) -> bool:
    """Whether a tensor is one of torch.func's, whose values cannot be looked at."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._functorch.is_functorch_wrapped_tensor(tensor)  # pyright: ignore


def _are_equal(one: Tensor, other: Tensor) -> bool:
    """Whether they have the same values, NaN being equal to NaN."""
    if one.shape != other.shape or one.dtype != other.dtype or one.device != other.device:
        return False
    return torch.equal(one, other) or bool(((one == other) | ((one != one) & (other != other))).all())
