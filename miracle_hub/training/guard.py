"""Steps that leave no trace where a loss is not finite."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain

import torch
from torch import Tensor, nn

from miracle_hub.errors import TrainingError
from miracle_hub.training.model import variational_of


class Snapshot:
    """Buffers of a model, as batch norms have them, and the number of its draw, to go back to."""

    def __init__(self, model: nn.Module) -> None:
        self.variational = variational_of(model)
        own = {id(tensor) for tensor in self.variational.tensors()}
        self.buffers = [(b, b.clone()) for b in model.buffers() if id(b) not in own]
        self.draw_number = self.variational.draw_number

    @torch.no_grad()
    def restore(self) -> None:
        """Give the model back what it had."""
        for buffer, before in self.buffers:
            buffer.copy_(before)
        self.variational.draw_number = self.draw_number
        self.variational.forget()


@contextmanager
def undone_if_not_finite(model: nn.Module) -> Iterator[None]:
    """Give buffers back what they had if a loss is not finite: batch norms average bad batches too."""
    before = Snapshot(model)
    try:
        yield
    except TrainingError:
        before.restore()
        raise


def check_finite(value: Tensor, where: str, what: str = "loss") -> None:
    """Raise unless a loss is finite.

    Raises:
        TrainingError: it is NaN or infinite.
    """
    if not math.isfinite(found := float(value.detach())):
        raise TrainingError(
            f"{where}: expected a finite {what}, found {found}; the model is as it was after the step "
            "before: lower the learning rate, or look at the batch"
        )


def check_model(model: nn.Module) -> None:
    """Raise unless everything that a file would hold is finite, so that none holds what training has lost.

    Raises:
        TrainingError: a posterior or a weight is NaN or infinite, or a buffer NaN (a mask may be infinite).
    """
    buffers = dict(model.named_buffers())
    for name, tensor in chain(model.named_parameters(), buffers.items()):
        if not tensor.is_floating_point() or tensor.dtype.itemsize < 2:  # whose NaN torch cannot ask for
            continue
        bad = tensor.isnan() if name in buffers else ~torch.isfinite(tensor)
        if n_bad := int(bad.sum()):
            raise TrainingError(
                f"{name}: expected finite weights to code, found {n_bad} of {tensor.numel()} that are NaN or "
                "infinite; nothing is written: train again from sound weights, at a lower learning rate"
            )
