"""Refits that go on where a killed run was: after a group that was coded, or its refit, or all tuning."""

import logging
from collections.abc import Sequence
from typing import Protocol

from torch import Tensor, nn

from miracle_hub.calibrate.matrix import MatrixInMaking
from miracle_hub.codec.kept import Kept
from miracle_hub.codec.report import CALIBRATION_LOGGER

_LOGGER = logging.getLogger(CALIBRATION_LOGGER)
_STEP, _STEPS_OF_PHASE = "refits", "steps"


class InMaking(Protocol):
    """What of refits changes as they go.

    Attributes:
        losses: what was done, and the divergence after it.
    """

    kept: Kept
    matrices: Sequence[MatrixInMaking]
    vectors: Sequence[nn.Parameter]
    losses: list[tuple[str, float]]


def keep(refits: InMaking, done: int) -> None:
    """Keep all that refits have made so far.

    Args:
        done: how many of their phases.

    Raises:
        OutputWriteError: it cannot be written; what was there before still is.
    """
    tensors: dict[str, Tensor] = {f"vector.{i}": vector for i, vector in enumerate(refits.vectors)}
    for i, matrix in enumerate(refits.matrices):
        tensors |= {f"matrix.{i}.{name}": values for name, values in matrix.tensors().items()}
    refits.kept.save(_STEP, tensors, done=done, losses=refits.losses)
    refits.kept.drop(_STEPS_OF_PHASE)


def steps_of(phase: int) -> str:
    """The name under which steps of a phase are kept; they go when it is done."""
    return f"{_STEPS_OF_PHASE}-{phase}"


def go_on(refits: InMaking) -> int:
    """Be where a killed run was; returns how many phases it had done, 0 for none."""
    if (found := refits.kept.load(_STEP)) is None:
        return 0
    for i, vector in enumerate(refits.vectors):
        vector.data.copy_(found.tensors[f"vector.{i}"])
    for i, matrix in enumerate(refits.matrices):
        start = f"matrix.{i}."
        own = {n.removeprefix(start): t for n, t in found.tensors.items() if n.startswith(start)}
        matrix.go_on(own)
    refits.losses[:] = [(what, value) for what, value in found.facts["losses"]]
    _LOGGER.info("goes on after: %s, %.4f on held-out rows", *refits.losses[-1])
    return found.facts["done"]
