"""select: the block code's encoder. Every block picks one of 2^L candidates; no matrix of all scores exists.

Candidates are generated tile by tile in registers and scored on tensor cores as [z², z] · [-q/2; l/2]. A
running maximum and sum per block (as in flash attention) find the tile of the choice and the log-sum-exp;
a second kernel scores that one tile again in float32 and chooses within it.
"""

# What Triton's language means by these operators is not what its stubs say.
# pyright: reportOperatorIssue=false

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ._triton import check_launch, on_its_device, tl, triton
from .candidates import philox_halves
from .checks import (
    N_QUANTILES,
    check_choice,
    check_range,
    check_shape,
    check_size,
    check_stream,
    check_tensor,
)
from .codebook import codebook_torch
from .noise import SELECT_CANDIDATE, SELECT_SPLIT, SELECT_TILE, gumbel, uniform
from .registration import register, takes
from .tuning import resident_programs, tiles

MAX_WINDOW_BITS = 24
MAX_STEP_WEIGHTS = 128
SELECTIONS = ("best", "sample")
_LN_2 = tl.constexpr(math.log(2))
# Threads that share the scores of a block, after a product on the tensor cores of NVIDIA.
_LANES = 4
# Candidates that the reference scores at a time.
_REFERENCE_TILE = 1 << 12


@triton.jit
def _tile_candidates(
    quantiles_ptr, first, seed, stream_id, TILE_CANDIDATES: tl.constexpr, WIDTH: tl.constexpr
):
    """float16 `[TILE_CANDIDATES, WIDTH]`, the candidates of states first, first + 1, …"""
    at = tl.arange(0, TILE_CANDIDATES * WIDTH // 8)
    state, group = (first + at // (WIDTH // 8)).to(tl.uint32), (at % (WIDTH // 8)).to(tl.uint32)
    zero = tl.zeros_like(state)
    halves = philox_halves(state, group, stream_id.to(tl.uint32) + zero, zero, seed)
    return tl.reshape(tl.trans(tl.load(quantiles_ptr + halves)), [TILE_CANDIDATES, WIDTH])


@triton.jit
def _taken_in(
    score, largest, total, chosen, unit, block, tile, noise_seed, SAMPLE: tl.constexpr, LANES: tl.constexpr
):  # fmt: skip
    """Largest score, sum and chosen tile of each block, `[blocks, LANES]`, with another tile of scores."""
    # A thread's candidates of a block: pairs, in every fourth of which matrix instructions leave them.
    score = tl.reshape(score, [score.shape[0], score.shape[1] // (2 * LANES), LANES, 2])
    tile_largest = tl.max(tl.max(score, axis=3), axis=1)
    above = tl.maximum(largest, tile_largest)
    # Powers of two scale without rounding, so that the difference is exact where it is 0.
    scaled = above * unit[:, None]
    power = tl.exp2(tl.fma(score, unit[:, None, None, None], -scaled[:, None, :, None]))
    tile_total = tl.sum(tl.sum(power, axis=3), axis=1)
    total = tl.fma(total, tl.exp2(tl.fma(largest, unit[:, None], -scaled)), tile_total)
    if SAMPLE:
        # A tile replaces the one chosen before in proportion to its share of the sum so far.
        draw = uniform(noise_seed, block, tile, block >> 32, SELECT_TILE)
        chosen = tl.where(draw[:, None] * total < tile_total, tile, chosen)
    else:
        chosen = tl.where(tile_largest > largest, tile, chosen)
    return above, total, chosen


@triton.jit
def _merged(largest, total, chosen, unit):
    """What a block's lanes found, as one: the largest score in nats, the sum, the tile of the choice."""
    top = tl.max(largest, axis=1)
    below = largest - top[:, None]  # pyright: ignore[reportCallIssue, reportArgumentType]
    # Logarithms instead of products: their sum is the same number in every thread.
    power = tl.exp2(below * unit[:, None] + tl.log2(total))
    tile = tl.min(tl.where(below == 0, chosen, 0x7FFFFFFF), axis=1)
    return top * unit * _LN_2, tl.sum(power, axis=1), tile


@triton.jit(do_not_specialize=["n_blocks", "n_tiles", "seed", "stream_id", "noise_seed"])
def _scan_kernel(
    largest_ptr,  # [splits, n_blocks] float32, the largest score
    total_ptr,  # [splits, n_blocks] float32, Σ exp(score - largest)
    tile_ptr,  # [splits, n_blocks] int32, the tile that holds the choice
    coefficients_ptr,  # [n_blocks, WIDTH, 2] float16: -q/2 and l/2 in bits over the block's unit
    unit_ptr,  # [n_blocks] float32, powers of two
    quantiles_ptr,  # [65536] float16
    n_blocks, n_tiles, seed, stream_id, noise_seed,
    WIDTH: tl.constexpr,  # step_weights, rounded up to what a matrix instruction takes
    N_CANDIDATES: tl.constexpr, SAMPLE: tl.constexpr,
    LANES: tl.constexpr,  # parts of a tile whose maxima and sums are kept apart up to the end
    PARTS: tl.constexpr,  # of the blocks of a tile, which score its candidates one after the other
    TILE_BLOCKS: tl.constexpr, TILE_CANDIDATES: tl.constexpr,
):  # fmt: skip
    size: tl.constexpr = TILE_BLOCKS // PARTS
    blocks, coefficients, units = (), (), ()
    largest, total, chosen = (), (), ()
    for part in tl.static_range(PARTS):  # pyright: ignore[reportGeneralTypeIssues]
        block = (tl.program_id(0).to(tl.int64) * PARTS + part) * size + tl.arange(0, size)
        mask = block < n_blocks
        at = block[:, None] * (2 * WIDTH) + tl.arange(0, 2 * WIDTH)[None, :]
        coefficients += (tl.load(coefficients_ptr + at, mask=mask[:, None], other=0.0),)
        units += (tl.load(unit_ptr + block, mask=mask, other=1.0),)
        blocks += (block,)
        largest += (tl.full([size, LANES], float("-inf"), tl.float32),)
        total += (tl.zeros([size, LANES], tl.float32),)
        chosen += (tl.zeros([size, LANES], tl.int32),)
    for tile in range(tl.program_id(1), n_tiles, tl.num_programs(1)):
        first = tile * TILE_CANDIDATES
        z = _tile_candidates(quantiles_ptr, first, seed, stream_id, TILE_CANDIDATES, WIDTH)
        terms = tl.trans(tl.reshape(tl.join(z * z, z), [TILE_CANDIDATES, 2 * WIDTH]))
        new_largest, new_total, new_chosen = (), (), ()
        for part in tl.static_range(PARTS):  # pyright: ignore[reportGeneralTypeIssues]
            score = tl.dot(coefficients[part], terms)
            if N_CANDIDATES < TILE_CANDIDATES:
                is_one = (tl.arange(0, TILE_CANDIDATES) < N_CANDIDATES)[None, :]
                score = tl.where(is_one, score, float("-inf"))
            found = _taken_in(
                score, largest[part], total[part], chosen[part], units[part], blocks[part], tile, noise_seed,
                SAMPLE, LANES,
            )  # fmt: skip
            new_largest, new_total = new_largest + (found[0],), new_total + (found[1],)
            new_chosen += (found[2],)
        largest, total, chosen = new_largest, new_total, new_chosen
    for part in tl.static_range(PARTS):  # pyright: ignore[reportGeneralTypeIssues]
        at = tl.program_id(1).to(tl.int64) * n_blocks + blocks[part]
        mask = blocks[part] < n_blocks
        found = _merged(largest[part], total[part], chosen[part], units[part])
        tl.store(largest_ptr + at, found[0], mask=mask)
        tl.store(total_ptr + at, found[1], mask=mask)
        tl.store(tile_ptr + at, found[2], mask=mask)


@triton.jit(do_not_specialize=["n_blocks", "n_splits", "seed", "stream_id", "noise_seed"])
def _choose_kernel(
    index_ptr,  # [n_blocks] int64
    log_weight_ptr,  # [n_blocks] float32
    log_sum_ptr,  # [n_blocks] float32
    largest_ptr, total_ptr, tile_ptr,  # of _scan_kernel
    quadratic_ptr,  # [n_blocks, STEP_WEIGHTS] float32
    linear_ptr,  # [n_blocks, STEP_WEIGHTS] float32
    quantiles_ptr,  # [65536] float16
    n_blocks, n_splits, seed, stream_id, noise_seed,
    STEP_WEIGHTS: tl.constexpr, WIDTH: tl.constexpr, N_CANDIDATES: tl.constexpr, SAMPLE: tl.constexpr,
    TILE_CANDIDATES: tl.constexpr, TILE_SPLITS: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, TILE_SPLITS)
    at = split.to(tl.int64) * n_blocks + block
    largest = tl.load(largest_ptr + at, mask=split < n_splits, other=float("-inf"))
    total = tl.load(total_ptr + at, mask=split < n_splits, other=0.0)
    top = tl.max(largest, axis=0)
    tl.store(log_sum_ptr + block, top + tl.log(tl.sum(total * tl.exp(largest - top), axis=0)))
    if SAMPLE:
        log_total = tl.where(split < n_splits, largest + tl.log(tl.maximum(total, 1e-38)), float("-inf"))
        largest = log_total + gumbel(noise_seed, split, block, block >> 32, SELECT_SPLIT)
    tile = tl.load(tile_ptr + tl.argmax(largest, axis=0).to(tl.int64) * n_blocks + block)
    candidate = tl.arange(0, TILE_CANDIDATES)
    z = _tile_candidates(quantiles_ptr, tile * TILE_CANDIDATES, seed, stream_id, TILE_CANDIDATES, WIDTH)
    v = tl.arange(0, WIDTH)
    quadratic = tl.load(quadratic_ptr + block * STEP_WEIGHTS + v, mask=v < STEP_WEIGHTS, other=0.0)
    linear = tl.load(linear_ptr + block * STEP_WEIGHTS + v, mask=v < STEP_WEIGHTS, other=0.0)
    z = z.to(tl.float32)
    score = -0.5 * tl.sum(z * (quadratic[None, :] * z - linear[None, :]), axis=1)
    score = tl.where(candidate < N_CANDIDATES, score, float("-inf"))
    noisy = score
    if SAMPLE:
        noisy += gumbel(noise_seed, candidate, block, block >> 32, SELECT_CANDIDATE)
    best = tl.argmax(noisy, axis=0)
    tl.store(index_ptr + block, (tile * TILE_CANDIDATES + best).to(tl.int64))
    tl.store(log_weight_ptr + block, tl.sum(tl.where(candidate == best, score, 0.0), axis=0))


class _Arguments(NamedTuple):
    """Of `select`, in the order of its schema."""

    quadratic: Tensor
    linear: Tensor
    quantiles: Tensor
    window_bits: int
    seed: int
    stream_id: int
    selection: str
    noise_seed: int


def _check(given: _Arguments) -> None:
    op, quadratic, linear, quantiles = "select", given.quadratic, given.linear, given.quantiles
    check_range(op, "window_bits", given.window_bits, 1, MAX_WINDOW_BITS)
    check_stream(op, given.seed, given.stream_id)
    check_range(op, "noise_seed", given.noise_seed, -(2**63), 2**63 - 1)
    check_choice(op, "selection", given.selection, SELECTIONS)
    check_tensor(op, "linear", linear, (torch.float32,), linear)
    check_size(op, "linear", linear.ndim, 2, "dimensions")
    check_range(op, "step_weights (columns of linear)", linear.shape[1], 1, MAX_STEP_WEIGHTS)
    check_tensor(op, "quadratic", quadratic, (torch.float32,), linear)
    check_shape(op, "quadratic", quadratic, tuple(linear.shape))
    check_tensor(op, "quantiles", quantiles, (torch.float16,), linear)
    check_size(op, "quantiles", quantiles.numel(), N_QUANTILES, "entries")


def _allocate(given: _Arguments) -> tuple[Tensor, Tensor, Tensor]:
    linear, n_blocks = given.linear, given.linear.shape[0]
    index = linear.new_empty(n_blocks, dtype=torch.int64)
    return index, linear.new_empty(n_blocks), linear.new_empty(n_blocks)


@on_its_device
@takes(_Arguments, _check)
def select_triton(given: _Arguments) -> tuple[Tensor, Tensor, Tensor]:
    """The chosen candidate of every block, its log importance weight, and the log-sum-exp over all.

    The log importance weight of a candidate z is Σ_v -½·z_v·(quadratic_v · z_v - linear_v), in nats, up
    to a constant of the block.

    Args:
        quadratic: float32 `[n_blocks, step_weights]`, finite.
        linear: float32 `[n_blocks, step_weights]`, finite.
        quantiles: float16 `[65536]`, the quantile table of the format.
        window_bits: of the code; there are 2^window_bits candidates.
        selection: "best" takes the largest weight, "sample" draws in proportion to the weights.
        noise_seed: signed 64 bits, of the draws.

    Returns:
        int64 `[n_blocks]`; float32 `[n_blocks]` of the choice, exact to float32 rounding; float32
        `[n_blocks]`, within 2⁻⁹ · max over candidates of Σ_v (|½·quadratic·z²| + |½·linear·z|) and float32
        rounding of the logarithm: candidates are compared in float16 products, so among nearly equal ones
        the choice may differ from exact arithmetic by that much.

    Raises:
        KernelInputError: a tensor or a number is not as said.
        KernelUnavailableError: there is no Triton, or no GPU.

    Source: Havasi et al. 2019 (arXiv:1810.00440), algorithm 1; the online sum is that of Milakov and
    Gimelshein 2018 (arXiv:1805.02867). Deviation: "best" takes the largest weight instead of drawing one.
    """
    quadratic, linear, quantiles, window_bits, seed, stream_id, selection, noise_seed = given
    check_launch("select", linear)
    index, log_weights, log_sums = _allocate(given)
    n_blocks, step_weights = linear.shape
    if n_blocks == 0:
        return index, log_weights, log_sums
    width = max(16, triton.next_power_of_2(step_weights))
    tile = tiles("select", linear.device, step_weights=width)
    code = {"WIDTH": width, "N_CANDIDATES": 1 << window_bits, "SAMPLE": selection == "sample"}
    code["TILE_CANDIDATES"] = min(tile["TILE_CANDIDATES"], max(16, 1 << window_bits))
    n_tiles = triton.cdiv(1 << window_bits, code["TILE_CANDIDATES"])
    tile_blocks = min(tile["TILE_BLOCKS"], max(16, triton.next_power_of_2(n_blocks)))
    across = triton.cdiv(n_blocks, tile_blocks)
    parts = max(1, tile_blocks // tile["PART_BLOCKS"])
    wanted = triton.cdiv(resident_programs(linear.device, tile["programs_per_processor"]), across)
    lanes = 1 if code["SAMPLE"] or code["N_CANDIDATES"] < code["TILE_CANDIDATES"] else _LANES
    n_splits = max(1, min(n_tiles, wanted, tile["largest_splits"]))
    coefficients, unit = _scaled_coefficients(quadratic, linear, width)
    partial = [linear.new_empty((n_splits, n_blocks), dtype=d) for d in (torch.float32,) * 2 + (torch.int32,)]
    _scan_kernel[(across, n_splits)](
        *partial, coefficients, unit, quantiles, n_blocks, n_tiles, seed, stream_id, noise_seed,
        TILE_BLOCKS=tile_blocks, PARTS=parts, LANES=lanes, enable_fp_fusion=True,
        num_warps=tile["num_warps"], num_stages=tile["num_stages"], **code,
    )  # fmt: skip
    # A sum of products, fused across a shuffle, is another number in other threads, and all of them store it.
    _choose_kernel[(n_blocks,)](
        index, log_weights, log_sums, *partial, quadratic, linear, quantiles, n_blocks, n_splits, seed,
        stream_id, noise_seed, STEP_WEIGHTS=step_weights, TILE_SPLITS=triton.next_power_of_2(n_splits),
        num_warps=4, enable_fp_fusion=False, **code,
    )  # fmt: skip
    return index, log_weights, log_sums


def _scaled_coefficients(quadratic: Tensor, linear: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """float16 `[n_blocks, width, 2]` of magnitude below 2, in bits, and each block's power of two."""
    coefficients = torch.stack((-0.5 * quadratic, 0.5 * linear), dim=2) / _LN_2.value
    _, exponent = torch.frexp(coefficients.abs().amax(dim=(1, 2)))
    # One less than would make them at most 1, so that it is finite wherever the coefficients are.
    unit = torch.ldexp(torch.ones_like(exponent, dtype=torch.float32), exponent - 1)
    scaled = (coefficients / unit[:, None, None]).half()
    return torch.nn.functional.pad(scaled, (0, 0, 0, width - linear.shape[1])), unit


@takes(_Arguments, _check)
def select_torch(given: _Arguments) -> tuple[Tensor, Tensor, Tensor]:
    """The reference of `select`, in float32. Draws come from torch's generator, so they differ."""
    quadratic, linear, quantiles, window_bits, seed, stream_id, selection, noise_seed = given
    generator = torch.Generator(linear.device).manual_seed(noise_seed % 2**63)
    index, log_weights, log_sums = _allocate(given)
    best = torch.full_like(log_weights, -torch.inf)
    log_sums.fill_(-torch.inf)
    for first in range(0, 1 << window_bits, _REFERENCE_TILE):
        states = torch.arange(first, min(first + _REFERENCE_TILE, 1 << window_bits), device=linear.device)
        z = codebook_torch(states, quantiles, linear.shape[1], seed, stream_id).float()
        scores = -0.5 * quadratic @ (z * z).T + 0.5 * linear @ z.T
        noisy = scores
        if selection == "sample":
            noisy = scores - torch.empty_like(scores).exponential_(generator=generator).log()
        tile_best, at = noisy.max(dim=1)
        better = tile_best > best
        best = torch.where(better, tile_best, best)
        index = torch.where(better, first + at, index)
        log_weights = torch.where(better, scores.gather(1, at[:, None])[:, 0], log_weights)
        log_sums = torch.logaddexp(log_sums, torch.logsumexp(scores, dim=1))
    return index, log_weights, log_sums


select = register("select", _Arguments, triton=select_triton, reference=select_torch, fake=_allocate)
