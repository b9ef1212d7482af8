"""codebook: states → candidates, the table that every other op reads."""

from typing import NamedTuple

import torch
from torch import Tensor

from ._triton import check_launch, on_its_device, tl, triton
from .candidates import philox_halves, philox_halves_torch
from .checks import MAX_STEP_WEIGHTS, N_QUANTILES, check_range, check_size, check_stream, check_tensor
from .registration import register, takes
from .tuning import tiles


@triton.jit(do_not_specialize=["seed", "stream_id"])
def _codebook_kernel(
    states_ptr,  # [n] int32 or int64
    quantiles_ptr,  # [65536] float16
    out_ptr,  # [n, step_weights] float16
    n,
    seed,  # signed 64-bit word
    stream_id,
    STEP_WEIGHTS: tl.constexpr,
    TILE_STATES: tl.constexpr,
    TILE_GROUPS: tl.constexpr,  # of eight weights, a power of two
):
    at = tl.arange(0, TILE_STATES * TILE_GROUPS)
    row = tl.program_id(0).to(tl.int64) * TILE_STATES + at // TILE_GROUPS
    group = (tl.program_id(1) * TILE_GROUPS + at % TILE_GROUPS).to(tl.uint32)
    state = tl.load(states_ptr + row, mask=row < n, other=0).to(tl.uint32)
    zero = tl.zeros_like(group)
    halves = philox_halves(state, group, stream_id.to(tl.uint32) + zero, zero, seed)
    z = tl.reshape(tl.trans(tl.load(quantiles_ptr + halves)), [TILE_STATES, 8 * TILE_GROUPS])
    rows = tl.program_id(0).to(tl.int64) * TILE_STATES + tl.arange(0, TILE_STATES)
    weights = tl.program_id(1) * TILE_GROUPS * 8 + tl.arange(0, 8 * TILE_GROUPS)
    mask = (rows < n)[:, None] & (weights < STEP_WEIGHTS)[None, :]
    # Written once, read by other kernels: .cs keeps the quantile table in the first-level cache.
    tl.store(out_ptr + rows[:, None] * STEP_WEIGHTS + weights[None, :], z, mask=mask, cache_modifier=".cs")


class _Arguments(NamedTuple):
    """Of `codebook`, in the order of its schema."""

    states: Tensor
    quantiles: Tensor
    step_weights: int
    seed: int
    stream_id: int


def _check(given: _Arguments) -> None:
    op, states, quantiles = "codebook", given.states, given.quantiles
    check_tensor(op, "states", states, (torch.int32, torch.int64), states)
    check_tensor(op, "quantiles", quantiles, (torch.float16,), states)
    check_size(op, "states", states.ndim, 1, "dimension")
    check_size(op, "quantiles", quantiles.numel(), N_QUANTILES, "entries")
    check_range(op, "step_weights", given.step_weights, 1, MAX_STEP_WEIGHTS)
    check_stream(op, given.seed, given.stream_id)


def _allocate(given: _Arguments) -> Tensor:
    return given.states.new_empty((given.states.shape[0], given.step_weights), dtype=torch.float16)


@on_its_device
@takes(_Arguments, _check)
def codebook_triton(given: _Arguments) -> Tensor:
    """The candidates of states, float16 `[n, step_weights]`: standard normal draws.

    Args:
        states: int32 or int64 `[n]`, each in [0, 2²⁴).
        quantiles: float16 `[65536]`, the quantile table of the format.
        seed: the 64-bit seed as a signed number.

    Raises:
        KernelInputError: a tensor or a number is not as said.
        KernelUnavailableError: there is no Triton, or no GPU.

    Source: design of the code, after Havasi et al. 2019 (arXiv:1810.00440), section 3.2.
    """
    states, quantiles, step_weights, seed, stream_id = given
    check_launch("codebook", states)
    out = _allocate(given)
    tile = tiles("codebook", states.device, step_weights=step_weights)
    groups = -(-step_weights // 8)
    tile_groups = min(triton.next_power_of_2(groups), tile["TILE_GROUPS"])
    grid = (triton.cdiv(states.numel(), tile["TILE_STATES"]), triton.cdiv(groups, tile_groups))
    if states.numel():
        _codebook_kernel[grid](
            states, quantiles, out, states.numel(), seed, stream_id, step_weights,
            TILE_STATES=tile["TILE_STATES"], TILE_GROUPS=tile_groups, num_warps=tile["num_warps"],
            enable_fp_fusion=False,
        )  # fmt: skip
    return out


@takes(_Arguments, _check)
def codebook_torch(given: _Arguments) -> Tensor:
    """The reference of `codebook`."""
    states, quantiles, step_weights, seed, stream_id = given
    groups = range(-(-step_weights // 8))
    halves = [philox_halves_torch((states, group, stream_id, 0), seed) for group in groups]
    return quantiles[torch.cat(halves, dim=1)[:, :step_weights]]


codebook = register("codebook", _Arguments, triton=codebook_triton, reference=codebook_torch, fake=_allocate)
