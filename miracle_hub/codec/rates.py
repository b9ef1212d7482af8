"""Rate control: a ladder of codes, measured rate–error curves, and the least error for a budget.

The error that is minimized is Σ size^0.6 · (relative squared error) over tensors. HIGGS
(Malinovskii et al. 2024, arXiv:2411.17525) shows that the loss of a network is to first order
linear in the relative errors of its layers; without data the coefficients are unknown, and a small
layer's matters nearly as much as a large one's. The exponent was chosen on STS-B dev
(benchmarks/minilm.py --split dev --size-exponent): Spearman at 1.1, 1.6, 2.1, 3.05 bits/weight is
79.3, 85.3, 86.3, 86.7 at exponent 0.6 and 78.1, 85.7, 86.4, 86.8 at 0.5; at 0 and 1 it is up to 7 lower.
"""

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from miracle_hub.code import Code
from miracle_hub.codec.tensor import SegmentPlan, prior_scale, rotated_matrix
from miracle_hub.coding.backend import Backend
from miracle_hub.coding.matrix import ROW_SCALE_COLUMNS
from miracle_hub.coding.posterior import squared_error_cost

# (k, V) of every rate from 0.25 to 8 bits per weight.
LADDER = (
    (1, 4), (2, 4), (3, 4), (2, 2), (5, 4), (3, 2), (7, 4), (2, 1),
    (5, 2), (3, 1), (7, 2), (4, 1), (5, 1), (6, 1), (7, 1), (8, 1),
)  # fmt: skip
SIZE_EXPONENT = 0.6
# Curves are measured with windows of at most 12 bits, which take a sixteenth of the time of 16: up to
# 4 bits per weight those lower the error by 1 to 14 %, above by more (benchmarks/rate_distortion.py).
_MEASURED_WINDOW_BITS = 12
_SAMPLE_WEIGHTS = 8192
_TOTAL_SAMPLE_WEIGHTS = 1 << 22
_SCALE_BYTES = 2


@dataclass(frozen=True)
class Option:
    """One way to code a whole tensor: its bytes (without header) and its weighted error."""

    code: Code
    row_scales: bool
    n_bytes: int
    error: float


@dataclass
class Sample:
    """Rows of a tensor's rotated matrix from which its curve is measured."""

    name: str
    rows: int
    columns: int
    values: Tensor
    rms: float
    options: list[Option] = field(default_factory=list)


def ladder(window_bits: int, seed: int) -> list[Code]:
    """The codes of all rates; a window is never shorter than its step."""
    return [Code(max(window_bits, k), k, weights, seed) for k, weights in LADDER]


def sample_rows(
    name: str, weights: Tensor, columns: int, rotation: int, n_tensors: int, backend: Backend
) -> Sample:
    """Evenly spaced rows (or the start of one very long row) of a tensor."""
    budget = min(_SAMPLE_WEIGHTS, max(512, _TOTAL_SAMPLE_WEIGHTS // n_tensors))
    matrix = weights.reshape(-1, columns)
    n_rows = max(1, min(matrix.shape[0], budget // columns))
    width = min(columns, max(rotation, budget // rotation * rotation))
    picked = torch.linspace(0, matrix.shape[0] - 1, n_rows).long()
    values = rotated_matrix(matrix[picked, :width], width, rotation, backend)
    rms = float(weights.float().square().mean().sqrt())
    return Sample(name, matrix.shape[0], columns, values, rms)


def measure_options(samples: list[Sample], window_bits: int, seed: int, backend: Backend) -> None:
    """Fill in every sample's options: encode all samples in one stream per rate and kind of scale."""
    measured = ladder(min(window_bits, _MEASURED_WINDOW_BITS), seed)
    for code, measured_code in zip(ladder(window_bits, seed), measured, strict=True):
        for row_scales in (False, True):
            eligible = [s for s in samples if row_scales or s.columns < ROW_SCALE_COLUMNS]
            errors = _relative_errors(eligible, measured_code, row_scales, backend) if eligible else []
            for sample, relative in zip(eligible, errors, strict=True):
                n_weights = sample.rows * sample.columns
                scales = _SCALE_BYTES * (sample.rows if row_scales else 1)
                n_bytes = code.message_bytes(n_weights) + scales
                error = relative * n_weights**SIZE_EXPONENT
                sample.options.append(Option(code, row_scales, n_bytes, error))


def _relative_errors(samples: list[Sample], code: Code, row_scales: bool, backend: Backend) -> list[float]:
    """Relative squared error of each sample after coding."""
    parts = []
    for sample in samples:
        rms = sample.values.square().mean(1, keepdim=True).sqrt() if row_scales else sample.rms
        scale = torch.as_tensor(rms * prior_scale(code)).clamp(min=1e-30)
        parts.append((sample.values / scale).flatten())
    message = backend.encode_stream(squared_error_cost(torch.cat(parts)), code, "best", None)
    decoded = backend.decode_stream(message, code, sum(part.numel() for part in parts))
    split = decoded.split([part.numel() for part in parts])
    return [
        _squared_error(sample.values, z.view(sample.values.shape), row_scales)
        for sample, z in zip(samples, split, strict=True)
    ]


def _squared_error(values: Tensor, z: Tensor, row_scales: bool) -> float:
    """‖values - scale · z‖² / ‖values‖² with least-squares scales."""
    product, power = values * z, z * z
    if row_scales:
        explained = product.sum(1).clamp(min=0).square() / power.sum(1).clamp(min=1e-30)
    else:
        explained = product.sum().clamp(min=0).square() / power.sum().clamp(min=1e-30)
    total = float(values.square().sum())
    return 1 - float(explained.sum()) / total if total else 0.0


def lower_hull(options: list[Option]) -> list[Option]:
    """The options that no mixture of two others beats, by rising bytes and falling error."""
    hull: list[Option] = []
    for option in sorted(options, key=lambda o: (o.n_bytes, o.error)):
        if hull and option.error >= hull[-1].error:
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) <= _slope(hull[-2], option):
            hull.pop()
        hull.append(option)
    return hull


def _slope(cheap: Option, dear: Option) -> float:
    """Error saved per byte; equal sizes count as infinitely steep."""
    extra = dear.n_bytes - cheap.n_bytes
    return (cheap.error - dear.error) / extra if extra else math.inf


@dataclass
class Choice:
    """What a tensor gets: one option, or two with a boundary between rows."""

    rows: int
    option: Option
    upgrade: Option | None = None
    upgraded_rows: int = 0

    def segments(self) -> list[SegmentPlan]:
        parts = [(self.upgraded_rows, self.upgrade), (self.rows - self.upgraded_rows, self.option)]
        return [SegmentPlan(n, o.code, o.row_scales) for n, o in parts if o and n]

    @property
    def n_bytes(self) -> int:
        """Bytes by linear interpolation; the exact figure is the header's business."""
        extra = self.upgrade.n_bytes - self.option.n_bytes if self.upgrade else 0
        return self.option.n_bytes + math.ceil(extra * self.upgraded_rows / self.rows)


def allocate(samples: list[Sample], payload_bytes: int) -> dict[str, Choice]:
    """The choice per tensor that minimizes the total error within `payload_bytes`.

    Walks down the lower hulls of all tensors together, steepest step first; a step that does not
    fit is taken for as many rows as fit.
    """
    hulls = {sample.name: lower_hull(sample.options) for sample in samples}
    choices = {s.name: Choice(s.rows, hulls[s.name][0]) for s in samples}
    left = payload_bytes - sum(choice.n_bytes for choice in choices.values())
    steps = [
        (-_slope(cheap, dear), i, name, dear)
        for name, hull in hulls.items()
        for i, (cheap, dear) in enumerate(zip(hull, hull[1:], strict=False))
    ]
    for _, _, name, dear in sorted(steps, key=lambda step: step[:3]):
        choice = choices[name]
        if choice.upgrade is not None:
            continue
        extra = dear.n_bytes - choice.option.n_bytes
        if extra <= left:
            choice.option = dear
            left -= extra
        elif (rows := max(0, left) * choice.rows // extra) > 0:
            choice.upgrade, choice.upgraded_rows = dear, rows
            left -= math.ceil(extra * rows / choice.rows)
        else:
            choice.upgrade = choice.option
    return choices


def extreme_choices(samples: list[Sample], most: bool) -> dict[str, Choice]:
    """The largest or the smallest files that the ladder allows."""
    pick = max if most else min
    return {s.name: Choice(s.rows, pick(lower_hull(s.options), key=lambda o: o.n_bytes)) for s in samples}


def weighted_error(choices: dict[str, Choice]) -> float:
    """Total error of a set of choices, by interpolation."""
    total = []
    for choice in choices.values():
        share = choice.upgraded_rows / choice.rows
        upgraded = choice.upgrade.error if choice.upgrade else 0.0
        total.append(choice.option.error * (1 - share) + upgraded * share)
    return float(np.sum(total))
