"""slide: the sliding code's encoder, Viterbi or an exact draw, one program per piece of the stream.

Even pieces of the stream run past both their ends by a margin, in which the surviving paths merge, and keep
their middle; odd pieces then join their neighbors' nodes. Pieces cost no bits, and the format knows of none.
"""

# What Triton's language means by these operators is not what its stubs say.
# pyright: reportOperatorIssue=false

from typing import NamedTuple

import torch
from torch import Tensor

from ._triton import check_launch, on_its_device, tl, triton
from .checks import (
    check_choice,
    check_code,
    check_range,
    check_size,
    check_table,
    check_tensor,
    message_bytes,
)
from .packing import pack_kernel, pack_torch
from .registration import register, takes
from .trellis import path_torch, slide_kernel
from .tuning import memory_share, resident_programs, tiles

MAX_WINDOW_BITS = 16
SELECTIONS = ("best", "sample")
# Survivors merge within a few window lengths; at sixteen the error equals that of one undivided search
# to 0.02 % (benchmarks/rate_distortion.py, "pieces").
_MERGE_WINDOWS = 16
# Margins then add a tenth to the work of L = 12, k = 2.
_PIECE_STEPS = 2048
# Weights of a step whose candidates may stay in registers: the code for each stands there by itself.
_MAX_KEPT = 8


@triton.jit(do_not_specialize=["n_weights"])
def _cost_kernel(
    sums_ptr,  # [programs] float32
    states_ptr,  # [n_steps] int32
    table_ptr,  # [V, 2^L] float16
    quadratic_ptr,  # [n_weights] float32, or [1]
    linear_ptr,  # [n_weights] float32
    n_weights, L: tl.constexpr, V: tl.constexpr, QUADRATIC: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    weight = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    mask = weight < n_weights
    state = tl.load(states_ptr + weight // V, mask=mask, other=0)
    z = tl.load(table_ptr + ((weight % V).to(tl.int32) << L) + state).to(tl.float32)
    quadratic = tl.load(quadratic_ptr + weight * QUADRATIC, mask=mask, other=0.0)
    linear = tl.load(linear_ptr + weight, mask=mask, other=0.0)
    cost = tl.where(mask, z * (quadratic * z - linear), 0.0)
    tl.store(sums_ptr + tl.program_id(0), tl.sum(cost, axis=0))


class _Arguments(NamedTuple):
    """Of `slide`, in the order of its schema."""

    quadratic: Tensor
    linear: Tensor
    table: Tensor
    window_bits: int
    step_bits: int
    step_weights: int
    selection: str
    seed: int


def _check(given: _Arguments) -> None:
    op, quadratic, linear, window_bits = "slide", given.quadratic, given.linear, given.window_bits
    check_code(op, window_bits, given.step_bits, given.step_weights)
    check_range(op, "window_bits", window_bits, 1, MAX_WINDOW_BITS)
    check_range(op, "step_bits (select encodes the block code)", given.step_bits, 1, window_bits - 1)
    check_range(op, "seed", given.seed, -(2**63), 2**63 - 1)
    check_choice(op, "selection", given.selection, SELECTIONS)
    check_tensor(op, "linear", linear, (torch.float32,), linear)
    check_size(op, "linear", linear.ndim, 1, "dimension")
    check_tensor(op, "quadratic", quadratic, (torch.float32,), linear)
    check_size(op, "quadratic", quadratic.ndim, 1, "dimension")
    expected = 1 if quadratic.numel() == 1 else linear.numel()
    check_size(op, "quadratic", quadratic.numel(), expected, "entries, or 1")
    check_table(op, given.table, window_bits, given.step_weights, linear, quantiles=False)


def _allocate(given: _Arguments) -> tuple[Tensor, Tensor]:
    linear, code = given.linear, (given.window_bits, given.step_bits, given.step_weights)
    message = linear.new_empty(message_bytes(linear.shape[0], *code), dtype=torch.uint8)
    return message, linear.new_empty((), dtype=torch.float64)


@on_its_device
@takes(_Arguments, _check)
def slide_triton(given: _Arguments) -> tuple[Tensor, Tensor]:
    """The message of a stream under an overlapping code, and the cost of what it decodes to.

    Args:
        quadratic: float32 `[n]`, or `[1]` for all weights; cost(z) = quadratic · z² - linear · z, which
            is -2 log(importance weight).
        linear: float32 `[n]`.
        table: float16 `[2^window_bits, step_weights]`, the candidates (see `codebook`).
        selection: "best" finds the path of least cost (Viterbi), "sample" draws a path in proportion to
            its importance weight (forward filtering, backward sampling).
        seed: signed 64 bits, of the encoder's own noise; "sample" only.

    Returns:
        uint8 `[bytes]`, and float64 `[]`: the sum of the costs of the candidates it stands for.

    Raises:
        KernelInputError: a tensor or a number is not as said.
        KernelUnavailableError: there is no Triton, or no GPU.

    Source: Havasi et al. 2019 (arXiv:1810.00440), algorithm 1, over the joint candidates of the trellis.
    Deviation: "best" takes the largest weight instead of drawing one.
    """
    quadratic, linear, table, window_bits, step_bits, step_weights = given[:6]
    check_launch("slide", linear)
    n_weights, n_steps = linear.numel(), -(-linear.numel() // step_weights)
    states = linear.new_empty(n_steps, dtype=torch.int32)
    message, cost = _allocate(given)
    if n_weights == 0:
        return message, cost.zero_()
    by_weight = table.T.contiguous()
    code = {"L": window_bits, "V": step_weights, "QUADRATIC": int(quadratic.numel() > 1)}
    _search(states, by_weight, given, code)
    tile = tiles("slide", linear.device)["TILE_MESSAGE"]
    pack_kernel[(triton.cdiv(message.numel(), tile),)](
        message, states, n_steps, message.numel(),
        L=window_bits, K=step_bits, TILE=tile, enable_fp_fusion=True,
    )  # fmt: skip
    tile = tiles("slide", linear.device)["TILE_COST"]
    sums = linear.new_empty(triton.cdiv(n_weights, tile))
    _cost_kernel[(sums.numel(),)](
        sums, states, by_weight, quadratic, linear, n_weights, TILE=tile, enable_fp_fusion=True, **code
    )
    return message, sums.sum(dtype=torch.float64)


def _search(states: Tensor, table: Tensor, given: _Arguments, code: dict[str, int]) -> None:
    """Fill in the states, even pieces first, as many at a time as the scratch memory allows."""
    quadratic, linear, _, window_bits, step_bits, _, selection, seed = given
    device, n_steps = linear.device, states.numel()
    nodes = 1 << (window_bits - step_bits)
    tile = tiles("slide", device, window_bits=window_bits, step_bits=step_bits)
    margin = min(n_steps, -(-_MERGE_WINDOWS * window_bits // step_bits))
    n_pieces = count_pieces(n_steps, margin, 2 * resident_programs(device, tile["programs_per_processor"]))
    stride = -(-n_steps // n_pieces) + 2 * margin
    item = torch.uint8 if step_bits <= 8 else torch.int16
    batch = max(1, memory_share(device) // (stride * nodes * item.itemsize + 8 * nodes))
    n_programs = min(batch, -(-n_pieces // 2))
    branches = torch.empty(n_programs * stride * nodes, dtype=item, device=device)
    reached = torch.empty(n_programs * 2 * nodes, dtype=torch.float32, device=device)
    for join in (False, True):
        n_parity = (n_pieces + 1 - join) // 2
        for first in range(0, n_parity, n_programs):
            slide_kernel[(min(n_programs, n_parity - first),)](
                states, branches, reached, table, quadratic, linear, linear.numel(), n_steps, n_pieces,
                first, margin, stride, seed, K=step_bits, JOIN=int(join), SAMPLE=selection == "sample",
                num_stages=1, enable_fp_fusion=True, **code, **_tile_shape(tile, given),
            )  # fmt: skip


def _tile_shape(tile: dict[str, int], given: _Arguments) -> dict[str, int]:
    """Nodes and branches of a tile, and whether it is the only one and keeps its candidates in registers."""
    nodes, n_candidates = 1 << (given.window_bits - given.step_bits), given.step_weights << given.window_bits
    tile_nodes = min(nodes, tile["TILE_NODES"])
    tile_states = tile["TILE_STATES" if given.selection == "best" else "TILE_STATES_DRAWN"]
    tile_branches = min(1 << given.step_bits, max(1, tile_states // tile_nodes))
    is_whole = tile_nodes * tile_branches == 1 << given.window_bits
    keep = is_whole and given.step_weights <= _MAX_KEPT and n_candidates <= tile["KEPT_CANDIDATES"]
    return {
        "TILE_NODES": tile_nodes, "TILE_BRANCHES": tile_branches, "KEEP": int(keep),
        "num_warps": tile["num_warps"],
    }  # fmt: skip


def count_pieces(n_steps: int, margin: int, wanted: int) -> int:
    """Pieces of at most 2,048 steps, more of them where a GPU would stand idle, but each two margins long.

    Two margins are also more steps than it takes to get from any node to any other.
    """
    enough = -(-n_steps // _PIECE_STEPS)
    return max(1, enough, min(wanted, n_steps // (2 * margin)))


@takes(_Arguments, _check)
def slide_torch(given: _Arguments) -> tuple[Tensor, Tensor]:
    """The reference of `slide`: one undivided search. Draws come from torch's generator, so they differ."""
    quadratic, linear, table, window_bits, step_bits, step_weights, selection, seed = given
    n_weights = linear.numel()
    n_steps = -(-n_weights // step_weights)
    padding = (0, n_steps * step_weights - n_weights)
    by_step = (n_steps, 1, step_weights)
    quadratics = torch.nn.functional.pad(quadratic.expand(n_weights), padding).view(by_step)
    linears = torch.nn.functional.pad(linear, padding).view(by_step)
    generator = torch.Generator(linear.device).manual_seed(seed % 2**63) if selection == "sample" else None
    states = path_torch(quadratics, linears, table.float(), step_bits, generator)
    z = table[states].float().view(by_step)
    cost = (z * (quadratics * z - linears)).sum(dtype=torch.float64)
    return pack_torch(states, window_bits, step_bits), cost


slide = register("slide", _Arguments, triton=slide_triton, reference=slide_torch, fake=_allocate)
