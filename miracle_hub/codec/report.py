"""What a compression says of itself."""

from collections.abc import Mapping
from dataclasses import dataclass, field

# Of what a calibration says while it runs, which the command line shows.
CALIBRATION_LOGGER = "miracle_hub.codec.report"
_NAMED = 20  # files of one reason: a clone has hundreds of hidden ones


@dataclass(frozen=True)
class Calibration:
    """What a compression knew of its model, and how far the file's answers are from the dense model's.

    Divergences are means over held-out rows: nothing was fitted to them, but they decide what is accepted.

    Attributes:
        said: what the model was run on, and how much of it.
        n_tokens: that it was calibrated on.
        steps: what was done, and the divergence after it, in order.
        unit: of all divergences.
        divergence: of the file as it is written: the loss to expect.
        data_free: of a file of the same size without calibration; None where that was not made.
        data_free_window: the bits of its windows where they are narrower than the file's, which is faster; 0
            where they are the file's.
        is_taken_back: the file is that one, because calibration made none that is closer.
    """

    said: str
    n_tokens: int
    effort: int
    steps: tuple[tuple[str, float], ...]
    unit: str
    divergence: float
    data_free: float | None = None
    data_free_window: int = 0
    is_taken_back: bool = False

    def lines(self) -> list[str]:
        """For people."""
        without = "not measured" if self.data_free is None else f"{self.data_free:.4f}"
        without += f" with windows of {self.data_free_window} bits" if self.data_free_window else ""
        found = [
            f"calibrated with effort {self.effort} on {self.said}",
            f"expected loss ({self.unit}): {self.divergence:.4f}; without calibration: {without}",
        ]
        if self.steps:
            found.append("after each step: " + ", ".join(f"{what} {value:.4f}" for what, value in self.steps))
        if self.is_taken_back:
            found.append(
                "taken back: this file is without calibration, and was closer than the calibrated one"
            )
        return found


@dataclass(frozen=True)
class Report:
    """What a compression did.

    Attributes:
        dense_bytes, compressed_bytes: of all safetensors files before and after.
        bits_per_weight: of whole files.
        digest: of the payloads.
        backend: as chosen.
        plain: tensors that are stored plainly, and why.
        budget_bytes: that were asked for; None where a rate was.
        left_out: files of the source that the output has not, and why.
        carried: files that are copied as they are though they hold, or may hold, weights; and how large.
        notes: what else to know of the output.
        exact: tensors that are no weights and keep every bit in fewer bytes, and why.
        kept_bytes: of plain and exact tensors together.
        judged_by: what says which tensors are weights: the model's class, or values alone and why.
        calibration: what the model was run on and what came of it; None if it was not run.
        uncalibrated: why it was not, though that was asked for.
        base: the model to which differences are stored; empty if there is none.
        n_same: tensors that are the base's, bit for bit; `n_differing` those that differ from it.
        differences_left_out: names of those of which nothing is stored, as that was not worth its bytes.
        lossless: every bit of every tensor is kept, since that was asked for.
    """

    dense_bytes: int = 0
    compressed_bytes: int = 0
    n_weights: int = 0
    bits_per_weight: float = 0.0
    seconds: float = 0.0
    digest: str = ""
    backend: str = ""
    plain: Mapping[str, str] = field(default_factory=dict)
    budget_bytes: int | None = None
    left_out: Mapping[str, str] = field(default_factory=dict)
    carried: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    exact: Mapping[str, str] = field(default_factory=dict)
    kept_bytes: int = 0
    judged_by: str = ""
    calibration: Calibration | None = None
    uncalibrated: str = ""
    base: str = ""
    n_same: int = 0
    n_differing: int = 0
    differences_left_out: tuple[str, ...] = ()
    lossless: bool = False

    @property
    def kept_share(self) -> float:
        """Of the compressed bytes: those of plain and exact tensors."""
        return self.kept_bytes / self.compressed_bytes

    @property
    def calibration_lines(self) -> tuple[str, ...]:
        """What calibration found, or why there was none, for people; empty if none was asked for."""
        if self.calibration is not None:
            return tuple(self.calibration.lines())
        return (f"not calibrated: {self.uncalibrated}",) if self.uncalibrated else ()


def told_by_reason(reasons: Mapping[str, str]) -> list[str]:
    """Files by what is said of them, for people: "reason: these files"."""
    files: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        files.setdefault(reason, []).append(name)
    return [f"{reason}: {_some(names)}" for reason, names in files.items()]


def _some(names: list[str]) -> str:
    more = len(names) - _NAMED
    return ", ".join(names) if more <= 0 else f"{', '.join(names[:_NAMED])} and {more} more"
