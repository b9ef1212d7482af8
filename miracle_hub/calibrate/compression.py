"""Compression that knows the model, and is never worse for it on rows that were held out."""

import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import nn

from miracle_hub.calibrate.asking import Asking
from miracle_hub.calibrate.estimate import COMPARED_QUICKLY, MOST_COMPARED
from miracle_hub.codec.report import Calibration, Report
from miracle_hub.codec.work import work_folder
from miracle_hub.options import CompressOptions

_NAMED = 5
# Of larger models narrow windows tell enough where the file with them is so many times as far: a choice.
# SmolLM2 at 3 bits, with windows of 12, diverges by 0.19 with calibration, by 1.42 without.
_QUICK_WINDOW, _CLEARLY = 8, 2.0


# What `codec.compress.compress_folder` does with an output and options, and whatever else it takes by name.
Compress: TypeAlias = Callable[..., Report]


class _TakenBack(Exception):
    """The file without calibration is closer to the dense model than the one with it."""

    def __init__(self, found: Calibration) -> None:
        self.found = found


def compress_calibrated(
    compress: Compress,
    source: Path,
    out: Path,
    options: CompressOptions,
    *,
    model: nn.Module | None = None,
    base: Path | None = None,
    **also: Any,
) -> Report:
    """Compress a folder with what its model's answers say of its weights.

    Args:
        compress: compresses the folder, without calibration unless it is given what is known.
        source: the folder.
        model: the folder's, where transformers cannot tell.
        base: a folder with the model to which differences are stored, if there is one.
        also: others of `compress_folder`, for the output.

    Raises:
        CalibrationError: the model cannot be run on the data that were given.
        DataError: the data cannot be read, are none that the model takes, or too few.
        ResumeError: the work folder is of a run with another source, other data or options.
    """
    with torch.inference_mode(False), work_folder(source, out, options, model) as kept:
        asking = Asking(source, options, model, kept, base)
        try:
            return compress(out, options, knowledge=asking, judged=_Judged(asking, compress), **also)
        except _TakenBack as taken:
            found = taken.found
        told: Callable[[Path, Report], Report] = lambda _, report: replace(report, calibration=found)  # noqa: E731
        return compress(out, options, judged=told, **also)


@dataclass
class _Judged:
    """Measures what is written, beside what would be without calibration."""

    asking: Asking
    compress: Compress

    def __call__(self, folder: Path, report: Report) -> Report:
        """
        Raises:
            _TakenBack: the file without calibration is closer to the dense model.
        """
        asking = self.asking
        if asking.why:
            note = f"not calibrated: {asking.why}"
            return replace(report, uncalibrated=asking.why, notes=(*report.notes, note))
        if asking.known is None or asking.judge is None:
            why = "there is nothing to code"
            return replace(report, uncalibrated=why, notes=(*report.notes, f"not calibrated: {why}"))
        known, judge = asking.known, asking.judge
        found = Calibration(
            known.inputs.said, known.inputs.n_tokens, asking.options.effort, tuple(known.losses), judge.unit,
            judge.divergence(folder),
        )  # fmt: skip
        if known.options.is_any and report.n_weights <= MOST_COMPARED:
            found = self._compared(found, report.n_weights)
            if found.data_free is not None and found.data_free < found.divergence:
                raise _TakenBack(replace(found, divergence=found.data_free, is_taken_back=True))
        return replace(report, calibration=found, notes=(*report.notes, *_notes(asking)))

    def _compared(self, found: Calibration, n_weights: int) -> Calibration:
        """With a file without calibration beside it; of a large model, if it may be, with narrow windows."""
        options = self.asking.options
        if n_weights > COMPARED_QUICKLY and options.window_bits > _QUICK_WINDOW:
            quick = self._without(replace(options, window_bits=_QUICK_WINDOW))
            if quick > _CLEARLY * found.divergence:
                return replace(found, data_free=quick, data_free_window=_QUICK_WINDOW)
        return replace(found, data_free=self._without(options))

    def _without(self, options: CompressOptions) -> float:
        """The divergence of a file without calibration."""
        assert self.asking.judge is not None
        with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they come with the file that is kept
            folder = Path(scratch) / "without"
            self.compress(folder, options)
            return self.asking.judge.divergence(folder)


def _notes(asking: Asking) -> tuple[str, ...]:
    """What to know of refits that failed, and of tensors that cost nothing."""
    found = [f"not refitted: {asking.undone}"] if asking.undone else []
    if asking.known is not None and asking.known.options.is_any and not asking.known.states_tuned:
        found.append("norms and biases are not tuned: without a config.json nothing says so to readers")
    if asking.known is not None and asking.known.lacks_blocks:
        found.append("tuned, not refitted: this effort has time for blocks alone, and the model has none")
    if names := sorted(asking.unseen):
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        said = f"{', '.join(names[:_NAMED])}{more}"
        found.append(f"no answer of the model depends on these, which get bits as others do: {said}")
    return tuple(found)
