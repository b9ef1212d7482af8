"""Refits that go on where a killed run was: after a group or its refit, a block, or all tuning."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from miracle_hub.calibrate.matrix import MatrixInMaking
from miracle_hub.calibrate.tuning import Tuning
from miracle_hub.codec.kept import Kept
from miracle_hub.codec.report import CALIBRATION_LOGGER

_LOGGER = logging.getLogger(CALIBRATION_LOGGER)
_STEPS_OF_PHASE = "steps"


@dataclass
class KeptMaking:
    """What of matrices and vectors in the making is kept, under the name of a step.

    Attributes:
        losses: what was done to the whole model, and the divergence after it.
    """

    kept: Kept
    step: str
    matrices: Sequence[MatrixInMaking]
    vectors: Sequence[Tensor]
    losses: list[tuple[str, float]]

    def keep(self, done: int) -> None:
        """Keep all that was made so far.

        Args:
            done: how many phases.

        Raises:
            OutputWriteError: it cannot be written; what was there before still is.
        """
        tensors = _of_vectors(self.vectors)
        for i, matrix in enumerate(self.matrices):
            tensors |= {f"matrix.{i}.{name}": values for name, values in matrix.tensors().items()}
        self._save(tensors, done)

    def go_on(self) -> int:
        """Be where a killed run was; returns how many phases it had done, 0 for none."""
        if (found := self.kept.load(self.step)) is None:
            return 0
        for i, matrix in enumerate(self.matrices):
            start = f"matrix.{i}."
            own = {n.removeprefix(start): t for n, t in found.tensors.items() if n.startswith(start)}
            matrix.go_on(own)
        return self._be(found.tensors, found.facts)

    def keep_tuned(self) -> None:
        """Keep what tuning made.

        Raises:
            OutputWriteError: it cannot be written; what was there before still is.
        """
        gains = {f"gains.{i}": matrix.gains for i, matrix in enumerate(self.matrices)}
        self._save(_of_vectors(self.vectors) | gains, 1)

    def go_on_tuned(self) -> bool:
        """Be where tuning had ended; whether it had."""
        if (found := self.kept.load(self.step)) is None:
            return False
        Tuning.set_gains(
            self.matrices, [found.tensors[f"gains.{i}"].to(m.gains) for i, m in enumerate(self.matrices)]
        )
        self._be(found.tensors, found.facts)
        return True

    def _save(self, tensors: dict[str, Tensor], done: int) -> None:
        self.kept.save(self.step, tensors, done=done, losses=self.losses)
        self.kept.drop(_STEPS_OF_PHASE)

    def _be(self, tensors: dict[str, Tensor], facts: dict) -> int:
        for i, vector in enumerate(self.vectors):
            vector.data.copy_(tensors[f"vector.{i}"])
        self.losses[:] = [(what, value) for what, value in facts["losses"]]
        if self.losses:
            _LOGGER.info("goes on after: %s, %.4f on held-out rows", *self.losses[-1])
        return facts["done"]


def steps_of(phase: int) -> str:
    """The name under which steps of a phase are kept; they go when it is done."""
    return f"{_STEPS_OF_PHASE}-{phase}"


def _of_vectors(vectors: Sequence[Tensor]) -> dict[str, Tensor]:
    return {f"vector.{i}": vector for i, vector in enumerate(vectors)}
