"""How long a calibrated compression takes and how much memory, as it is said before the work begins."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from miracle_hub.calibrate.recipe import refit_options
from miracle_hub.codec.source import SourceTensor
from miracle_hub.coding.matrix import matrix_columns
from miracle_hub.errors import CalibrationError

# Seconds per weight of two cores: once through the encoder, with feedback; a step of 1,024 tokens, there and
# back, at the speed that `recipe` counts with; and one look at all inputs before.
_CODING = 3e-6
_STEP = 8 * 1024 / 1e11
_LOOK = 16 * _STEP
# The file without calibration is made too, beside all but the largest models, whose time it would double.
MOST_COMPARED = 300_000_000
# Copies of all weights in float32: the model, its gradients, two moments of Adam, and what tuning may undo.
_COPIES, _COPIES_OF_REFITS = 2, 7


@dataclass(frozen=True)
class Estimate:
    """About how much of what."""

    minutes: float
    n_bytes: int

    def __str__(self) -> str:
        minutes = f"{self.minutes:.0f} minutes" if self.minutes >= 1.5 else "a minute"
        return f"about {minutes} of two cores and {self.n_bytes / 1e9:.1f} GB of memory"


def estimated(tensors: Sequence[SourceTensor], effort: int) -> Estimate:
    """Of a model with these tensors."""
    n_weights = sum(tensor.n_weights for tensor in tensors)
    steps = refit_options(effort, n_weights, n_weights).all_steps
    passes = 2 if steps and n_weights <= MOST_COMPARED else 1
    seconds = n_weights * (passes * _CODING + _LOOK + steps * _STEP)
    columns = [matrix_columns(tensor.shape) for tensor in tensors if len(tensor.shape) > 1]
    copies = _COPIES_OF_REFITS if steps else _COPIES
    return Estimate(seconds / 60, 4 * (copies * n_weights + sum(n * n for n in columns)))


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
