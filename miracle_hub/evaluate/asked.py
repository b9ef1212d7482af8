"""Whether answers depend on the row alone: every row is asked twice, in other company, and some at the end.

A certificate is of one function of a row. Layers that normalize by the batch, dropout that was left on,
noise, counters and caches make answers that are none, and do not show in one pass over the rows.
"""

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from miracle_hub.errors import DataError, SourceError

# How far two answers to a row may be apart, relative to its largest logit: sums are taken in another order
# in batches of other sizes. Deep float32 models differ by up to 1e-5 on a CPU; GPUs may multiply in TF32.
_TOLERANCES = {"cpu": 1e-3}
_OTHER_TOLERANCE = 1e-2
_ROUNDINGS = 16  # of 16-bit dtypes
_ASKED_AT_THE_END = 64  # rows, the first ones of batches: a choice


def rows_of(inputs: Any, rows: Tensor) -> Any:
    """Some rows of a batch: a tensor, or tuples, lists and mappings of tensors.

    Raises:
        DataError: there is something else in it.
    """
    if isinstance(inputs, Tensor):
        return inputs[rows.to(inputs.device)]
    if isinstance(inputs, Mapping):
        return {name: rows_of(part, rows) for name, part in inputs.items()}
    if isinstance(inputs, list | tuple):
        return type(inputs)(rows_of(part, rows) for part in inputs)
    raise DataError(
        f"batches: expected inputs that are tensors, found {type(inputs).__name__}; turn rows into tensors"
    )


class Asked:
    """Asks every row twice.

    Attributes:
        kept: rows to ask at the end, with the answers that they had.
    """

    def __init__(self, ask: Callable[[Any], Tensor], where: str) -> None:
        """
        Args:
            ask: a batch → logits, a row for every row.
            where: whose answers they are, for messages.
        """
        self.ask, self.where = ask, where
        self.kept: list[tuple[Any, Tensor]] = []

    def twice(self, inputs: Any, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The answers to a batch as it is, and to its halves in reverse order, in the order of the batch.

        Args:
            labels: as many as there are rows.

        Raises:
            SourceError: a row has two answers.
            DataError: the batch is of no tensors.
        """
        first, n = self.ask(inputs), len(labels)
        if not n or first.ndim < 2 or len(first) != n:  # which is refused when errors are counted
            return first, first
        order = torch.arange(n - 1, -1, -1)
        parts = [self._again(rows_of(inputs, part)) for part in order.split(-(-n // 2))]
        second = torch.cat(parts).flip(0)
        if not are_close(first, second):
            self._refuse(inputs, first, second)
        if len(self.kept) < _ASKED_AT_THE_END:
            self.kept.append((rows_of(inputs, torch.tensor([0])), first[:1]))
        return first, second

    def finish(self) -> None:
        """Ask some rows a last time.

        Raises:
            SourceError: a row has another answer than it had.
        """
        for inputs, before in self.kept:
            if not are_close(before, now := self._again(inputs)):
                raise self._changing(before, now)

    def _again(self, inputs: Any) -> Tensor:
        try:
            return self.ask(inputs)
        except (RuntimeError, ValueError, IndexError) as error:
            raise SourceError(
                f"{self.where}: expected the answers to some rows of a batch by themselves, found "
                f"{str(error).partition(chr(10))[0]}; certify a model whose rows do not need each other"
            ) from error

    def _refuse(self, inputs: Any, first: Tensor, second: Tensor) -> None:
        again = self.ask(inputs)
        if not are_close(first, again):
            raise self._changing(first, again)
        row = int((~_closeness(first, second)).nonzero()[0])
        raise SourceError(
            f"{self.where}: expected answers that do not depend on the other rows of a batch, found "
            f"{_shown(first[row])} for row {row} of a batch of {len(first)} and {_shown(second[row])} for it "
            "in half of the batch; take out what normalizes by the batch or looks at other rows, or give "
            "batches of one row"
        )

    def _changing(self, before: Tensor, now: Tensor) -> SourceError:
        row = int((~_closeness(before, now)).nonzero()[0])
        return SourceError(
            f"{self.where}: expected the same answers whenever the same rows are asked, found "
            f"{_shown(before[row])} and then {_shown(now[row])}; switch dropout and noise off in evaluation, "
            "and keep no counter or cache"
        )


def are_close(first: Tensor, second: Tensor) -> bool:
    """Whether two answers to the same rows, `[rows, …]`, are the same but for rounding."""
    return first.shape == second.shape and bool(_closeness(first, second).all())


def _closeness(first: Tensor, second: Tensor) -> Tensor:
    """Which rows have the same answer but for rounding, `[rows]`."""
    a, b = first.flatten(1).double(), second.flatten(1).double()
    share = _TOLERANCES.get(first.device.type, _OTHER_TOLERANCE)
    share = max(share, _ROUNDINGS * torch.finfo(first.dtype).eps)
    scale = torch.where(a.isfinite(), a.abs(), 0).amax(1, keepdim=True)
    is_near = (a - b).abs() <= share * scale
    return (is_near | (a == b) | (a.isnan() & b.isnan())).all(1)


def _shown(logits: Tensor) -> str:
    return str([float(f"{x:.4g}") for x in logits.flatten()[:4].tolist()])


class Seen:
    """Rows that were there before, input and label, as 64-bit digests."""

    def __init__(self) -> None:
        self.digests: set[bytes] = set()

    def repeated(self, inputs: Any, labels: Tensor) -> Tensor:
        """Which rows of a batch are equal to an earlier one, bool `[rows]`."""
        found = []
        for row, label in enumerate(labels.tolist()):
            digest = hashlib.blake2b(str(label).encode(), digest_size=8)
            _add(digest, rows_of(inputs, torch.tensor([row])))
            found.append(digest.digest() in self.digests)
            self.digests.add(digest.digest())
        return torch.tensor(found, dtype=torch.bool)


def _add(digest: Any, row: Any) -> None:
    if isinstance(row, Tensor):
        digest.update(f"{row.dtype}{tuple(row.shape)}".encode())
        digest.update(row.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    else:
        for part in row.values() if isinstance(row, Mapping) else row:
            _add(digest, part)
