"""From message to candidates: windows of bits, and what they stand for, inside a kernel and in torch.

Two paths lead to a candidate. Where rows are whole groups of steps, a few words serve a group, and a
table entry holds the V candidates of a state. Anywhere else every weight finds its own window.
"""

# What Triton's language means by these operators is not what its stubs say.
# pyright: reportOperatorIssue=false, reportGeneralTypeIssues=false, reportAssignmentType=false

import torch
from torch import Tensor

from ._triton import tl, triton
from .candidates import philox_halves_torch


@triton.jit
def aligned_words(message_ptr):
    """The aligned words that hold the message, and the bit of the first where it starts.

    Messages start anywhere; the words at their ends hold up to three bytes of what lies beside them.
    """
    address = message_ptr.to(tl.int64)
    return (address - address % 4).to(tl.pointer_type(tl.uint32)), (address % 4) * 8


@triton.jit
def _big_endian(word):
    """A little-endian uint32 with its bytes in the message's order."""
    return (word << 24) | ((word << 8) & 0xFF0000) | ((word >> 8) & 0xFF00) | (word >> 24)


@triton.jit
def _shifted(high, low, shift):
    """Of the 64 bits of two words, the 32 that begin at `shift` < 32, as uint64."""
    return (((high.to(tl.uint64) << 32) | low.to(tl.uint64)) << shift.to(tl.uint64)) >> 32


@triton.jit
def _bits_from(message_ptr, n_bytes, bit):
    """At least 33 bits of the message from `bit` on, as the highest bits of a uint64."""
    words_ptr, before = aligned_words(message_ptr)
    at, last = (bit + before) >> 5, (before + n_bytes.to(tl.int64) * 8 - 1) >> 5
    high = _big_endian(tl.load(words_ptr + at, mask=at <= last, other=0))
    low = _big_endian(tl.load(words_ptr + at + 1, mask=at < last, other=0))
    pair = (high.to(tl.uint64) << 32) | low.to(tl.uint64)
    return pair << ((bit + before) & 31).to(tl.uint64)


@triton.jit
def group_bits(words_ptr, start, within, BITS: tl.constexpr, WORDS: tl.constexpr):
    """BITS bits of the message from word `start` + bit `within` on, as the highest bits of a uint64.

    Args:
        start: int64 places of words.
        within: int32 bits from there on; all of the BITS bits are the message's.
        WORDS: 2 gives 33 bits at least, 40 where all bits are whole bytes; 3 gives 64.
    """
    at, shift = words_ptr + start + (within >> 5), within & 31
    # A word is read only where some of the bits are in it, so nothing outside the message is.
    first, second = _big_endian(tl.load(at)), _next_word(at + 1, shift, BITS - 32)
    if WORDS == 2:
        bits = ((first.to(tl.uint64) << 32) | second.to(tl.uint64)) << shift.to(tl.uint64)
    else:
        third = _next_word(at + 2, shift, BITS - 64)
        bits = (_shifted(first, second, shift) << 32) | _shifted(second, third, shift)
    return bits


@triton.jit
def words_of_row(columns, K: tl.constexpr, V: tl.constexpr):
    """Whole 32-bit words of a row, in 32 bits, which its bits may not fit."""
    steps = columns // V
    return steps // 32 * K + steps % 32 * K // 32


@triton.jit
def _next_word(at, shift, BITS: tl.constexpr):
    """The word at `at`; where `shift` bits and BITS more do not reach it, any number."""
    if BITS > 0:
        word = tl.load(at)
    else:
        word = tl.load(at, mask=shift > -BITS)
    return _big_endian(word)


@triton.jit
def _windows(bits, K: tl.constexpr, STEPS: tl.constexpr):
    """uint64 `[*shape, 2, 2, …]`, STEPS of them: the bits from every K-th on, as the highest.

    Joined and not broadcast: so all windows of a group are in the thread that has its bits.
    """
    for level in tl.static_range(5):
        if (2 << level) <= STEPS:
            bits = tl.join(bits, bits << (K * (STEPS >> (level + 1))))
    return bits


@triton.jit
def _shared_entries(table, windows, mask, L: tl.constexpr):
    """Entries of a table that every program copies to shared memory; of 64 bits as two of 32, joined.

    The address of an entry is the window times the entry's bytes: bits that stand in the message already,
    only further to the left. One shift and one mask find it, if the compiler does not know the mask; else
    it makes the window first, and then the address.
    """
    SHIFT: tl.constexpr = 1 if table.dtype.primitive_bitwidth == 16 else 2
    address = (windows >> (64 - L - SHIFT)).to(tl.int32) & (mask << SHIFT)
    index = tl.reshape(address >> SHIFT, [address.numel])
    if table.dtype.primitive_bitwidth == 64:
        # Halves of a 64-bit entry would be cut out and put together again, one by one.
        low = tl.gather(table.to(tl.int32), index, 0)
        high = tl.gather((table >> 32).to(tl.int32), index, 0)
        entry = tl.join(tl.reshape(low, address.shape), tl.reshape(high, address.shape))
    else:
        entry = tl.reshape(tl.gather(table, index, 0), address.shape)
    return entry


@triton.jit
def group_candidates(
    bits, mask, table_ptr, table,
    L: tl.constexpr, K: tl.constexpr, V: tl.constexpr, STEPS: tl.constexpr, SHARED_TABLE: tl.constexpr,
):  # fmt: skip
    """float16 `[*shape, 2, 2, …]`, STEPS · V of them: the candidates of a group's states.

    The V candidates of a state are one table entry. Of a shared table of float32, which has V = 1, they are
    float32.

    Args:
        mask: 2^L - 1.
    """
    windows = _windows(bits, K, STEPS)
    if SHARED_TABLE:
        entry = _shared_entries(table, windows, mask, L)
    else:
        entry = tl.load(table_ptr + (windows >> (64 - L)).to(tl.int32))
        if V == 4:
            entry = tl.join(entry.to(tl.int32), (entry >> 32).to(tl.int32))
    if V > 1:
        entry = tl.join(entry.to(tl.int16), (entry >> 16).to(tl.int16))
    return entry if entry.dtype == tl.float32 else entry.to(tl.float16, bitcast=True)


@triton.jit
def _grouped_candidates(
    message_ptr, mask, table_ptr, table, row, tile_column, columns,
    L: tl.constexpr, K: tl.constexpr, V: tl.constexpr, STEPS: tl.constexpr, WHOLE_WORDS: tl.constexpr,
    SHARED_TABLE: tl.constexpr, TILE_COLUMNS: tl.constexpr,
):  # fmt: skip
    """`[TILE_ROWS, TILE_COLUMNS]`, where every row is a whole number of groups of STEPS steps."""
    GROUPS: tl.constexpr = TILE_COLUMNS // (STEPS * V)
    TILE_BITS: tl.constexpr = TILE_COLUMNS // V * K
    words_ptr, before = aligned_words(message_ptr)
    # An argument of 1 is a number to the compiler, without methods: cast, not .to.
    if WHOLE_WORDS:  # then shifts are the same in all tiles, and computed once
        start = row.to(tl.int64) * words_of_row(columns, K, V) + tl.cast(tile_column, tl.int64) * (
            TILE_BITS // 32
        )
        within = tl.zeros_like(row).to(tl.int32) + before.to(tl.int32)
    else:
        bit = row.to(tl.int64) * (tl.cast(columns // V, tl.int64) * K) + before
        bit += tl.cast(tile_column, tl.int64) * TILE_BITS
        start, within = bit >> 5, (bit & 31).to(tl.int32)
    # Past the last column the last group stands for all.
    group = tl.minimum(tl.arange(0, GROUPS), columns // (STEPS * V) - 1 - tile_column * GROUPS)
    within = within[:, None] + group[None, :] * (STEPS * K)
    bits = group_bits(words_ptr, start[:, None], within, (STEPS - 1) * K + L, 2)
    z = group_candidates(bits, mask, table_ptr, table, L, K, V, STEPS, SHARED_TABLE)
    return tl.reshape(z, [row.shape[0], TILE_COLUMNS])


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
    message_ptr, n_bytes, mask, table_ptr, table, row, tile_column, rows, columns, band_columns, seed,
    stream_id, L: tl.constexpr, K: tl.constexpr, V: tl.constexpr, STEPS: tl.constexpr,
    WHOLE_WORDS: tl.constexpr, FROM_TABLE: tl.constexpr, SHARED_TABLE: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Candidates float16 `[TILE_ROWS, TILE_COLUMNS]` of a stream's matrix; past its columns, any numbers.

    Args:
        mask: 2^L - 1, which the compiler must not know.
        row: each below `rows`.
    """
    if STEPS:
        z = _grouped_candidates(
            message_ptr, mask, table_ptr, table, row, tile_column, columns,
            L, K, V, STEPS, WHOLE_WORDS, SHARED_TABLE, TILE_COLUMNS,
        )  # fmt: skip
    else:
        column = tile_column * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
        index = _indices(
            message_ptr, n_bytes, row.to(tl.int64), column, rows, columns, band_columns, seed, stream_id,
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


def wide_steps(
    table: Tensor, window_bits: int, step_bits: int, step_weights: int, columns: int, band_columns: int
) -> int:
    """Steps of the widest groups of 16, 8 or 4 weights whose bits fit 64; 0 where rows are not whole ones."""
    if table.ndim == 1 or band_columns not in (0, columns) or step_weights not in (1, 2, 4):
        return 0
    fitting = (steps for steps in (16 // step_weights, 8 // step_weights, 4 // step_weights))
    fitting = (steps for steps in fitting if (steps - 1) * step_bits + window_bits <= 64)
    return next((steps for steps in fitting if columns % (steps * step_weights) == 0), 0)


def group_words(window_bits: int, step_bits: int, step_weights: int, steps: int, columns: int) -> int:
    """Words that hold the bits of a group, wherever it begins: of two, 33 bits are left at the worst place,
    40 where groups and rows are whole bytes."""
    whole_bytes = steps * step_bits % 8 == 0 and columns // step_weights * step_bits % 8 == 0
    return 2 if (steps - 1) * step_bits + window_bits <= (40 if whole_bytes else 33) else 3


def whole_words(step_bits: int, step_weights: int, columns: int, tile_columns: int) -> bool:
    """Whether every row and every tile's part of one is a whole number of 32-bit words."""
    return all(width % step_weights == 0 and width // step_weights * step_bits % 32 == 0
               for width in (columns, tile_columns))  # fmt: skip


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
