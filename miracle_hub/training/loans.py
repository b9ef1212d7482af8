"""Weights that were handed out between passes, and what was written into them since, by whatever way.

torch counts the writes into a tensor, but not those through `.data`, numpy or a tensor that replaces its
memory; so what is handed out is kept beside a copy, and compared when the model is next used, saved or coded.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Key = tuple[int, int]  # of a weight: its stream, and its number in it


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
    """The weights of a model that were handed out since it was last used, one for every key."""

    def __init__(self) -> None:
        self._open: dict[Key, _Loan] = {}

    def lend(self, key: Key, weight: Tensor, is_alias: bool) -> Tensor:
        """The weight to hand out: the tensor of last time, while its values are the same.

        Args:
            is_alias: whether it is the posterior's own memory.
        """
        last = self._open.get(key)
        is_same = last is not None and last.before is not None and not weight.requires_grad
        if last is not None and is_same and _are_equal(weight, last.tensor.detach()):
            return last.tensor
        before = None if is_alias else weight.detach().clone()
        self._open[key] = _Loan(weight, before, weight.data_ptr())
        return weight

    def owner(self, tensor: Tensor) -> Key | None:
        """Whose weight a tensor is, if it was handed out."""
        return next((key for key, loan in self._open.items() if loan.tensor is tensor), None)

    def written(self, key: Key | None = None) -> Iterator[tuple[Key, Tensor]]:
        """Weights that were written to, with what they are now; they are not kept any longer.

        Args:
            key: of the only one to look at, which stays; None means all, which are given back.
        """
        loans = self._open if key is None else {k: loan for k, loan in self._open.items() if k == key}
        found = [(k, loan.tensor.detach()) for k, loan in loans.items() if loan.is_written()]
        for done in list(loans) if key is None else [k for k, _ in found]:
            del self._open[done]
        yield from found


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
    return torch._C._functorch.is_functorch_wrapped_tensor(tensor)  # pyright: ignore


def _are_equal(one: Tensor, other: Tensor) -> bool:
    """Whether they have the same values, NaN being equal to NaN."""
    if one.shape != other.shape or one.dtype != other.dtype or one.device != other.device:
        return False
    return torch.equal(one, other) or bool(((one == other) | ((one != one) & (other != other))).all())
