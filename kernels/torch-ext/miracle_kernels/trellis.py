"""The search of the sliding code's encoder inside a kernel, and the same in torch: one piece of the stream.

A node is the L - k bits that two neighboring windows share; a step goes from node `state >> k` to node
`state & (2^(L-k) - 1)`. Forward, the best way into each node is kept (Viterbi), or the sum over all ways and
one drawn in proportion; backward, the path is read off.
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
    SAMPLE: tl.constexpr, TILE_NODES: tl.constexpr, TILE_BRANCHES: tl.constexpr,
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
