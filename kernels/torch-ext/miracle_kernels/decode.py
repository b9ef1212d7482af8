"""decode: message → weights in one pass: window, candidate, scale, rotation, mean, cast, digest."""

# What Triton's language means by these operators is not what its stubs say.
# pyright: reportOperatorIssue=false, reportGeneralTypeIssues=false

from typing import Optional

import torch
from torch import Tensor

from ._triton import check_launch, on_its_device, tl, triton
from .candidates import philox_halves_torch
from .casting import rounded
from .checks import (
    MAX_COLUMNS,
    check_code,
    check_message,
    check_range,
    check_size,
    check_stream,
    check_table,
    check_tensor,
    check_width,
)
from .digest import digest_torch, mixed_words
from .registration import register
from .rotation import hadamard_torch, rotate
from .tuning import resident_programs, tiles


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


@triton.jit(do_not_specialize=["n_bytes", "first_row", "band_columns", "seed", "stream_id", "first_index"])
def _decode_kernel(
    out_ptr,  # [n_rows, columns] float32, bfloat16 or float16
    digests_ptr,  # [programs] int64, if WITH_DIGEST
    message_ptr,  # [n_bytes] uint8
    table_ptr,  # STEPS: [2^L] integers of 16·V bits; else [2^L, V] candidates or [65536] quantiles, float16
    scales_ptr,  # [rows] or [1] bfloat16
    mean_ptr,  # [n_rows, columns] float32, if HAS_MEAN
    n_bytes, rows, n_rows, first_row, columns, band_columns, seed, stream_id, first_index,
    L: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    STEPS: tl.constexpr,  # of a group that is read as one word; 0: every weight finds its own window
    FROM_TABLE: tl.constexpr, SHARED_TABLE: tl.constexpr, ROW_SCALES: tl.constexpr,
    HAS_MEAN: tl.constexpr, WITH_DIGEST: tl.constexpr, ROTATION: tl.constexpr,
    TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr,
):  # fmt: skip
    across = tl.cdiv(columns, TILE_COLUMNS)
    n_tiles = tl.cast(tl.cdiv(n_rows, TILE_ROWS), tl.int64) * across
    digest = tl.zeros([TILE_ROWS, TILE_COLUMNS], tl.uint64)
    table = tl.load(table_ptr + tl.arange(0, 1 << L)) if SHARED_TABLE else 0
    for tile in range(tl.program_id(0).to(tl.int64), n_tiles, tl.num_programs(0)):
        out_row = tile // across * TILE_ROWS + tl.arange(0, TILE_ROWS).to(tl.int64)
        row = out_row + first_row
        tile_column = (tile % across).to(tl.int32)
        column = tile_column * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
        mask = (out_row < n_rows)[:, None] & (column < columns)[None, :]
        z = coded_candidates(
            message_ptr, n_bytes, table_ptr, table, row, tile_column, rows, columns, band_columns, seed,
            stream_id, L, K, V, STEPS, FROM_TABLE, SHARED_TABLE, TILE_COLUMNS,
        )  # fmt: skip
        scale = tl.load(scales_ptr + row * ROW_SCALES, mask=out_row < n_rows, other=0.0).to(tl.float32)
        # The product is exact (11 significant bits times 8), so fused and unfused sums agree.
        weight = rotate(z.to(tl.float32) * scale[:, None], ROTATION)
        position = out_row[:, None] * columns + column[None, :]
        if HAS_MEAN:
            weight += tl.load(mean_ptr + position, mask=mask, other=0.0)
        if WITH_DIGEST:
            index = position + first_row.to(tl.int64) * columns + first_index
            digest += tl.where(mask, mixed_words(weight, index), tl.zeros_like(digest))
        tl.store(out_ptr + position, rounded(weight, out_ptr.dtype.element_ty), mask=mask)
    if WITH_DIGEST:
        total = tl.sum(tl.sum(digest.to(tl.int64, bitcast=True), axis=1), axis=0)
        tl.store(digests_ptr + tl.program_id(0), total)


@on_its_device
def decode_triton(
    out: Tensor,
    message: Tensor,
    table: Tensor,
    scales: Tensor,
    mean: Optional[Tensor],
    rows: int,
    first_row: int,
    window_bits: int,
    step_bits: int,
    step_weights: int,
    seed: int,
    stream_id: int,
    rotation: int,
    band_columns: int,
    first_index: int,
    with_digest: bool,
) -> Tensor:
    """Fill `out` with rows first_row, first_row + 1, … of a stream's matrix; returns their digest.

    Args:
        out: float32, bfloat16 or float16 `[n_rows, columns]`; cast last, round to nearest even.
        message: uint8 `[bytes]` of the whole stream.
        table: float16 `[2^window_bits, step_weights]` of candidates (see `codebook`), or the
            quantile table `[65536]`, from which candidates are generated on the fly.
        scales: bfloat16 `[rows]` or `[1]`, each 0 or within [2⁻⁶⁴, 2⁶⁴].
        mean: float32 `[n_rows, columns]` to add after the rotation, or None.
        rows: of the whole stream.
        rotation: width of the Hadamard groups of columns; 1 is none.
        band_columns: width of the bands in which the stream reads the matrix; 0 is row-major.
        first_index: row-major position of the stream's first weight in its tensor, for the digest.

    Returns:
        int64 `[]`: the digest of the float32 weights (signed), 0 unless `with_digest`.

    Raises:
        KernelInputError: a tensor or a number is not as said.
        KernelUnavailableError: there is no Triton, or no GPU.

    Source: FORMAT.md, "Weights".
    """
    _check(
        out, message, table, scales, mean, rows, first_row, window_bits, step_bits, step_weights, seed,
        stream_id, rotation, band_columns, first_index, with_digest,
    )  # fmt: skip
    check_launch("decode", out)
    n_rows, columns = out.shape
    steps = path_steps(table, window_bits, step_bits, step_weights, columns, band_columns)
    shape, options = _tile_options(out, table, steps, step_weights, rotation, with_digest)
    n_tiles = triton.cdiv(n_rows, shape["TILE_ROWS"]) * triton.cdiv(columns, shape["TILE_COLUMNS"])
    n_programs = min(n_tiles, resident_programs(out.device, options.pop("programs_per_processor")))
    digests = out.new_zeros(max(1, n_programs), dtype=torch.int64)
    if n_tiles:
        _decode_kernel[(n_programs,)](
            out, digests, message, as_entries(table) if steps else table, scales, mean,
            message.numel(), rows, n_rows, first_row, columns, band_columns, seed, stream_id, first_index,
            L=window_bits, K=step_bits, V=step_weights, STEPS=steps, FROM_TABLE=table.ndim == 2,
            ROW_SCALES=int(scales.numel() > 1), HAS_MEAN=mean is not None, WITH_DIGEST=with_digest,
            ROTATION=rotation, enable_fp_fusion=False, **shape, **options,
        )  # fmt: skip
    return digests.sum()


def path_steps(
    table: Tensor, window_bits: int, step_bits: int, step_weights: int, columns: int, band_columns: int
) -> int:
    """Steps per group of the fast path, 0 for the general one."""
    if table.ndim == 1 or band_columns not in (0, columns):
        return 0
    return group_steps(window_bits, step_bits, step_weights, columns)


def _tile_options(
    out: Tensor, table: Tensor, steps: int, step_weights: int, rotation: int, with_digest: bool
) -> tuple[dict[str, int], dict[str, int]]:
    """Tile sizes and where the table lies; launch options."""
    tile = tiles("decode", out.device, steps=steps, with_digest=int(with_digest))
    largest = tile["TILE"] if steps else tile["TILE_GENERAL"]
    width = tile_columns(out.shape[1], max(rotation, steps * step_weights, 16), largest)
    shared = fits_shared_memory(table, steps, tile)
    shape = {"TILE_ROWS": max(1, largest // width), "TILE_COLUMNS": width, "SHARED_TABLE": shared}
    return shape, {name: tile[name] for name in ("num_warps", "programs_per_processor")}


def decode_torch(
    out: Tensor,
    message: Tensor,
    table: Tensor,
    scales: Tensor,
    mean: Optional[Tensor],
    rows: int,
    first_row: int,
    window_bits: int,
    step_bits: int,
    step_weights: int,
    seed: int,
    stream_id: int,
    rotation: int,
    band_columns: int,
    first_index: int,
    with_digest: bool,
) -> Tensor:
    """The reference of `decode`."""
    _check(
        out, message, table, scales, mean, rows, first_row, window_bits, step_bits, step_weights, seed,
        stream_id, rotation, band_columns, first_index, with_digest,
    )  # fmt: skip
    n_rows, columns = out.shape
    row = torch.arange(first_row, first_row + n_rows, device=out.device)[:, None]
    column = torch.arange(columns, device=out.device)[None, :]
    first = column // band_columns * band_columns if band_columns else column * 0
    width = (columns - first).clamp(max=band_columns or columns)
    position = first * rows + row * width + column - first  # [n_rows, columns], in the stream
    step, v = position // step_weights, position % step_weights
    state = windows_torch(message, step * step_bits, window_bits)
    z = _look_up_torch(table, state, v, seed, stream_id)
    scale = scales.float() if scales.numel() == 1 else scales.float()[first_row : first_row + n_rows, None]
    weights = hadamard_torch(z.float() * scale, rotation)
    if mean is not None:
        weights = weights + mean
    out.copy_(weights)
    return digest_torch(weights, first_index + first_row * columns) if with_digest else state.new_zeros(())


def _look_up_torch(table: Tensor, state: Tensor, v: Tensor, seed: int, stream_id: int) -> Tensor:
    """Candidate v of each state, from a table of candidates or by way of Philox from the quantiles."""
    if table.ndim == 2:
        return table[state, v]
    halves = philox_halves_torch((state.flatten(), (v // 8).flatten(), stream_id, 0), seed)
    return table[halves.gather(1, (v % 8).view(-1, 1))].view(state.shape)


def fits_shared_memory(table: Tensor, steps: int, tile: dict[str, int]) -> bool:
    """Whether the fast path copies the table to shared memory instead of reading it through the cache."""
    return steps > 0 and table.numel() * table.element_size() <= tile["largest_shared_bytes"]


def windows_torch(message: Tensor, bits: Tensor, window_bits: int) -> Tensor:
    """int64 windows that start at the int64 positions `bits`, most significant bit first."""
    word, last = torch.zeros_like(bits), message.numel() - 1
    for i in range(4):
        byte = (bits >> 3) + i
        word = (word << 8) | message[byte.clamp(max=last)].long() * (byte <= last)
    return (word >> (32 - window_bits - (bits & 7))) & ((1 << window_bits) - 1)


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


def tile_columns(columns: int, smallest: int, largest: int) -> int:
    """The widest power of two in [smallest, largest] that covers the columns with the least waste."""
    widths = [smallest]
    while widths[-1] < min(largest, columns):
        widths.append(2 * widths[-1])
    return min(reversed(widths), key=lambda width: -(-columns // width) * width)


def _fake(out: Tensor, *rest: object) -> Tensor:
    return out.new_empty((), dtype=torch.int64)


def _check(
    out: Tensor, message: Tensor, table: Tensor, scales: Tensor, mean: Optional[Tensor],
    rows: int, first_row: int, window_bits: int, step_bits: int, step_weights: int,
    seed: int, stream_id: int, rotation: int, band_columns: int, first_index: int, with_digest: bool,
) -> None:  # fmt: skip
    op = "decode"
    check_code(op, window_bits, step_bits, step_weights)
    check_stream(op, seed, stream_id)
    check_tensor(op, "out", out, (torch.float32, torch.bfloat16, torch.float16), out)
    check_size(op, "out", out.ndim, 2, "dimensions")
    n_rows, columns = out.shape
    check_range(op, "first_row", first_row, 0, rows - n_rows)
    check_range(op, "band_columns", band_columns, 0, 2**31 - 1)
    check_range(op, "columns of out", columns, 1, MAX_COLUMNS)
    check_width(op, rotation, columns)
    check_tensor(op, "message", message, (torch.uint8,), out)
    check_message(op, message, rows * columns, window_bits, step_bits, step_weights)
    check_table(op, table, window_bits, step_weights, out)
    check_tensor(op, "scales", scales, (torch.bfloat16,), out)
    check_size(op, "scales", scales.numel(), 1 if scales.numel() == 1 else rows, "entries, or 1")
    if mean is not None:
        check_tensor(op, "mean", mean, (torch.float32,), out)
        check_size(op, "mean", mean.numel(), out.numel(), "entries")


decode = register("decode", triton=decode_triton, reference=decode_torch, fake=_fake, mutates=("out",))
