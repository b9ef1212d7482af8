"""The search of the sliding code's encoder inside a kernel, and the same in torch: one piece of the stream.

A node is the L - k bits that two neighboring windows share; a step goes from node `state >> k` to node
`state & (2^(L-k) - 1)`. Forward, the best way into each node is kept (Viterbi), or the sum over all ways and
one drawn in proportion; backward, the path is read off.

A tile of nodes is `[sources, targets]`: the targets of a source lie side by side, in one thread, which so
reads a source once, and candidates and costs as words of 16 bytes.
"""

# What Triton's language means by these operators is not what its stubs say.
# pyright: reportOperatorIssue=false

from typing import Optional

import torch
from torch import Tensor

from ._triton import tl, triton
from .noise import SLIDE, gumbel

_UNREACHED = tl.constexpr(1e30)
# No candidate is larger: the last quantile is 4.33.
_LARGEST_CANDIDATE = tl.constexpr(4.5)


@triton.jit
def _nodes(first_node, K: tl.constexpr, TILE_NODES: tl.constexpr):
    """Nodes of a tile, int32 `[sources, targets]`, the first of every source alone and all of them."""
    targets: tl.constexpr = (1 << K) if (1 << K) < TILE_NODES else TILE_NODES
    head = first_node + tl.arange(0, TILE_NODES // targets) * targets
    return head, head[:, None] + tl.arange(0, targets)[None, :]


@triton.jit
def _states(
    first_branch, first_node, L: tl.constexpr, K: tl.constexpr,
    TILE_NODES: tl.constexpr, TILE_BRANCHES: tl.constexpr,
):  # fmt: skip
    """Sources and states of the ways into a tile's nodes, int32 `[branches, sources, targets]`."""
    head, node = _nodes(first_node, K, TILE_NODES)
    branch = (first_branch + tl.arange(0, TILE_BRANCHES)) << (L - K)
    state = branch[:, None, None] + node[None, :, :]
    return tl.broadcast_to(((branch[:, None] + head[None, :]) >> K)[:, :, None], state.shape), state


@triton.jit
def _coefficients(quadratic_ptr, linear_ptr, weight, n_weights, QUADRATIC: tl.constexpr):
    """Quadratic and linear of a weight, and minus the least cost that any candidate may have there."""
    within = weight < n_weights
    quadratic = tl.load(quadratic_ptr + weight * QUADRATIC, mask=within, other=0.0)
    linear = tl.load(linear_ptr + weight, mask=within, other=0.0)
    slope = tl.abs(linear)
    convex = quadratic * (2 * _LARGEST_CANDIDATE) > slope
    at = tl.where(convex, slope / tl.where(convex, 2 * quadratic, 1.0), _LARGEST_CANDIDATE)
    return quadratic, linear, at * (slope - quadratic * at)


@triton.jit
def _kept_candidates(
    table_ptr, L: tl.constexpr, K: tl.constexpr, V: tl.constexpr, KEEP: tl.constexpr, TILE_NODES: tl.constexpr
):  # fmt: skip
    """Candidates of all states, a tensor for each weight of a step; none where they are not kept."""
    kept = ()
    if KEEP:
        _, state = _states(0, 0, L, K, TILE_NODES, 1 << K)
        for v in tl.static_range(V):  # pyright: ignore[reportGeneralTypeIssues]
            kept = kept + (tl.load(table_ptr + (v << L) + state).to(tl.float32),)
    return kept


@triton.jit
def _step_coefficients(
    quadratic_ptr, linear_ptr, weight, n_weights, V: tl.constexpr, QUADRATIC: tl.constexpr, KEEP: tl.constexpr
):  # fmt: skip
    """Quadratics and linears of a step, if they are kept; and minus the least that any state may cost."""
    quadratics, linears, least = (), (), tl.full([], 0.0, tl.float32)
    if KEEP:
        for v in tl.static_range(V):  # pyright: ignore[reportGeneralTypeIssues]
            quadratic, linear, own = _coefficients(
                quadratic_ptr, linear_ptr, weight + v, n_weights, QUADRATIC
            )
            quadratics, linears, least = quadratics + (quadratic,), linears + (linear,), least + own
    else:
        for v in range(V):
            _, _, own = _coefficients(quadratic_ptr, linear_ptr, weight + v, n_weights, QUADRATIC)
            least += own
    return quadratics, linears, least


@triton.jit
def _costs(
    reached_ptr, kept, quadratics, linears, table_ptr, quadratic_ptr, linear_ptr, weight, n_weights,
    source, state, L: tl.constexpr, V: tl.constexpr, QUADRATIC: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """Of every way of a tile: what its source has cost and what its state adds."""
    cost = tl.load(reached_ptr + source)
    if KEEP:
        for v in tl.static_range(V):  # pyright: ignore[reportGeneralTypeIssues]
            cost += kept[v] * (quadratics[v] * kept[v] - linears[v])
    else:
        for v in range(V):
            quadratic, linear, _ = _coefficients(quadratic_ptr, linear_ptr, weight + v, n_weights, QUADRATIC)
            z = tl.load(table_ptr + (v << L) + state).to(tl.float32)
            cost += z * (quadratic * z - linear)
    return cost


@triton.jit
def _relax(
    reached_ptr, kept, quadratics, linears, table_ptr, quadratic_ptr, linear_ptr, weight, n_weights,
    first_node, step, piece, seed,
    L: tl.constexpr, K: tl.constexpr, V: tl.constexpr, QUADRATIC: tl.constexpr, SAMPLE: tl.constexpr,
    KEEP: tl.constexpr, TILE_NODES: tl.constexpr, TILE_BRANCHES: tl.constexpr,
):  # fmt: skip
    """Best (or drawn) way into each node: its cost, or -2 log of the sum of all ways, and its branch."""
    targets: tl.constexpr = (1 << K) if (1 << K) < TILE_NODES else TILE_NODES
    best = tl.full([TILE_NODES // targets, targets], 3e38, tl.float32)
    choice, largest, total = tl.zeros(best.shape, tl.int32), -best, tl.zeros_like(best)
    for first in range(0, 1 << K, TILE_BRANCHES):
        source, state = _states(first, first_node, L, K, TILE_NODES, TILE_BRANCHES)
        cost = _costs(
            reached_ptr, kept, quadratics, linears, table_ptr, quadratic_ptr, linear_ptr, weight, n_weights,
            source, state, L, V, QUADRATIC, KEEP,
        )  # fmt: skip
        if SAMPLE:
            log_weight = -0.5 * cost
            above = tl.maximum(largest, tl.max(log_weight, axis=0))
            total = total * tl.exp(largest - above) + tl.sum(tl.exp(log_weight - above[None, :, :]), axis=0)
            largest = above
            cost -= 2 * gumbel(seed, state, step, piece, SLIDE)
        tile_best, tile_choice = tl.min(cost, axis=0, return_indices=True)
        if TILE_BRANCHES == 1 << K:
            best, choice = tile_best, tile_choice
        else:
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
def slide_kernel(
    states_ptr,  # [n_steps] int32, written; odd pieces read their neighbors' ends
    branches_ptr,  # [programs, stride, NODES] uint8 or int16, scratch: the branch taken into each node
    reached_ptr,  # [programs, 2, NODES] float32, scratch
    table_ptr,  # [V, 2^L] float16
    quadratic_ptr,  # [n_weights] float32, or [1]
    linear_ptr,  # [n_weights] float32
    n_weights, n_steps, n_pieces, first_piece, margin, stride, seed,
    L: tl.constexpr, K: tl.constexpr, V: tl.constexpr, QUADRATIC: tl.constexpr,
    JOIN: tl.constexpr,  # odd pieces, which start and end at their neighbors' nodes
    SAMPLE: tl.constexpr,
    KEEP: tl.constexpr,  # all candidates, in registers, over all steps
    TILE_NODES: tl.constexpr, TILE_BRANCHES: tl.constexpr,
):  # fmt: skip
    """One piece per program: even pieces with their margins, then (JOIN) the odd ones between their ends."""
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
    kept = _kept_candidates(table_ptr, L, K, V, KEEP, TILE_NODES)
    for step in range(length):
        weight = (run_start + step) * V
        quadratics, linears, least = _step_coefficients(
            quadratic_ptr, linear_ptr, weight, n_weights, V, QUADRATIC, KEEP
        )
        # Every thread must see the costs that all threads wrote before it reads them.
        tl.debug_barrier()
        source, target = reached_ptr + (step % 2) * NODES, reached_ptr + ((step + 1) % 2) * NODES
        for tile in range(0, NODES, TILE_NODES):
            cost, choice = _relax(
                source, kept, quadratics, linears, table_ptr, quadratic_ptr, linear_ptr, weight, n_weights,
                tile, step, piece, seed, L, K, V, QUADRATIC, SAMPLE, KEEP, TILE_NODES, TILE_BRANCHES,
            )  # fmt: skip
            _, node = _nodes(tile, K, TILE_NODES)
            # Without the least cost of any candidate, float32 sums over thousands of steps stay small.
            tl.store(target + node, cost + least)
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


def path_torch(
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
