"""select: the chosen candidate's weight is exact, the sum over all is near, draws follow the weights.

Without a GPU a block takes 15 to 30 ms, so there are few of them there. Laws are judged by chi-square tests
with a stated false-alarm rate; seeds are fixed, so a verdict never changes.
"""

import importlib
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chi2
from streams import generator, signed
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from miracle_hub.coding import reference
from miracle_hub.coding.quantiles import quantiles
from miracle_hub.config import Code
from miracle_kernels import KernelInputError, select, select_torch
from miracle_kernels.select import select_triton
from miracle_kernels.tuning import tiles

# The package's attribute `select` is the op.
MODULE: Any = importlib.import_module("miracle_kernels.select")
FUNCTIONS = [select_triton, select_torch]
SEED, STREAM_ID = 2**63 + 5, 2**31 + 9
# A right encoder fails one case in ten thousand; a wrong one must be rejected far beyond chance.
FALSE_ALARM = 1e-4
REJECTED = 1e-6
# Below this the chi-square approximation is poor, and cells are merged.
LEAST_EXPECTED = 5
# Blocks of a large case.
MANY = 1311 if torch.cuda.is_available() else 321


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`work(programs, TILE_…=…)`: how many programs split the candidates of all blocks, and tile sizes."""

    def change(programs: int, **sizes: int) -> None:
        monkeypatch.setattr(MODULE, "resident_programs", lambda *_: programs)
        monkeypatch.setattr(MODULE, "tiles", lambda *args, **problem: tiles(*args, **problem) | sizes)

    return change


@lru_cache(1)
def candidates(window_bits: int, step_weights: int, seed: int = SEED, stream_id: int = STREAM_ID) -> Tensor:
    """float64 [2^L, V] by the package's reference, which is the definition."""
    code = Code(window_bits, window_bits, step_weights, seed, stream_id)
    return reference.candidates(torch.arange(1 << window_bits), code).double()


def random_coefficients(n_blocks: int, step_weights: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Quadratic and linear: posteriors narrower and wider than the prior."""
    quadratic, linear = torch.randn(2, n_blocks, step_weights, generator=generator(seed))
    return 2 * quadratic, 3 * linear


def arguments(
    quadratic: Tensor, linear: Tensor, window_bits: int, device: torch.device, **changes: Any
) -> dict[str, Any]:
    given: dict[str, Any] = dict(
        quadratic=quadratic.to(device),
        linear=linear.to(device),
        quantiles=quantiles().to(device),
        window_bits=window_bits,
        seed=signed(SEED),
        stream_id=STREAM_ID,
        selection="best",
        noise_seed=0,
    )
    return given | changes


def log_weights_of(quadratic: Tensor, linear: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """float64 log importance weights [n_blocks, 2^L], and the sums of the terms' magnitudes."""
    a, b = -0.5 * quadratic.double(), 0.5 * linear.double()
    return a @ (z * z).T + b @ z.T, a.abs() @ (z * z).T + b.abs() @ z.abs().T


def check(
    found: tuple[Tensor, Tensor, Tensor], quadratic: Tensor, linear: Tensor, z: Tensor, best: bool
) -> None:
    """Of every block: the index is a candidate's, its weight is exact, and the log-sum-exp is near.

    Weights are exact but for float32: terms are rounded four times and summed pairwise, at most 128, so
    each passes through at most 11 roundings of 2⁻²⁴, less than 2⁻²⁰ of the sum of magnitudes. The docstring
    allows the log-sum-exp, and the weight that "best" misses, 2⁻⁹ of the largest sum of magnitudes; the
    float32 logarithm adds 2⁻²⁰ of itself or of 1.
    """
    index, log_weights, log_sums = (tensor.cpu() for tensor in found)
    assert (index.dtype, log_weights.dtype, log_sums.dtype) == (torch.int64, torch.float32, torch.float32)
    assert index.shape == log_weights.shape == log_sums.shape == quadratic.shape[:1]
    assert 0 <= int(index.min()) and int(index.max()) < z.shape[0]
    exact, magnitude = log_weights_of(quadratic, linear, z)
    chosen = exact.gather(1, index[:, None])[:, 0]
    rounding = 2**-20 * magnitude.gather(1, index[:, None])[:, 0]
    assert ((log_weights.double() - chosen).abs() <= rounding).all()
    exact_sums, allowed = exact.logsumexp(1), 2**-9 * magnitude.amax(1)
    assert ((log_sums.double() - exact_sums).abs() <= allowed + 2**-20 * exact_sums.abs().clamp(min=1)).all()
    if best:
        assert (exact.amax(1) - chosen <= allowed).all()


def n_splits(work_programs: int, n_blocks: int, n_tiles: int, tile_blocks: int = 256) -> int:
    """As select computes them, so that a test knows what it covers."""
    return max(1, min(n_tiles, -(-work_programs // -(-n_blocks // tile_blocks))))


# (blocks, V, L)
SHAPES = [
    (1, 1, 1),
    (63, 1, 4),
    (1, 5, 8),
    (MANY, 5, 4),
    (5, 16, 1),
    (63, 16, 8),
    (1, 20, 12),
    (17, 20, 4),
    (3, 32, 12),
    (63, 32, 1),
    (5, 128, 8),
    (2, 128, 12),
]


@pytest.mark.parametrize("programs", [1, 3, 1000])
@pytest.mark.parametrize(("n_blocks", "step_weights", "window_bits"), SHAPES)
def test_weights_are_exact_and_sums_are_near(
    device: torch.device,
    n_blocks: int,
    step_weights: int,
    window_bits: int,
    programs: int,
    work: Callable[..., None],
) -> None:
    if n_blocks == MANY or window_bits == 1:
        if programs != 3:
            pytest.skip("one split whatever the programs")
    # Few tiles of long windows, because each takes the interpreter as long as a small one.
    work(programs, TILE_CANDIDATES=512 if window_bits == 12 else 64)
