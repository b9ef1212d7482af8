"""The encoder of overlapping windows: a Viterbi search, or an exact draw, over the bit-shift trellis.

A node is the L - k bits that two neighboring windows share; a step moves from node `state >> k`
to node `state & (2^(L-k) - 1)`. The stream is cut into pieces that are searched 16 at a time in
vector lanes and in parallel threads. Even pieces run past both their ends and keep their middle;
odd pieces then join their neighbors' nodes. No piece costs extra bits, and the format knows of none.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numba import njit

from miracle_hub.code import Code
from miracle_hub.coding.cpu import candidate_table, in_threads
from miracle_hub.coding.lanes import LANES, relax_node
from miracle_hub.coding.posterior import Cost

# Survivors merge within a few window lengths; at sixteen the error equals that of one undivided
# search to 0.02 %, at eight short pieces lost 0.3 % (benchmarks/rate_distortion.py, "pieces").
_MERGE_WINDOWS = 16
_PIECE_STEPS = 2048
_FULL_PIECES = 64
# A stream that goes on is one of many bands of a matrix, others of which are searched meanwhile: one thread
# of 16 lanes, even and odd, and margins of half the length. At 0.5 to 4 bits it costs, on average, 0.1 % less
# for bands of 1,536 rows of SmolLM2, 0.5 % more for 192 of them, 0.3 and 0.4 % for 384 of MiniLM, and takes
# 0.5 to 0.96 of the time. In bands of 64 rows of stories260K, of 256 steps at most, it would cost 2.8 %: they
# stay whole (benchmarks/bands.py, in which they are cut).
_BAND_MERGE_WINDOWS = 8
_FULL_BAND_PIECES = 32
_WHOLE_BAND_STEPS = 1024
# Back pointers of one group of 16 pieces; one group per thread is in memory.
_BACK_POINTER_BYTES = 64 << 20

# Longer steps are not worth a compiled variant of their own.
_CONSTANT_WEIGHTS = 9
_FREE = -1
# No candidate is larger: the last quantile is 4.33.
_LARGEST_CANDIDATE = np.float32(4.5)
_jit = njit(nogil=True, cache=True, error_model="numpy", fastmath=True)


@dataclass(frozen=True)
class Piece:
    """Steps [run_start, run_stop) are searched, [start, stop) are kept."""

    start: int
    stop: int
    run_start: int
    run_stop: int


def cut(n_steps: int, code: Code, is_band: bool = False) -> list[Piece]:
    """Pieces of nearly equal length; even ones run past their ends, odd ones do not."""
    windows = _BAND_MERGE_WINDOWS if is_band else _MERGE_WINDOWS
    merge = -(-windows * code.window_bits // code.step_bits)
    n_pieces = count_pieces(n_steps, code, merge, is_band)
    ends = [n_steps * i // n_pieces for i in range(n_pieces + 1)] if n_pieces else []
    pieces = []
    for i, (start, stop) in enumerate(zip(ends, ends[1:], strict=False)):
        margin = min(merge, n_steps) if i % 2 == 0 else 0
        pieces.append(Piece(start, stop, max(0, start - margin), min(n_steps, stop + margin)))
    return pieces


def count_pieces(n_steps: int, code: Code, merge: int, is_band: bool = False) -> int:
    """How many pieces bound the memory and fill the lanes.

    A piece is long enough to get from any node to any other. A stream of several pieces is cut
    into a multiple of 64 (two threads of 16 lanes, even and odd), a band into one of 32, where that leaves
    each two margins long, else as many as are: 8,192 weights in 36 pieces instead of 4 took a tenth of the
    time.
    """
    step_bytes = (2 * code.step_bits) << code.overlap_bits
    reach = -(-code.overlap_bits // code.step_bits)
    n_pieces = -(-n_steps // min(_PIECE_STEPS, max(_BACK_POINTER_BYTES // step_bytes, 2 * reach)))
    if n_pieces < 2 and not (is_band and n_steps > _WHOLE_BAND_STEPS):
        return n_pieces
    lanes = _FULL_BAND_PIECES if is_band else _FULL_PIECES
    full = max(1, round(n_pieces / lanes)) * lanes
    return full if n_steps // full >= 2 * merge else max(n_pieces, n_steps // (2 * merge or 1))


@_jit
def best_paths(codebook, quadratic, linear, offset, first, planes, constants, weights):
    """Viterbi recursion of 16 lanes; returns the final costs, float32 [nodes, 16].

    Lane l starts at node first[l], anywhere where that is -1. `constants` and `weights` are tuples of
    length k and V: lengths are constants to the compiler, which doubles the speed.
    """
    nodes = planes.shape[1]
    shape = (nodes, len(constants), len(weights) or codebook.shape[1])
    reached = np.empty((nodes, LANES), np.float32)
    scratch = np.empty((nodes, LANES), np.float32)
    for node in range(nodes):
        for lane in range(LANES):
            starts_here = first[lane] == _FREE or first[lane] == node
            reached[node, lane] = np.float32(0) if starts_here else np.float32(1e30)
    for step in range(quadratic.shape[0]):
        q, b, o = quadratic[step], linear[step], offset[step]
        for node in range(nodes):
            # numba passes the first parameter, its typing context, itself
            relax_node(reached, codebook, q, b, o, scratch, planes, step, node, shape)  # pyright: ignore[reportCallIssue]
        reached, scratch = scratch, reached
    return reached


@_jit
def sampled_paths(codebook, quadratic, linear, offset, first, planes, uniform_seed):
    """Forward filtering with sampled back pointers; returns log-sums as costs, float32 [nodes, 16].

    Every node draws its predecessor in proportion to the importance weight of all paths through
    it, so following the pointers back from a drawn final node is an exact draw of the path.
    """
    nodes, step_bits, width = planes.shape[1], planes.shape[2], codebook.shape[1]
    np.random.seed(uniform_seed)
    reached = np.empty((nodes, LANES), np.float64)
    scratch = np.empty((nodes, LANES), np.float64)
    for node in range(nodes):
        for lane in range(LANES):
            starts_here = first[lane] == _FREE or first[lane] == node
            reached[node, lane] = 0.0 if starts_here else -1e30
    log_weights = np.empty(1 << step_bits, np.float64)
    for step in range(quadratic.shape[0]):
        planes[step] = 0
        for node in range(nodes):
            for lane in range(LANES):
                largest = -1e300  # not infinity, which fast-math may not see
                for i in range(1 << step_bits):
                    state = i * nodes + node
                    cost = 0.0
                    for v in range(width):
                        z = codebook[state, v]
                        cost += z * (quadratic[step, v, lane] * z - linear[step, v, lane])
                    log_weights[i] = reached[state >> step_bits, lane] - 0.5 * cost
                    largest = max(largest, log_weights[i])
                total, choice = 0.0, 0
                for i in range(1 << step_bits):
                    weight = np.exp(log_weights[i] - largest)
                    total += weight
                    if np.random.random() * total < weight:
                        choice = i
                scratch[node, lane] = largest + np.log(total) - 0.5 * offset[step, lane]
                for bit in range(step_bits):
                    planes[step, node, bit] |= np.uint16(((choice >> bit) & 1) << lane)
        reached, scratch = scratch, reached
    return (-2.0 * reached).astype(np.float32)


@_jit
def least_costs(quadratic, linear, out):
    """The least cost that candidates can have at each step: adding it back keeps float32 sums small."""
    for step in range(out.shape[0]):
        for lane in range(LANES):
            total = np.float32(0)
            for v in range(quadratic.shape[1]):
                curvature, slope = quadratic[step, v, lane], abs(linear[step, v, lane])
                at = _LARGEST_CANDIDATE
                if 2 * at * curvature > slope:
                    at = slope / (2 * curvature)
                total += at * (slope - curvature * at)
            out[step, lane] = total


@_jit
def trace_back(planes, lane, last_node, overlap_bits, states):
    """Follow the back pointers of one lane from the node after its last step."""
    step_bits = planes.shape[2]
    node = np.int64(last_node)
    for step in range(states.shape[0] - 1, -1, -1):
        choice = np.int64(0)
        for bit in range(step_bits):
            choice |= ((np.int64(planes[step, node, bit]) >> lane) & 1) << bit
        state = (choice << overlap_bits) | node
        states[step] = state
        node = state >> step_bits


def _constant(step_weights: int) -> tuple[int, ...]:
    return (0,) * step_weights if step_weights < _CONSTANT_WEIGHTS else ()


class _Search:
    """One stream's search: its cost, its code and the states found so far."""

    def __init__(
        self, cost: Cost, code: Code, selection: str, rng: np.random.Generator, entry: int | None = None
    ) -> None:
        self.code, self.selection = code, selection
        self.entry = _FREE if entry is None else entry
        self.n_steps = code.steps(cost.linear.numel())
        self.codebook = candidate_table(code)
        self.quadratic = cost.quadratic.numpy()
        self.linear = cost.linear.numpy()
        self.states = np.zeros(self.n_steps, np.int64)
        self.pieces = cut(self.n_steps, code, is_band=entry is not None)
        self.seeds = rng.integers(0, 2**32, (2, len(self.pieces) // LANES + 1), np.uint32)

    def run(self) -> np.ndarray:
        """All states of the best (or a drawn) path, int64 [steps]."""
        for parity in (0, 1):
            pieces = self.pieces[parity::2]
            groups = [pieces[i : i + LANES] for i in range(0, len(pieces), LANES)]
            in_threads(self.group, zip(groups, self.seeds[parity].tolist(), strict=False))
        return self.states

    def group(self, pieces: list[Piece], seed: int) -> None:
        """Search up to 16 pieces and store the steps they keep."""
        code, length = self.code, max(piece.run_stop - piece.run_start for piece in pieces)
        quadratic, linear, offset = self.lane_coefficients(pieces, length)
        first = np.array([self.first_node(p) for p in pieces] + [_FREE] * (LANES - len(pieces)))
        planes = np.empty((length, 1 << code.overlap_bits, code.step_bits), np.uint16)
        if self.selection == "best":
            bits, weights = (0,) * code.step_bits, _constant(code.step_weights)
            final = best_paths(self.codebook, quadratic, linear, offset, first, planes, bits, weights)
        else:
            final = sampled_paths(self.codebook, quadratic, linear, offset, first, planes, seed)
        draw = np.random.default_rng(seed)
        for lane, piece in enumerate(pieces):
            n_steps = piece.run_stop - piece.run_start
            last = self.last_node(piece)
            if last == _FREE:
                last, n_steps = self.choose(final[:, lane], draw), length
            states = np.empty(n_steps, np.int64)
            trace_back(planes, lane, last, code.overlap_bits, states)
            kept = slice(piece.start - piece.run_start, piece.stop - piece.run_start)
            self.states[piece.start : piece.stop] = states[kept]

    def lane_coefficients(
        self, pieces: list[Piece], length: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """quadratic, linear [length, step_weights, 16] and offset [length, 16]; zero past a piece's end."""
        width, n_weights = self.code.step_weights, self.linear.size
        quadratic = np.zeros((length * width, LANES), np.float32)
        linear = np.zeros((length * width, LANES), np.float32)
        for lane, piece in enumerate(pieces):
            start, stop = piece.run_start * width, min(piece.run_stop * width, n_weights)
            quadratic[: stop - start, lane] = self.quadratic[start:stop]
            linear[: stop - start, lane] = self.linear[start:stop]
        by_step, offset = (length, width, LANES), np.empty((length, LANES), np.float32)
        quadratic, linear = quadratic.reshape(by_step), linear.reshape(by_step)
        least_costs(quadratic, linear, offset)
        return quadratic, linear, offset

    def first_node(self, piece: Piece) -> int:
        """The node to start from: the entry, or, for an odd piece, the node where its left neighbor ended."""
        if piece.start == 0:
            return self.entry
        if piece.run_start != piece.start:
            return _FREE
        return int(self.states[piece.start - 1]) & ((1 << self.code.overlap_bits) - 1)

    def last_node(self, piece: Piece) -> int:
        """The node that an odd piece must reach: where its right neighbor starts."""
        if piece.run_stop != piece.stop or piece.stop == self.n_steps:
            return _FREE
        return int(self.states[piece.stop]) >> self.code.step_bits

    def choose(self, costs: np.ndarray, draw: np.random.Generator) -> int:
        """The cheapest final node, or one drawn in proportion to exp(-cost/2)."""
        if self.selection == "best":
            return int(costs.argmin())
        return int((draw.gumbel(size=costs.size) - 0.5 * costs).argmax())


def encode_sliding(
    cost: Cost, code: Code, selection: str, generator: torch.Generator | None, entry: int | None = None
) -> np.ndarray:
    """States of a stream, int64 [steps]; see `encode.encode_stream`.

    Args:
        entry: the node to start from, if the stream goes on where another part of it ended.
    """
    seed = torch.randint(2**62, (), generator=generator).item() if generator else 0
    return _Search(cost, code, selection, np.random.default_rng(int(seed)), entry).run()
