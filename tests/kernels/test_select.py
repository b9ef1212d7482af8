"""select: the chosen candidate's weight is exact, the sum over all is near, draws follow the weights.

Without a GPU a block takes 15 to 30 ms, so there are few of them there. Laws are judged by chi-square tests
with a stated false-alarm rate; seeds are fixed, so a verdict never changes.
"""

import importlib
import os
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch
from streams import generator, signed
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from miracle_hub.code import Code
from miracle_hub.coding import reference
from miracle_hub.coding.quantiles import quantiles
from miracle_kernels import KernelInputError, select, select_torch
from miracle_kernels.select import select_triton
from miracle_kernels.tuning import tiles
from tests.chi_square import p_value

# The package's attribute `select` is the op.
MODULE: Any = importlib.import_module("miracle_kernels.select")
FUNCTIONS = [select_triton, select_torch]
SEED, STREAM_ID = 2**63 + 5, 2**31 + 9
# A right encoder fails one case in ten thousand; a wrong one must be rejected far beyond chance.
FALSE_ALARM = 1e-4
REJECTED = 1e-6
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


# A candidate tile that no GPU has room for; the interpreter takes longer for many tiles.
WIDE = 4096 if os.environ.get("TRITON_INTERPRET") == "1" else 64
# (blocks, V, L, programs, block tile, candidate tile); a program takes every third tile, or all, or one.
SHAPES = [
    (1, 1, 1, 3, 256, 64),
    (63, 1, 4, 1, 16, 64),
    (1, 1, 12, 8, 256, 512),
    (1, 5, 8, 3, 256, 32),
    (MANY, 5, 4, 3, 64, 64),
    (63, 16, 8, 6, 32, 32),
    (5, 16, 1, 1000, 256, 16),
    (1, 16, 12, 1000, 256, 512),
    (17, 20, 4, 1000, 16, 16),
    (2, 20, 12, 3, 256, 512),
    (63, 32, 1, 1, 256, 64),
    (3, 32, 12, 1, 256, 512),
    (5, 128, 8, 1000, 256, 64),
    (1, 128, 16, 3, 16, WIDE),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_weights_are_exact_sums_are_near_and_the_best_is_found(
    device: torch.device, shape: tuple[int, ...], work: Callable[..., None]
) -> None:
    n_blocks, step_weights, window_bits, programs, tile_blocks, tile_candidates = shape
    work(programs, TILE_BLOCKS=tile_blocks, TILE_CANDIDATES=tile_candidates)
    quadratic, linear = random_coefficients(n_blocks, step_weights)
    z = candidates(window_bits, step_weights)
    for function in FUNCTIONS:
        found = function(**arguments(quadratic, linear, window_bits, device))
        check(found, quadratic, linear, z, best=True)


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape[0] < 10], ids=str)
def test_weights_of_drawn_candidates_are_exact_too(
    device: torch.device, shape: tuple[int, ...], work: Callable[..., None]
) -> None:
    n_blocks, step_weights, window_bits, programs, tile_blocks, tile_candidates = shape
    work(programs, TILE_BLOCKS=tile_blocks, TILE_CANDIDATES=tile_candidates)
    quadratic, linear = random_coefficients(n_blocks, step_weights, seed=1)
    given = arguments(quadratic, linear, window_bits, device, selection="sample", noise_seed=-5)
    for function in FUNCTIONS:
        check(function(**given), quadratic, linear, candidates(window_bits, step_weights), best=False)


@pytest.mark.parametrize(
    ("seed", "stream_id"),
    [(0, 0), (1, 2**31), (2**31, 2**32 - 1), (2**32 + 7, 0), (2**63 - 1, 1), (2**63, 0), (2**64 - 1, 2**31)],
)
def test_every_word_of_seed_and_stream_id_counts(device: torch.device, seed: int, stream_id: int) -> None:
    quadratic, linear = random_coefficients(2, 9)
    given = arguments(quadratic, linear, 5, device, seed=signed(seed), stream_id=stream_id)
    for function in FUNCTIONS:
        check(function(**given), quadratic, linear, candidates(5, 9, seed, stream_id), best=True)


@pytest.mark.parametrize("selection", ["best", "sample"])
def test_blocks_of_any_magnitude_stand_side_by_side(
    device: torch.device, selection: str, work: Callable[..., None]
) -> None:
    """Far outside float16: each block has a unit of its own."""
    work(2, TILE_CANDIDATES=16)
    magnitudes = torch.tensor([0, 1e-30, 1e-6, 6e-5, 1, 7e4, 1e6, 1e30])[:, None]
    quadratic, linear = (magnitudes * values for values in random_coefficients(8, 7))
    given = arguments(quadratic, linear, 6, device, selection=selection)
    for function in FUNCTIONS:
        found = function(**given)
        check(found, quadratic, linear, candidates(6, 7), best=selection == "best")
        index, log_weights, log_sums = (tensor.cpu() for tensor in found)
        assert log_weights[0] == 0 and abs(log_sums[0] - 6 * np.log(2)) <= 2**-20 * 6
        assert index[0] == 0 or selection == "sample"
        assert log_weights.isfinite().all() and log_sums.isfinite().all()


@pytest.mark.parametrize("magnitude", [1e6, 1e12, 1e20, 1e30])
@pytest.mark.parametrize("selection", ["best", "sample"])
def test_the_tile_of_blocks_of_any_magnitude_is_the_best_ones(
    device: torch.device, selection: str, magnitude: float, work: Callable[..., None]
) -> None:
    """Candidates so far apart are drawn as they are ranked, and their sum is the largest of them."""
    work(3, TILE_CANDIDATES=16)
    quadratic, linear = (magnitude * values for values in random_coefficients(16, 7, seed=2))
    given = arguments(quadratic, linear, 8, device, selection=selection, noise_seed=3)
    z = candidates(8, 7)
    exact, terms = log_weights_of(quadratic, linear, z)
    leads = exact.view(16, -1, 16).amax(2).topk(2, dim=1)
    is_clear = leads.values[:, 0] - leads.values[:, 1] > 2**-8 * terms.amax(1)
    assert is_clear.sum() > 8
    for function in FUNCTIONS:
        found = function(**given)
        check(found, quadratic, linear, z, best=True)
        assert torch.equal((found[0].cpu() // 16)[is_clear], leads.indices[is_clear, 0])


def test_one_large_coefficient_costs_the_others_no_more_than_stated(device: torch.device) -> None:
    quadratic, linear = random_coefficients(6, 12)
    quadratic[:, 3] = torch.tensor([1e3, 1e5, 1e8, -1e3, -1e5, -1e8])
    for function in FUNCTIONS:
        found = function(**arguments(quadratic, linear, 6, device))
        check(found, quadratic, linear, candidates(6, 12), best=True)


def test_the_best_candidate_does_not_depend_on_tiles_and_splits(
    device: torch.device, work: Callable[..., None]
) -> None:
    quadratic, linear = random_coefficients(33, 3)
    given = arguments(quadratic, linear, 8, device)
    indices = []
    for programs, tile_blocks, tile_candidates in [(1, 256, 256), (4, 16, 16), (5, 64, 32)]:
        work(programs, TILE_BLOCKS=tile_blocks, TILE_CANDIDATES=tile_candidates)
        indices.append(select_triton(**given)[0])
    assert torch.equal(indices[0], indices[1]) and torch.equal(indices[0], indices[2])


# Eight tiles of sixteen candidates, each of which matters.
LAW = dict(quadratic=torch.tensor([[-0.5, -0.3, 0.7]]), linear=torch.tensor([[1.3, -1.0, 1.5]]))
LAW_BITS = 7


def check_law(index: Tensor) -> None:
    """Draws follow the weights, and so do their tiles; another factor in the exponent is rejected."""
    log_weights = log_weights_of(LAW["quadratic"], LAW["linear"], candidates(LAW_BITS, 3))[0][0].numpy()
    counts = np.bincount(index.cpu().numpy(), minlength=1 << LAW_BITS)
    for factor in (1.0, 2.0, 0.5):
        law = np.exp(factor * (log_weights - log_weights.max()))
        law /= law.sum()
        p = p_value(counts, counts.sum() * law, 3)
        if factor == 1:
            assert p > FALSE_ALARM
            tiles = (counts.reshape(-1, 16).sum(1), counts.sum() * law.reshape(-1, 16).sum(1))
            assert p_value(*tiles, 3) > FALSE_ALARM
        else:
            assert p < REJECTED


@pytest.mark.parametrize(
    ("function", "programs", "n_blocks"),
    [(select_triton, 1, 250), (select_triton, 3, 250), (select_triton, 8, 250), (select_torch, 1, 4000)],
)
def test_candidates_are_drawn_in_proportion_to_their_importance_weight(
    device: torch.device, function: Callable, programs: int, n_blocks: int, work: Callable[..., None]
) -> None:
    """One split of eight tiles, splits of three and two, or a split per tile."""
    work(programs, TILE_BLOCKS=4096, TILE_CANDIDATES=16)
    quadratic, linear = (LAW[name].repeat(n_blocks, 1) for name in ("quadratic", "linear"))
    given = arguments(quadratic, linear, LAW_BITS, device, selection="sample", noise_seed=programs)
    check_law(function(**given)[0])


@pytest.mark.parametrize("function", FUNCTIONS)
def test_noise_differs_between_blocks_and_seeds(device: torch.device, function: Callable) -> None:
    """Without any preference: 16 blocks draw 6 or fewer of 64 candidates once in 10⁸."""
    given = arguments(torch.zeros(16, 2), torch.zeros(16, 2), 6, device, selection="sample")
    draws = [function(**given | dict(noise_seed=seed))[0].tolist() for seed in (1, 2, -1, 1)]
    assert draws[0] == draws[3] and all(len(set(draw)) > 6 for draw in draws)
    assert len({tuple(draw) for draw in draws}) == 3


def test_every_word_of_the_noise_seed_counts(device: torch.device) -> None:
    given = arguments(torch.zeros(16, 2), torch.zeros(16, 2), 6, device, selection="sample")
    draws = []
    for given["noise_seed"] in (1, 1 + 2**32, 1 - 2**63):
        draws.append(select_triton(**given)[0])
    assert not torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


# The seed whose largest draw of all is that of the first block's tenth candidate; found by search.
LARGEST_SEED, LARGEST_CANDIDATE = 1420952, 9


def test_the_largest_noise_does_not_draw_a_candidate_that_is_none(device: torch.device) -> None:
    quadratic, linear = random_coefficients(1, 2)
    given = arguments(quadratic, linear, 1, device, selection="sample", noise_seed=LARGEST_SEED)
    check(select_triton(**given), quadratic, linear, candidates(1, 2), best=False)


def test_the_largest_noise_does_not_draw_an_impossible_candidate(device: torch.device) -> None:
    quadratic, linear = torch.full((1, 2), 1e9), torch.full((1, 2), 2e9)
    given = arguments(quadratic, linear, 4, device, noise_seed=LARGEST_SEED)
    best = select_triton(**given)[0]
    assert int(best) != LARGEST_CANDIDATE
    given["selection"] = "sample"
    assert torch.equal(select_triton(**given)[0], best)


class Largest(TorchDispatchMode):
    """The most bytes of any tensor that an operation returns and that no known memory holds."""

    def __init__(self, *known: Tensor) -> None:
        super().__init__()
        self.known, self.n_bytes = {tensor.untyped_storage().data_ptr() for tensor in known}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> Any:
        found = func(*args, **(kwargs or {}))
        for tensor in found if isinstance(found, (tuple, list)) else (found,):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in self.known:
                self.n_bytes = max(self.n_bytes, tensor.numel() * tensor.itemsize)
        return found


@pytest.mark.parametrize("selection", ["best", "sample"])
def test_no_tensor_of_all_scores_exists(
    device: torch.device, selection: str, work: Callable[..., None]
) -> None:
    n_blocks, step_weights, window_bits = 40, 16, 12
    work(3, TILE_CANDIDATES=512)
    coefficients = random_coefficients(n_blocks, step_weights)
    given = arguments(*coefficients, window_bits, device, selection=selection)
    with Largest(given["quantiles"]) as largest:
        select_triton(**given)
    # Both coefficients of every block, in float32; even in float16 all scores were 64 times as many.
    assert 0 < largest.n_bytes <= 4 * 2 * n_blocks * step_weights


@pytest.mark.parametrize("selection", ["best", "sample"])
@pytest.mark.parametrize("function", [*FUNCTIONS, select])
def test_no_blocks_choose_nothing(device: torch.device, function: Callable, selection: str) -> None:
    given = arguments(torch.zeros(0, 3), torch.zeros(0, 3), 8, device, selection=selection)
    index, log_weights, log_sums = function(**given)
    assert index.shape == log_weights.shape == log_sums.shape == (0,)
    assert (index.dtype, log_weights.dtype, log_sums.dtype) == (torch.int64, torch.float32, torch.float32)


def test_tensors_may_be_views_with_odd_offsets(device: torch.device) -> None:
    quadratic, linear = random_coefficients(7, 3)
    given = arguments(quadratic, linear, 5, device)
    moved: dict[str, Any] = dict(quantiles=torch.cat((given["quantiles"][:1], given["quantiles"]))[1:])
    for name in ("quadratic", "linear"):
        moved[name] = torch.cat((given[name][:1], given[name], given[name]))[1:8]
    for found, expected in zip(select_triton(**given | moved), select_triton(**given), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("selection", ["best", "sample"])
def test_the_op_is_a_sound_torch_op(device: torch.device, selection: str) -> None:
    quadratic, linear = random_coefficients(6, 3)
    given = arguments(quadratic, linear, 5, device, selection=selection)
    torch.library.opcheck(select, tuple(given.values()))
    check(select(*given.values()), quadratic, linear, candidates(5, 3), best=selection == "best")


def test_the_op_compiles_without_a_graph_break(device: torch.device) -> None:
    given = arguments(*random_coefficients(6, 3), 5, device)

    def double(*args) -> tuple[Tensor, ...]:
        return tuple(2 * tensor for tensor in select(*args))

    compiled = torch.compile(double, fullgraph=True, backend="aot_eager")
    for found, expected in zip(compiled(*given.values()), double(*given.values()), strict=True):
        assert torch.equal(found, expected)


META = torch.device("meta")
BAD = [
    (dict(quadratic=torch.zeros(4, 3).half()), "quadratic: expected float32, found torch.float16"),
    (dict(quadratic=torch.zeros(4, 2)), r"quadratic: expected shape \(4, 3\), found \(4, 2\)"),
    (dict(quadratic=torch.zeros(1)), r"quadratic: expected shape \(4, 3\), found \(1,\)"),
    (dict(quadratic=torch.zeros(3, 4).T), "quadratic: expected a contiguous tensor"),
    (dict(quadratic=torch.zeros(4, 3, device=META)), "quadratic: expected all tensors on cpu, found meta"),
    (dict(linear=torch.zeros(4, 3).double()), "linear: expected float32, found torch.float64"),
    (dict(linear=torch.zeros(12)), "linear: expected 2 dimensions, found 1"),
    (dict(linear=torch.zeros(5, 3)), r"quadratic: expected shape \(5, 3\), found \(4, 3\)"),
    (dict(linear=torch.zeros(3, 4).T), r"linear: expected a contiguous tensor, found strides \(1, 4\)"),
    (dict(linear=torch.zeros(4, 3, device=META)), "quadratic: expected all tensors on meta, found cpu"),
    (dict(linear=torch.zeros(4, 0)), r"\(columns of linear\): expected an integer from 1 to 128, found 0"),
    (dict(linear=torch.zeros(4, 129)), r"step_weights \(columns of linear\): .* 1 to 128, found 129"),
    (dict(quantiles=quantiles().float()), "quantiles: expected float16, found torch.float32"),
    (dict(quantiles=torch.zeros(100).half()), "quantiles: expected 65536 entries, found 100"),
    (dict(quantiles=torch.zeros(65536, device=META).half()), "quantiles: expected all tensors on cpu"),
    (dict(window_bits=25), "window_bits: expected an integer from 1 to 24, found 25"),
    (dict(window_bits=0), "window_bits: expected an integer from 1 to 24, found 0"),
    (dict(selection="worst"), r"selection: expected one of \('best', 'sample'\), found 'worst'"),
    (dict(seed=2**63), "select: seed: expected an integer from -9223372036854775808"),
    (dict(stream_id=2**32), "stream_id: expected an integer from 0 to 4294967295, found 4294967296"),
    (dict(stream_id=-1), "stream_id: expected an integer from 0 to 4294967295, found -1"),
    (dict(noise_seed=2**63), "noise_seed: expected an integer from -9223372036854775808"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_input_is_named(change: dict[str, Any], message: str) -> None:
    given = arguments(*random_coefficients(4, 3), 5, torch.device("cpu"))
    for function in FUNCTIONS:
        with pytest.raises(KernelInputError, match=message):
            function(**given | change)
