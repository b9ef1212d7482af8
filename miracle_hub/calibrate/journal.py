"""What was done to a model, and how far it was from the dense one on held-out rows after it."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import nn

from miracle_hub.calibrate.teacher import Teacher
from miracle_hub.codec.report import CALIBRATION_LOGGER

_LOGGER = logging.getLogger(CALIBRATION_LOGGER)


@dataclass
class Journal:
    """Of one making.

    Attributes:
        losses: what was done, and the divergence on held-out rows after it.
    """

    model: nn.Module
    held_out: Teacher
    losses: list[tuple[str, float]] = field(default_factory=list)

    def report(self, what: str) -> None:
        """Say how far the model is after what was done."""
        self.losses.append((what, self.held_out.mean_divergence(self.model)))
        _LOGGER.info("%s: %.4f on held-out rows", *self.losses[-1])

    def report_or_undo(self, what: str, undo: Callable[[], None]) -> None:
        """The same; what does not help on held-out rows is undone."""
        at_start = self.losses[-1][1]
        self.report(what)
        if self.losses[-1][1] >= at_start:
            undo()
            self.losses[-1] = (f"{what}: undone", at_start)
            _LOGGER.info("%s: %.4f again", *self.losses[-1])
