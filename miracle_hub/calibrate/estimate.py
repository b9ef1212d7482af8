"""How long a calibrated compression takes and how much memory, as it is said before the work begins."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from miracle_hub.calibrate.modality import Modality
from miracle_hub.calibrate.recipe import (
    EFFORTS,
    SPEED,
    STEP_TOKENS,
    WORK,
    RefitOptions,
    refit_options,
    steps_of,
    tokens_for,
)
from miracle_hub.codec.source import SourceTensor
from miracle_hub.codec.worth import head_of, is_convolutional, tables_in
from miracle_hub.coding.matrix import matrix_columns
from miracle_hub.errors import CalibrationError

# Seconds per weight of two cores: once through the encoder, with windows of 14 bits and feedback, as SmolLM2
# at effort 0 took beside its looks; and with narrow windows, of the file beside it.
_CODING, _CODING_QUICKLY = 1.2e-6, 0.3e-6
# Seconds per matrix of a step of small models, whatever their size: 960 steps take stories260K and ResNet-44
# 0.19 seconds each, ResNet-20 0.07.
_OF_A_MATRIX = 4e-3
# Seconds per weight and token that a causal language model writes: SmolLM2's took 3 to 4 milliseconds
# in bfloat16.
_WRITING, _WRITERS = 2.5e-11, ("CausalLM", "LMHeadModel")
# In steps: trials of feedback on a dozen kinds of matrices.
_TRIALS = 12
# The file without calibration is made too, beside all but the largest models, whose time it would double.
MOST_COMPARED = 300_000_000
# Of larger models than this with narrow windows, which are fast, as far as they tell enough: a choice.
COMPARED_QUICKLY = 30_000_000
# Copies of all weights in float32: the model, and what is decoded of it; with refits of the whole model its
# gradients, two moments of Adam, and what may be undone.
_COPIES, _COPIES_OF_REFITS = 2, 6
# Copies of the answers to one batch there and back, in float32, and bytes of what runs all this. Looks take
# half a batch at a time. SmolLM2 at 3 bits took at most 3.8 GB with effort 0 and 4.8 with effort 1
# (benchmarks/calibration_memory.py).
_COPIES_OF_ANSWERS, _PROGRAM = 6, 8e8
_TOKENS_OF_A_LOOK = STEP_TOKENS // 2


@dataclass(frozen=True)
class Estimate:
    """About how much of what."""

    minutes: float
    n_bytes: int

    def __str__(self) -> str:
        minutes = f"{self.minutes:.0f} minutes" if self.minutes >= 1.5 else "a minute"
        return f"about {minutes} of two cores and {self.n_bytes / 1e9:.1f} GB of memory"


def estimated(
    tensors: Sequence[SourceTensor], effort: int, config: Mapping[str, Any], is_self: bool = False
) -> Estimate:
    """Of a model with these tensors and this config.json.

    Args:
        is_self: its inputs are of its own making.
    """
    n_weights = sum(tensor.n_weights for tensor in tensors)
    tables, head = tables_in(tensors, config), head_of(tensors, config)
    looked_up = sum(tensor.n_weights for tensor in tensors if tensor.name in tables and tensor.name != head)
    given = (effort, n_weights, n_weights - looked_up, is_convolutional(tensors))
    steps, options = steps_of(*given), refit_options(*given)
    all_steps = EFFORTS[effort].looks + (steps + _TRIALS if steps else 0)
    coding = _CODING + (_compared(n_weights) if steps else 0)
    matrices = [tensor for tensor in tensors if len(tensor.shape) > 1 and tensor.name not in tables]
    of_a_step = max(WORK * STEP_TOKENS * (n_weights - looked_up) / SPEED, _OF_A_MATRIX * len(matrices))
    seconds = n_weights * coding + all_steps * of_a_step
    if is_self and any(name in str(config.get("architectures")) for name in _WRITERS):
        looked = EFFORTS[effort].looks * STEP_TOKENS
        written = tokens_for(Modality.CAUSAL, options.n_batches, looked, True)
        seconds += n_weights * written * _WRITING
    classes = 0 if head is None else max(t.shape[0] for t in tensors if t.name == head)
    return Estimate(seconds / 60, _bytes(n_weights, matrices, classes, options))


def _bytes(n_weights: int, matrices: Sequence[SourceTensor], classes: int, options: RefitOptions) -> int:
    """
    Args:
        matrices: that all tokens are multiplied by.
        classes: of an answer to a token; 0 where there is no head.
    """
    copies = _COPIES_OF_REFITS if options.steps else _COPIES
    columns = [matrix_columns(tensor.shape) for tensor in matrices]
    between_layers = sum(n + t.n_weights // n for t, n in zip(matrices, columns, strict=True))
    of_a_token = between_layers + _COPIES_OF_ANSWERS * classes
    n_tokens = STEP_TOKENS if options.is_any else _TOKENS_OF_A_LOOK
    return 4 * (copies * n_weights + sum(n * n for n in columns) + n_tokens * of_a_token) + int(_PROGRAM)


def _compared(n_weights: int) -> float:
    """Seconds per weight that the file without calibration takes."""
    if n_weights > MOST_COMPARED:
        return 0.0
    return _CODING_QUICKLY if n_weights > COMPARED_QUICKLY else _CODING


def require_memory(estimate: Estimate) -> None:
    """
    Raises:
        CalibrationError: there is less memory than that.
    """
    free = _free_bytes()
    if free is not None and estimate.n_bytes > free:
        raise CalibrationError(
            f"expected {estimate.n_bytes / 1e9:.1f} GB of memory to run the model and refit it, found "
            f"{free / 1e9:.1f} GB; use a larger machine, less --effort, or compress without calibration "
            "(--calibrate none)"
        )


def _free_bytes() -> int | None:
    """That the system could hand out; None where it does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return int(found[0]) * 1024 if found else None
