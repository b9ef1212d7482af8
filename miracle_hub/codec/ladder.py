"""The trellis's options for a tensor: a ladder of codes, and what each costs in error, measured on some rows.

The error that is minimized is Σ size^0.6 · (relative squared error) over tensors. HIGGS
(Malinovskii et al. 2024, arXiv:2411.17525) shows that the loss of a network is to first order
linear in the relative errors of its layers; without data the coefficients are unknown, and a small
layer's matters nearly as much as a large one's. The exponent was chosen on STS-B dev
(benchmarks/minilm.py --split dev --size-exponent): Spearman at 1.1, 1.6, 2.1, 3.05 bits/weight is
79.3, 85.3, 86.3, 86.7 at exponent 0.6 and 78.1, 85.7, 86.4, 86.8 at 0.5; at 0 and 1 it is up to 7 lower.
Where it does not hold, `worth` says what does.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from miracle_hub.code import Code
from miracle_hub.codec.payloads import Request
from miracle_hub.codec.rates import Option
from miracle_hub.codec.trellis import Recipe
from miracle_hub.coding.backend import Backend, rotated_matrix
from miracle_hub.coding.matrix import ROW_SCALE_COLUMNS
from miracle_hub.coding.posterior import squared_error_cost
from miracle_hub.coding.scales import prior_scale
from miracle_hub.format.payload import SCALE_BYTES

# (k, V) of every rate from 0.25 to 8 bits per weight.
LADDER = (
    (1, 4), (2, 4), (3, 4), (2, 2), (5, 4), (3, 2), (7, 4), (2, 1),
    (5, 2), (3, 1), (7, 2), (4, 1), (5, 1), (6, 1), (7, 1), (8, 1),
)  # fmt: skip
# Of differences to a base besides: of Gaussian values 1/8, 1/16 and 1/32 bit leave 0.85, 0.92 and 0.96.
FINER = ((1, 32), (1, 16), (1, 8))
SIZE_EXPONENT = 0.6
# Curves are measured with windows of at most 12 bits, which take a sixteenth of the time of 16: up to
# 4 bits per weight those lower the error by 1 to 14 %, above by more (benchmarks/rate_distortion.py).
_MEASURED_WINDOW_BITS = 12
# Rows that are measured of one tensor, and of all together: choices that bound the time to seconds.
_SAMPLE_WEIGHTS = 8192
_TOTAL_SAMPLE_WEIGHTS = 1 << 22
# Far inside the range of scales, so that rows and squares stay inside theirs.
LARGEST_RMS = 2.0**40


@dataclass(frozen=True)
class Sample:
    """Rows of a tensor's rotated matrix from which its curve is measured.

    Attributes:
        values: float32 `[some rows, columns]`, rotated.
        rms: root mean square of the whole tensor.
        is_difference: to a base, of which little may be stored.
    """

    rows: int
    columns: int
    rotation: int
    values: Tensor
    rms: float
    is_difference: bool = False


def ladder(window_bits: int, seed: int, rates: Sequence[tuple[int, int]] = LADDER) -> list[Code]:
    """The codes of all rates; a window is never shorter than its step."""
    return [Code(max(window_bits, k), k, weights, seed) for k, weights in rates]


def sample_rows(
    weights: Tensor,
    columns: int,
    rotation: int,
    n_tensors: int,
    backend: Backend,
    is_difference: bool = False,
) -> Sample | None:
    """Evenly spaced rows (or the start of one very long row) of a tensor; None if no scale suits it."""
    rms = float(weights.float().square().mean().sqrt())
    if not 1 / LARGEST_RMS <= rms <= LARGEST_RMS and bool(weights.any()):
        return None
    budget = min(_SAMPLE_WEIGHTS, max(512, _TOTAL_SAMPLE_WEIGHTS // n_tensors))
    matrix = weights.reshape(-1, columns)
    n_rows = max(1, min(matrix.shape[0], budget // columns))
    width = min(columns, max(rotation, budget // rotation * rotation))
    picked = torch.linspace(0, matrix.shape[0] - 1, n_rows).long()
    values = rotated_matrix(matrix[picked, :width], width, rotation, backend)
    return Sample(matrix.shape[0], columns, rotation, values, rms, is_difference)


def measure_options(samples: Sequence[Sample], request: Request) -> list[list[Option]]:
    """The options of every sample: all are encoded in one stream per rate and kind of scale."""
    found: list[list[Option]] = [[] for _ in samples]
    rates, window_bits = (*FINER, *LADDER), min(request.window_bits, _MEASURED_WINDOW_BITS)
    measured = ladder(window_bits, request.seed, rates)
    codes = ladder(request.window_bits, request.seed, rates)
    for rate, code, measured_code in zip(rates, codes, measured, strict=True):
        for row_scales in (False, True):
            eligible = [i for i, sample in enumerate(samples) if _takes(sample, rate, row_scales)]
            chosen = [samples[i] for i in eligible]
            errors = _relative_errors(chosen, measured_code, row_scales, request.backend) if chosen else []
            for i, relative in zip(eligible, errors, strict=True):
                found[i].append(_option(samples[i], code, row_scales, relative))
    return found


def _takes(sample: Sample, rate: tuple[int, int], row_scales: bool) -> bool:
    """Whether a rate, and scales per row or for all, are options of a sample.

    Those per row take what low rates save.
    """
    if rate in FINER and not sample.is_difference:
        return False
    return row_scales or sample.is_difference or sample.columns < ROW_SCALE_COLUMNS


def _option(sample: Sample, code: Code, row_scales: bool, relative_error: float) -> Option:
    n_weights = sample.rows * sample.columns
    scales = SCALE_BYTES * (sample.rows if row_scales else 1)
    recipe = Recipe(code, row_scales, sample.columns, sample.rotation)
    return Option(recipe, code.message_bytes(n_weights) + scales, relative_error * n_weights**SIZE_EXPONENT)


def _relative_errors(
    samples: Sequence[Sample], code: Code, row_scales: bool, backend: Backend
) -> list[float]:
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
