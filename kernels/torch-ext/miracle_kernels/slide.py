"""slide: the sliding code's encoder, Viterbi or an exact draw, one program per piece of the stream.

A node is the L - k bits that two neighboring windows share; a step goes from node `state >> k` to node
`state & (2^(L-k) - 1)`. Even pieces of the stream run past both their ends by a margin, in which the
surviving paths merge, and keep their middle; odd pieces then join their neighbors' nodes. Pieces cost no
bits, and the format knows of none.
"""

# What Triton's language means by these operators is not what its stubs say.
# pyright: reportOperatorIssue=false

from typing import Optional

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
from .noise import SLIDE, gumbel
from .registration import register
from .tuning import memory_share, resident_programs, tiles

MAX_WINDOW_BITS = 16
SELECTIONS = ("best", "sample")
# Survivors merge within a few window lengths; at sixteen the error equals that of one undivided search
# to 0.02 % (benchmarks/rate_distortion.py, "pieces").
_MERGE_WINDOWS = 16
# Margins then add a tenth to the work of L = 12, k = 2.
_PIECE_STEPS = 2048
_UNREACHED = tl.constexpr(1e30)
# No candidate is larger: the last quantile is 4.33.
_LARGEST_CANDIDATE = tl.constexpr(4.5)


@triton.jit
def _step_costs(
    table_ptr, quadratic_ptr, linear_ptr, weight, n_weights, state,
    L: tl.constexpr, V: tl.constexpr, QUADRATIC: tl.constexpr,
):  # fmt: skip
    """quadratic · z² - linear · z of the candidates of `state` at one step, above the least possible."""
    cost = tl.zeros(state.shape, tl.float32)
    for v in range(V):
        within = weight + v < n_weights
        quadratic = tl.load(quadratic_ptr + (weight + v) * QUADRATIC, mask=within, other=0.0)
        linear = tl.load(linear_ptr + weight + v, mask=within, other=0.0)
        z = tl.load(table_ptr + (v << L) + state).to(tl.float32)
        # Subtracting the least cost of any candidate keeps float32 sums over thousands of steps small.
        slope = tl.abs(linear)
        convex = quadratic * (2 * _LARGEST_CANDIDATE) > slope
        at = tl.where(convex, slope / tl.where(convex, 2 * quadratic, 1.0), _LARGEST_CANDIDATE)
        cost += z * (quadratic * z - linear) + at * (slope - quadratic * at)
    return cost


@triton.jit
def _relax(
    reached_ptr, table_ptr, quadratic_ptr, linear_ptr, weight, n_weights, node, step, piece, seed,
    L: tl.constexpr, K: tl.constexpr, V: tl.constexpr, QUADRATIC: tl.constexpr,
    SAMPLE: tl.constexpr, TILE_BRANCHES: tl.constexpr,
):  # fmt: skip
    """Best (or drawn) way into each node: its cost, or -2 log of the sum of all ways, and its branch."""
    overlap: tl.constexpr = L - K
    best = tl.full(node.shape, 3e38, tl.float32)
    choice = tl.zeros(node.shape, tl.int32)
    largest = tl.full(node.shape, -3e38, tl.float32)
    total = tl.zeros(node.shape, tl.float32)
    for first in range(0, 1 << K, TILE_BRANCHES):
        branch = first + tl.arange(0, TILE_BRANCHES)
        state = (branch[:, None] << overlap) + node[None, :]
        cost = tl.load(reached_ptr + (state >> K))
        cost += _step_costs(table_ptr, quadratic_ptr, linear_ptr, weight, n_weights, state, L, V, QUADRATIC)
        if SAMPLE:
            log_weight = -0.5 * cost
            above = tl.maximum(largest, tl.max(log_weight, axis=0))
            total = total * tl.exp(largest - above) + tl.sum(tl.exp(log_weight - above[None, :]), axis=0)
            largest = above
            cost -= 2 * gumbel(seed, state, step, piece, SLIDE)
        tile_best, tile_choice = tl.min(cost, axis=0, return_indices=True)
        better = tile_best < best
        best = tl.where(better, tile_best, best)
        choice = tl.where(better, first + tile_choice, choice)
    if SAMPLE:
        best = -2 * (largest + tl.log(total))
    return best, choice


@triton.jit
def _last_node(
    reached_ptr, length, piece, seed, NODES: tl.constexpr, SAMPLE: tl.constexpr, TILE_NODES: tl.constexpr
):
    """The cheapest final node, or one drawn in proportion to exp(-cost / 2)."""
    best = tl.full([], 3e38, tl.float32)
    last = tl.full([], 0, tl.int64)
    for first in range(0, NODES, TILE_NODES):
        node = first + tl.arange(0, TILE_NODES)
        cost = tl.load(reached_ptr + node)
        if SAMPLE:
            cost -= 2 * gumbel(seed, node, length, piece, SLIDE)
        tile_best, at = tl.min(cost, axis=0, return_indices=True)
        last = tl.where(tile_best < best, (first + at).to(tl.int64), last)
        best = tl.minimum(tile_best, best)
    return last


@triton.jit(do_not_specialize=["n_weights", "n_steps", "n_pieces", "first_piece", "margin", "stride", "seed"])
def _slide_kernel(
    states_ptr,  # [n_steps] int32, written; odd pieces read their neighbors' ends
    branches_ptr,  # [programs, stride, NODES] uint8 or int16, scratch: the branch taken into each node
    reached_ptr,  # [programs, 2, NODES] float32, scratch
    table_ptr,  # [V, 2^L] float16
    quadratic_ptr,  # [n_weights] float32, or [1]
    linear_ptr,  # [n_weights] float32
    n_weights, n_steps, n_pieces, first_piece, margin, stride, seed,
    L: tl.constexpr, K: tl.constexpr, V: tl.constexpr, QUADRATIC: tl.constexpr,
    JOIN: tl.constexpr,  # odd pieces, which start and end at their neighbors' nodes
    SAMPLE: tl.constexpr, TILE_NODES: tl.constexpr, TILE_BRANCHES: tl.constexpr,
):  # fmt: skip
    NODES: tl.constexpr = 1 << (L - K)
    program = tl.program_id(0).to(tl.int64)
    piece = 2 * (first_piece + program) + JOIN
    start, stop = n_steps * piece // n_pieces, n_steps * (piece + 1) // n_pieces
    run_start = tl.maximum(start - margin, 0) if not JOIN else start
    length = (tl.minimum(stop + margin, n_steps) if not JOIN else stop) - run_start
    branches_ptr += program * stride * NODES
    reached_ptr += program * 2 * NODES
    first = tl.full([], -1, tl.int64)
    last = tl.full([], -1, tl.int64)
    if JOIN:
        first = tl.load(states_ptr + start - 1).to(tl.int64) & (NODES - 1)
        if stop < n_steps:
            last = tl.load(states_ptr + stop).to(tl.int64) >> K
    for tile in range(0, NODES, TILE_NODES):
        node = tile + tl.arange(0, TILE_NODES)
        tl.store(reached_ptr + node, tl.where((first < 0) | (node == first), 0.0, _UNREACHED))
    for step in range(length):
        # Every thread must see the costs that all threads wrote before it reads them.
        tl.debug_barrier()
        source, target = reached_ptr + (step % 2) * NODES, reached_ptr + ((step + 1) % 2) * NODES
        for tile in range(0, NODES, TILE_NODES):
            node = tile + tl.arange(0, TILE_NODES)
            cost, choice = _relax(
                source, table_ptr, quadratic_ptr, linear_ptr, (run_start + step) * V, n_weights, node,
                step, piece, seed, L, K, V, QUADRATIC, SAMPLE, TILE_BRANCHES,
            )  # fmt: skip
            tl.store(target + node, cost)
            tl.store(branches_ptr + step * NODES + node, choice.to(branches_ptr.dtype.element_ty))
    tl.debug_barrier()
    if last < 0:
        last = _last_node(reached_ptr + (length % 2) * NODES, length, piece, seed, NODES, SAMPLE, TILE_NODES)
    for back in range(length):
        step = length - 1 - back
        branch = tl.load(branches_ptr + step * NODES + last).to(tl.int64)
        state = (branch << (L - K)) | last
        at = run_start + step
        tl.store(states_ptr + at, state.to(tl.int32), mask=(at >= start) & (at < stop))
        last = state >> K


@triton.jit(do_not_specialize=["n_steps", "n_bytes"])
def _pack_kernel(
    message_ptr,  # [n_bytes] uint8
    states_ptr,  # [n_steps] int32
    n_steps, n_bytes, L: tl.constexpr, K: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Bit p < L of the message is the first state's; bit L + k·t + r is the r-th that state t + 1 adds."""
    byte = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    place = tl.arange(0, 8)
    bit = byte[:, None] * 8 + place[None, :] - (L - K)
    step = tl.where(bit < 0, 0, bit // K)
    state = tl.load(states_ptr + step, mask=step < n_steps, other=0)
    value = (state >> (K - 1 - (bit - step * K)).to(tl.int32)) & 1
    packed = tl.sum(value << (7 - place)[None, :], axis=1)
    tl.store(message_ptr + byte, packed.to(tl.uint8), mask=byte < n_bytes)


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


@on_its_device
def slide_triton(
    quadratic: Tensor,
    linear: Tensor,
    table: Tensor,
    window_bits: int,
    step_bits: int,
    step_weights: int,
    selection: str,
    seed: int,
) -> tuple[Tensor, Tensor]:
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
    _check(quadratic, linear, table, window_bits, step_bits, step_weights, selection, seed)
    check_launch("slide", linear)
    n_weights, n_steps = linear.numel(), -(-linear.numel() // step_weights)
    states = linear.new_empty(n_steps, dtype=torch.int32)
    message, cost = _allocate(quadratic, linear, table, window_bits, step_bits, step_weights, selection, seed)
    if n_weights == 0:
        return message, cost.zero_()
    by_weight = table.T.contiguous()
    code = {"L": window_bits, "V": step_weights, "QUADRATIC": int(quadratic.numel() > 1)}
    _search(states, by_weight, quadratic, linear, step_bits, selection == "sample", seed, code)
    tile = tiles("slide", linear.device)["TILE_MESSAGE"]
    _pack_kernel[(triton.cdiv(message.numel(), tile),)](
        message,
        states,
        n_steps,
        message.numel(),
        L=window_bits,
        K=step_bits,
        TILE=tile,
        enable_fp_fusion=True,
    )
    tile = tiles("slide", linear.device)["TILE_COST"]
    sums = linear.new_empty(triton.cdiv(n_weights, tile))
    _cost_kernel[(sums.numel(),)](
        sums, states, by_weight, quadratic, linear, n_weights, TILE=tile, enable_fp_fusion=True, **code
    )
    return message, sums.sum(dtype=torch.float64)


def _search(
    states: Tensor, table: Tensor, quadratic: Tensor, linear: Tensor, step_bits: int, sample: bool, seed: int,
    code: dict[str, int],
) -> None:  # fmt: skip
    """Fill in the states, even pieces first, as many at a time as the scratch memory allows."""
    device, n_steps, window_bits = linear.device, states.numel(), code["L"]
    nodes = 1 << (window_bits - step_bits)
    tile = tiles("slide", device, window_bits=window_bits, step_bits=step_bits)
    tile_nodes = min(nodes, tile["TILE_NODES"])
    tile_branches = min(1 << step_bits, max(1, tile["TILE_NODES"] // tile_nodes))
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
            _slide_kernel[(min(n_programs, n_parity - first),)](
                states, branches, reached, table, quadratic, linear, linear.numel(), n_steps, n_pieces,
                first, margin, stride, seed, K=step_bits, JOIN=int(join), SAMPLE=sample,
                TILE_NODES=tile_nodes, TILE_BRANCHES=tile_branches, num_warps=tile["num_warps"], num_stages=1,
                enable_fp_fusion=True, **code,
            )  # fmt: skip


def count_pieces(n_steps: int, margin: int, wanted: int) -> int:
    """Pieces of at most 2,048 steps, more of them where a GPU would stand idle, but each two margins long.

    Two margins are also more steps than it takes to get from any node to any other.
    """
    enough = -(-n_steps // _PIECE_STEPS)
    return max(1, enough, min(wanted, n_steps // (2 * margin)))


def slide_torch(
    quadratic: Tensor,
    linear: Tensor,
    table: Tensor,
    window_bits: int,
    step_bits: int,
    step_weights: int,
    selection: str,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """The reference of `slide`: one undivided search. Draws come from torch's generator, so they differ."""
    _check(quadratic, linear, table, window_bits, step_bits, step_weights, selection, seed)
    n_weights = linear.numel()
    n_steps = -(-n_weights // step_weights)
    padding = (0, n_steps * step_weights - n_weights)
    by_step = (n_steps, 1, step_weights)
    quadratics = torch.nn.functional.pad(quadratic.expand(n_weights), padding).view(by_step)
    linears = torch.nn.functional.pad(linear, padding).view(by_step)
    generator = torch.Generator(linear.device).manual_seed(seed % 2**63) if selection == "sample" else None
    states = _path_torch(quadratics, linears, table.float(), step_bits, generator)
    z = table[states].float().view(by_step)
    cost = (z * (quadratics * z - linears)).sum(dtype=torch.float64)
    return pack_torch(states, window_bits, step_bits), cost


def _path_torch(
    quadratics: Tensor, linears: Tensor, z: Tensor, step_bits: int, generator: Optional[torch.Generator]
) -> Tensor:
    """States int64 `[n_steps]` of the path of least cost, or of a drawn one if there is a generator."""
    n_states = z.shape[0]
    nodes = n_states >> step_bits
    state = torch.arange(n_states, device=z.device).view(-1, nodes)
    reached = z.new_zeros(nodes)
    choices = state.new_empty((linears.shape[0], nodes))
    for step, (quadratic, linear) in enumerate(zip(quadratics, linears)):
        cost = reached[state >> step_bits] + (z * (quadratic * z - linear)).sum(1).view(-1, nodes)
        reached, choices[step] = _minimum_torch(cost, generator)
    _, node = _minimum_torch(reached.view(-1, 1), generator)
    states = state.new_empty(linears.shape[0])
    for step in reversed(range(linears.shape[0])):
        states[step] = choices[step, node] * nodes + node
        node = states[step : step + 1] >> step_bits
    return states


def _minimum_torch(cost: Tensor, generator: Optional[torch.Generator]) -> tuple[Tensor, Tensor]:
    """Over the rows: the least cost and where, or -2 log Σ exp(-cost / 2) and a row drawn accordingly."""
    if generator is None:
        least, index = cost.min(dim=0)
        return least, index
    exponential = torch.empty_like(cost).exponential_(generator=generator)
    return -2 * torch.logsumexp(-0.5 * cost, dim=0), (-0.5 * cost - exponential.log()).argmax(dim=0)


def pack_torch(states: Tensor, window_bits: int, step_bits: int) -> Tensor:
    """States → message, uint8; the last byte is filled with zero bits. The reference of `_pack_kernel`."""
    if states.numel() == 0:
        return states.new_empty(0, dtype=torch.uint8)
    places = torch.arange(window_bits - 1, -1, -1, device=states.device)
    head = states[:1, None] >> places[: window_bits - step_bits]
    tail = states[:, None] >> places[window_bits - step_bits :]
    bits = torch.cat((head.flatten(), tail.flatten())) & 1
    bits = torch.nn.functional.pad(bits, (0, -bits.numel() % 8)).view(-1, 8)
    return (bits << torch.arange(7, -1, -1, device=states.device)).sum(1).to(torch.uint8)


def _allocate(
    quadratic: Tensor, linear: Tensor, table: Tensor, window_bits: int, step_bits: int, step_weights: int,
    selection: str, seed: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    n_bytes = message_bytes(linear.shape[0], window_bits, step_bits, step_weights)
    return linear.new_empty(n_bytes, dtype=torch.uint8), linear.new_empty((), dtype=torch.float64)


def _check(
    quadratic: Tensor, linear: Tensor, table: Tensor, window_bits: int, step_bits: int, step_weights: int,
    selection: str, seed: int,
) -> None:  # fmt: skip
    op = "slide"
    check_code(op, window_bits, step_bits, step_weights)
    check_range(op, "window_bits", window_bits, 1, MAX_WINDOW_BITS)
    check_range(op, "step_bits (select encodes the block code)", step_bits, 1, window_bits - 1)
    check_range(op, "seed", seed, -(2**63), 2**63 - 1)
    check_choice(op, "selection", selection, SELECTIONS)
    check_tensor(op, "linear", linear, (torch.float32,), linear)
    check_size(op, "linear", linear.ndim, 1, "dimension")
    check_tensor(op, "quadratic", quadratic, (torch.float32,), linear)
    check_size(op, "quadratic", quadratic.ndim, 1, "dimension")
    expected = 1 if quadratic.numel() == 1 else linear.numel()
    check_size(op, "quadratic", quadratic.numel(), expected, "entries, or 1")
    check_table(op, table, window_bits, step_weights, linear, quantiles=False)


slide = register("slide", triton=slide_triton, reference=slide_torch, fake=_allocate)
