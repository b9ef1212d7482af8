"""From message to candidates: windows of bits, and what they stand for, inside a kernel and in torch.

Two paths lead to a candidate. Where rows are whole groups of steps, one pair of words serves a group, and a
table entry holds the V candidates of a state. Anywhere else every weight finds its own window.
"""

# What Triton's language means by these operators is not what its stubs say.
# pyright: reportOperatorIssue=false

import torch
from torch import Tensor

from ._triton import tl, triton
from .candidates import philox_halves_torch


@triton.jit
def _bits_from(message_ptr, n_bytes, bit):
    """At least 33 bits of the message from `bit` on, as the highest bits of a uint64.

    They come from two aligned words. Messages start anywhere; the words at their ends hold up to three
    bytes of what lies beside them.
    """
    address = message_ptr.to(tl.int64)
    before = (address % 4) * 8
    words_ptr = (address - address % 4).to(tl.pointer_type(tl.uint32))
    at = (bit + before) >> 5
    last = (before + n_bytes.to(tl.int64) * 8 - 1) >> 5
    high = _big_endian(tl.load(words_ptr + at, mask=at <= last, other=0))
    low = _big_endian(tl.load(words_ptr + at + 1, mask=at < last, other=0))
    pair = (high.to(tl.uint64) << 32) | low.to(tl.uint64)
    return pair << ((bit + before) & 31).to(tl.uint64)


@triton.jit
def _big_endian(word):
    """A little-endian uint32 with its bytes in the message's order."""
    return (word << 24) | ((word << 8) & 0xFF0000) | ((word >> 8) & 0xFF00) | (word >> 24)


@triton.jit
def _grouped_candidates(
    message_ptr, n_bytes, table_ptr, table, row, group, columns,
    L: tl.constexpr, K: tl.constexpr, V: tl.constexpr, STEPS: tl.constexpr, SHARED_TABLE: tl.constexpr,
):  # fmt: skip
    """float16 `[TILE_ROWS, GROUPS · STEPS · V]`, where every row is a whole number of groups of STEPS steps.

    One pair of words serves a group: (STEPS - 1)·K + L ≤ 33. The V candidates of a state are one
    table entry.
    """
    # An argument of 1 is a number to the compiler, without methods: cast, not .to.
    bit = row[:, None] * (tl.cast(columns // V, tl.int64) * K) + group[None, :].to(tl.int64) * (STEPS * K)
    bits = _bits_from(message_ptr, n_bytes, bit)
    shift = (64 - L - tl.arange(0, STEPS) * K)[None, None, :]
    state = (bits[:, :, None] >> shift.to(tl.uint64)).to(tl.int32) & ((1 << L) - 1)
    if SHARED_TABLE:
        entry = tl.reshape(tl.gather(table, tl.reshape(state, [state.numel]), 0), state.shape)
    else:
        entry = tl.load(table_ptr + state)
    shift = (tl.arange(0, V) * 16)[None, None, None, :]
    z = (entry[:, :, :, None] >> shift.to(entry.dtype)).to(tl.int16).to(tl.float16, bitcast=True)
    return tl.reshape(z, [state.shape[0], state.shape[1] * STEPS * V])


@triton.jit
def _stream_positions(row, column, rows, columns, band_columns):
    """Where the stream holds the elements (row, column): bands of columns, row by row inside a band."""
    if band_columns == 0:
        position = row * columns + column
    else:
        # Past the last column widths would be negative, and with them positions.
        column = tl.minimum(column, columns - 1)
        first = column // band_columns * band_columns
        width = tl.minimum(band_columns, columns - first)
        position = first.to(tl.int64) * rows + row * width + (column - first)
    return position


@triton.jit
def _half(w0, w1, w2, w3, v):
    """The 16-bit half v mod 8 of four words."""
    low = tl.where((v & 4) == 0, w0, w2)
    high = tl.where((v & 4) == 0, w1, w3)
    word = tl.where((v & 2) == 0, low, high)
    return (word >> ((v & 1) * 16).to(tl.uint32)) & 0xFFFF


@triton.jit
def _indices(
    message_ptr, n_bytes, row, column, rows, columns, band_columns, seed, stream_id,
    L: tl.constexpr, K: tl.constexpr, V: tl.constexpr, FROM_TABLE: tl.constexpr,
):  # fmt: skip
    """Positions in the candidate table, or by way of Philox in the quantiles, for any code and order."""
    position = _stream_positions(row[:, None], column[None, :], rows, columns, band_columns)
    step = position // V
    v = (position - step * V).to(tl.int32)
    state = (_bits_from(message_ptr, n_bytes, step * K) >> (64 - L)).to(tl.uint32)
    if FROM_TABLE:
        index = state.to(tl.int64) * V + v
    else:
        zero = state * 0
        group = (v >> 3).to(tl.uint32)
        w0, w1, w2, w3 = tl.philox(seed, state, group, zero + stream_id.to(tl.uint32), zero)
        index = _half(w0, w1, w2, w3, v).to(tl.int32)
    return index


@triton.jit
def coded_candidates(
    message_ptr, n_bytes, table_ptr, table, row, tile_column, rows, columns, band_columns, seed, stream_id,
    L: tl.constexpr, K: tl.constexpr, V: tl.constexpr, STEPS: tl.constexpr, FROM_TABLE: tl.constexpr,
    SHARED_TABLE: tl.constexpr, TILE_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Candidates float16 `[TILE_ROWS, TILE_COLUMNS]` of a stream's matrix; past its edges, any numbers."""
    if STEPS:
        groups: tl.constexpr = TILE_COLUMNS // (STEPS * V)
        group = tile_column * groups + tl.arange(0, groups)
        z = _grouped_candidates(
            message_ptr, n_bytes, table_ptr, table, row, group, columns, L, K, V, STEPS, SHARED_TABLE
        )
    else:
        column = tile_column * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
        index = _indices(
            message_ptr, n_bytes, row, column, rows, columns, band_columns, seed, stream_id,
            L, K, V, FROM_TABLE,
        )  # fmt: skip
        z = tl.load(table_ptr + index)
    return z


def path_steps(
    table: Tensor, window_bits: int, step_bits: int, step_weights: int, columns: int, band_columns: int
) -> int:
    """Steps per group of the fast path, 0 for the general one."""
    if table.ndim == 1 or band_columns not in (0, columns):
        return 0
    return group_steps(window_bits, step_bits, step_weights, columns)


def group_steps(window_bits: int, step_bits: int, step_weights: int, columns: int) -> int:
    """Steps that one pair of words serves, where rows are whole groups of them; 0 where there are none.

    The V candidates of a state are read as one integer, so V is 1, 2 or 4.
    """
    if step_weights not in (1, 2, 4):
        return 0
    fitting = (steps for steps in (8, 4, 2, 1) if (steps - 1) * step_bits + window_bits <= 33)
    return next((steps for steps in fitting if columns % (steps * step_weights) == 0), 0)


def as_entries(table: Tensor) -> Tensor:
    """Candidates float16 `[states, V]` as one little-endian integer of 16·V bits per state."""
    integer = {1: torch.int16, 2: torch.int32, 4: torch.int64}[table.shape[1]]
    return table.view(integer).view(-1)


def fits_shared_memory(table: Tensor, steps: int, tile: dict[str, int]) -> bool:
    """Whether the fast path copies the table to shared memory instead of reading it through the cache."""
    return steps > 0 and table.numel() * table.element_size() <= tile["largest_shared_bytes"]


def tile_columns(columns: int, smallest: int, largest: int) -> int:
    """The widest power of two in [smallest, largest] that covers the columns with the least waste."""
    widths = [smallest]
    while widths[-1] < min(largest, columns):
        widths.append(2 * widths[-1])
    return min(reversed(widths), key=lambda width: -(-columns // width) * width)


def windows_torch(message: Tensor, bits: Tensor, window_bits: int) -> Tensor:
    """int64 windows that start at the int64 positions `bits`, most significant bit first."""
    word, last = torch.zeros_like(bits), message.numel() - 1
    for i in range(4):
        byte = (bits >> 3) + i
        word = (word << 8) | message[byte.clamp(max=last)].long() * (byte <= last)
    return (word >> (32 - window_bits - (bits & 7))) & ((1 << window_bits) - 1)


def candidates_torch(table: Tensor, state: Tensor, v: Tensor, seed: int, stream_id: int) -> Tensor:
    """Candidate v of each state, from a table of candidates or by way of Philox from the quantiles."""
    if table.ndim == 2:
        return table[state, v]
    halves = philox_halves_torch((state.flatten(), (v // 8).flatten(), stream_id, 0), seed)
    return table[halves.gather(1, (v % 8).view(-1, 1))].view(state.shape)
