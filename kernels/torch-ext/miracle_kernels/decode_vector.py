"""decode_linear for one row of x: y = x·Wᵀ on tensor cores, and no digit of x is lost.

A tensor core multiplies float16 and sums float32. Candidates are float16; x is cut into three parts of 11
bits, x = unit · (p₀ + 2⁻¹¹·p₁ + 2⁻²²·p₂), which take three of the eight columns that the smallest product
has in any case. So one instruction multiplies and sums what would take each thread eight conversions and
eight multiply-adds, and sums across threads.
"""

# What Triton's language means by these operators is not what its stubs say.
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false
# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false

from typing import Any

import torch
from torch import Tensor

from ._triton import tl, triton
from .casting import rounded
from .rotation import rotate
from .tuning import resident_programs, tiles
from .windows import (
    aligned_words,
    as_entries,
    coded_candidates,
    fits_shared_memory,
    group_bits,
    group_candidates,
    group_words,
    tile_columns,
    whole_words,
    wide_steps,
    words_of_row,
)

# Of the matrix instruction m16n8k16: its rows, and the threads that hold a row's weights.
_ROWS, _THREADS = 16, 4
# Columns of the smallest product of matrix instructions, of which three are taken; AMD's have 16.
_PARTS = 16 if torch.version.hip else 8
# Columns that share a unit, at least; a choice: 8 per thread of four warps.
_UNIT = 1024


@triton.jit
def _split_kernel(
    parts_ptr,  # [3, padded] float16
    units_ptr,  # [padded / TILE] float32, a power of two per tile
    x_ptr,  # [columns]
    columns, padded, ROTATION: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """x·H in three parts over a power of two that keeps it within [-1, 1]; 0 past the columns."""
    column = tl.program_id(0) * TILE + tl.arange(0, TILE)
    x = tl.load(x_ptr + column, mask=column < columns, other=0.0).to(tl.float32)
    x = tl.reshape(rotate(x[None, :], ROTATION, 0), [TILE])
    # The exponent field alone, one higher: a power of two above the largest. 2^-126 … 2^127.
    largest = tl.max(tl.abs(x), axis=0)
    exponent = tl.minimum(tl.maximum((largest.to(tl.int32, bitcast=True) >> 23) + 1, 1), 253)
    tl.store(units_ptr + tl.program_id(0), (exponent << 23).to(tl.float32, bitcast=True))
    x *= ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    for part in tl.static_range(3):
        digits = x.to(tl.float16)
        tl.store(parts_ptr + part * padded + column, digits)
        x = (x - digits.to(tl.float32)) * 2048.0


@triton.jit
def _parts(
    parts_ptr, padded, first,
    CHUNKS: tl.constexpr, GROUP: tl.constexpr, RUN: tl.constexpr, WARPS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """float16 `[WARPS, columns of a warp, PARTS]`: x as the second factor, in the order of `_weights`.

    Read so that neighbors of a group are neighbors in one thread. The last part fills the columns of x that
    there are no parts for: that takes no mask, and no other memory.
    """
    PIECE: tl.constexpr = 8 if GROUP > 8 else GROUP  # of float16: up to 16 bytes
    chunk = tl.arange(0, CHUNKS)[:, None, None, None, None]
    warp = tl.arange(0, WARPS)[None, :, None, None, None]
    part = tl.minimum(tl.arange(0, PARTS), 2)[None, None, :, None, None]
    group = tl.arange(0, 4)[None, None, None, :, None]
    column = ((warp * CHUNKS + chunk) * 4 + group) * GROUP + tl.arange(0, PIECE)[None, None, None, None, :]
    at = parts_ptr + first + (part * tl.cast(padded, tl.int64) + column)
    x = tl.load(at)
    if GROUP == 16:
        x = tl.permute(tl.join(x, tl.load(at + 8)), [0, 1, 2, 3, 5, 4])
    x = tl.reshape(x, [CHUNKS, WARPS, PARTS, 4, GROUP // RUN, RUN])
    return tl.reshape(tl.permute(x, [1, 0, 4, 3, 5, 2]), [WARPS, CHUNKS * 4 * GROUP, PARTS])


@triton.jit
def _weights(
    bits, mask, table_ptr, table,
    L: tl.constexpr, K: tl.constexpr, V: tl.constexpr, STEPS: tl.constexpr, RUN: tl.constexpr,
    SHARED_TABLE: tl.constexpr,
):  # fmt: skip
    """float16 `[WARPS, 16, columns of a warp]` of bits `[CHUNKS, 2, WARPS, 8, 4]`: candidates as the first
    factor. Its columns are permuted so that the thread that has a group's bits has its weights."""
    CHUNKS: tl.constexpr = bits.shape[0]
    WARPS: tl.constexpr = bits.shape[2]
    GROUP: tl.constexpr = STEPS * V
    z = group_candidates(bits, mask, table_ptr, table, L, K, V, STEPS, SHARED_TABLE)
    z = tl.permute(tl.reshape(z, [CHUNKS, 2, WARPS, 8, 4, GROUP // RUN, RUN]), [2, 1, 3, 0, 5, 4, 6])
    return tl.reshape(z, [WARPS, 16, CHUNKS * 4 * GROUP])


@triton.jit(do_not_specialize=["window_mask"])
def _product_kernel(
    y_ptr,  # [rows]
    parts_ptr, units_ptr,  # of _split_kernel
    message_ptr, table_ptr, scales_ptr,  # as in decode
    window_mask, rows, columns, padded,
    L: tl.constexpr, K: tl.constexpr, V: tl.constexpr, STEPS: tl.constexpr, WORDS: tl.constexpr,
    WHOLE_WORDS: tl.constexpr, SHARED_TABLE: tl.constexpr, ROW_SCALES: tl.constexpr,
    UNIT: tl.constexpr, CHUNKS: tl.constexpr, TILE_COLUMNS: tl.constexpr, WARPS: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """Sixteen rows per tile; warps share out their columns, TILE_COLUMNS at a time."""
    GROUPS: tl.constexpr = TILE_COLUMNS // (STEPS * V)
    # Neighbors that lie in one thread as the compiler arranges factors, which it does by how they come about
    # (Triton 3.9); any other number costs a selection and half a shuffle per weight and nothing else.
    RUN: tl.constexpr = 4 if V == 4 else 2
    table = tl.load(table_ptr + tl.arange(0, 1 << L)) if SHARED_TABLE else 0
    words_ptr, before = aligned_words(message_ptr)
    # Axes that the compiler lays out as the matrix instruction wants: registers, warps, threads.
    chunk, warp = tl.arange(0, CHUNKS)[:, None, None, None, None], tl.arange(0, WARPS)
    group = (warp[None, None, :, None, None] * CHUNKS + chunk) * 4
    group += tl.arange(0, 4)[None, None, None, None, :]
    in_tile = tl.arange(0, 2)[None, :, None, None, None] * 8 + tl.arange(0, 8)[None, None, None, :, None]
    for tile in range(tl.program_id(0), (rows - 1) // 16 + 1, tl.num_programs(0)):
        first_row = tile * 16
        # Past the last row the last one stands for all, and is not written.
        row = (first_row + tl.minimum(in_tile, rows - 1 - first_row)).to(tl.int64)
        total = tl.zeros([WARPS, 16, PARTS], tl.float32)
        for across in range(tl.cdiv(columns, TILE_COLUMNS)):
            ahead = tl.cast(across, tl.int64)
            if WHOLE_WORDS:
                start = row * words_of_row(columns, K, V) + ahead * (GROUPS * STEPS * K // 32)
                shift = before.to(tl.int32)
            else:
                bit = row * (tl.cast(columns // V, tl.int64) * K) + ahead * (GROUPS * STEPS * K) + before
                start, shift = bit >> 5, (bit & 31).to(tl.int32)
            # Past the last column the last group stands for all, times 0.
            place = tl.minimum(group, columns // (STEPS * V) - 1 - across * GROUPS)
            bits = group_bits(words_ptr, start, shift + place * (STEPS * K), (STEPS - 1) * K + L, WORDS)
            z = _weights(bits, window_mask, table_ptr, table, L, K, V, STEPS, RUN, SHARED_TABLE)
            x = _parts(parts_ptr, padded, across * TILE_COLUMNS, CHUNKS, STEPS * V, RUN, WARPS, PARTS)
            unit = tl.load(units_ptr + (across * WARPS + warp) * (TILE_COLUMNS // WARPS) // UNIT)
            total += tl.dot(z, x) * unit[:, None, None]
        part = tl.arange(0, PARTS)[None, None, :]
        factor = tl.where(part == 0, 1.0, tl.where(part == 1, 2.0**-11, 2.0**-22))
        y = tl.sum(tl.sum(tl.where(part < 3, total * factor, 0.0), axis=2), axis=0)
        row, mask = first_row + tl.arange(0, 16), tl.arange(0, 16) < rows - first_row
        y *= tl.load(scales_ptr + row * ROW_SCALES, mask=mask, other=0.0).to(tl.float32)
        tl.store(y_ptr + row, rounded(y, y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["n_bytes", "band_columns", "seed", "stream_id"])
def _vector_kernel(
    y_ptr,  # [rows]
    x_ptr,  # [columns], rotated
    message_ptr, table_ptr, scales_ptr,  # as in decode
    n_bytes, rows, columns, band_columns, seed, stream_id,
    L: tl.constexpr, K: tl.constexpr, V: tl.constexpr, FROM_TABLE: tl.constexpr, ROW_SCALES: tl.constexpr,
    TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Any code and order, where every weight finds its own window; in float32 throughout."""
    for tile in range(tl.program_id(0), tl.cdiv(rows, TILE_ROWS), tl.num_programs(0)):
        row = tl.cast(tile, tl.int64) * TILE_ROWS + tl.arange(0, TILE_ROWS)
        total = tl.zeros([TILE_ROWS, TILE_COLUMNS], tl.float32)
        for across in range(tl.cdiv(columns, TILE_COLUMNS)):
            column = across * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
            x = tl.load(x_ptr + column, mask=column < columns, other=0.0).to(tl.float32)
            z = coded_candidates(
                message_ptr, n_bytes, 0, table_ptr, 0, tl.minimum(row, rows - 1), across, rows, columns,
                band_columns, seed, stream_id, L, K, V, 0, False, FROM_TABLE, False, TILE_COLUMNS,
            )  # fmt: skip
            total += z.to(tl.float32) * x[None, :]
        scale = tl.load(scales_ptr + row * ROW_SCALES, mask=row < rows, other=0.0).to(tl.float32)
        y = tl.sum(total, axis=1) * scale
        tl.store(y_ptr + row, rounded(y, y_ptr.dtype.element_ty), mask=row < rows)


@triton.jit
def _rotate_vector_kernel(
    rotated_ptr,  # [columns] float32
    x_ptr,  # [columns]
    columns, ROTATION: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """x·H of one row."""
    column = tl.program_id(0) * TILE + tl.arange(0, TILE)
    x = tl.load(x_ptr + column, mask=column < columns, other=0.0).to(tl.float32)
    rotated = tl.reshape(rotate(x[None, :], ROTATION, 0), [TILE])
    tl.store(rotated_ptr + column, rotated, mask=column < columns)


def launch(
    y: Tensor, x: Tensor, coded: tuple[Tensor, Tensor, Tensor], sizes: tuple[int, ...], rotation: int,
    code: tuple[int, int, int],
) -> None:  # fmt: skip
    """y = x·Wᵀ for x of one row.

    Args:
        coded: message, table, scales.
        sizes: rows, columns, band_columns, seed and stream_id.
        code: window_bits, step_bits, step_weights.
    """
    steps = wide_steps(coded[1], *code, *sizes[1:3])
    options = dict(zip("LKV", code)) | {"ROW_SCALES": int(coded[2].numel() > 1)}
    if steps:
        _product(y, x, coded, sizes[:2], rotation, options | {"STEPS": steps})
    else:
        _general(y, x, coded, sizes, rotation, options)


def _product(
    y: Tensor, x: Tensor, coded: tuple[Tensor, Tensor, Tensor], shape: tuple[int, ...], rotation: int,
    options: dict[str, Any],
) -> None:  # fmt: skip
    (rows, columns), (message, table, scales) = shape, coded
    tile = tiles("decode_linear", x.device, batch=1)
    warps, steps, (bits, step_bits, v) = (
        tile["num_warps"],
        options["STEPS"],
        (options[name] for name in "LKV"),
    )
    least = warps * _THREADS * steps * v
    width = max(least, min(tile["TILE"] // _ROWS, triton.next_power_of_2(columns)))
    unit = max(rotation, _UNIT, width)
    padded = triton.cdiv(columns, unit) * unit
    parts, units = (
        x.new_empty((3, padded), dtype=torch.float16),
        x.new_empty(padded // unit, dtype=torch.float32),
    )
    _split_kernel[(padded // unit,)](
        parts, units, x, columns, padded, ROTATION=rotation, TILE=unit, enable_fp_fusion=True
    )
    whole = whole_words(step_bits, v, columns, width)
    programs = min(triton.cdiv(rows, _ROWS), resident_programs(x.device, tile["programs_per_processor"]))
    _product_kernel[(programs,)](
        y, parts, units, message, as_entries(table), scales, (1 << bits) - 1, rows, columns, padded,
        WORDS=group_words(bits, step_bits, v, steps, columns), WHOLE_WORDS=whole,
        SHARED_TABLE=fits_shared_memory(table, steps, tile), UNIT=unit, CHUNKS=width // least,
        TILE_COLUMNS=width, WARPS=warps, PARTS=_PARTS, num_warps=warps, num_stages=1,
        enable_fp_fusion=True, **options,
    )  # fmt: skip


def _general(
    y: Tensor, x: Tensor, coded: tuple[Tensor, Tensor, Tensor], sizes: tuple[int, ...], rotation: int,
    options: dict[str, Any],
) -> None:  # fmt: skip
    (rows, columns), (message, table, scales) = sizes[:2], coded
    tile = tiles("decode_linear", x.device, batch=1)
    if rotation > 1:
        x, given = torch.empty_like(x, dtype=torch.float32), x
        step = max(rotation, _UNIT)
        _rotate_vector_kernel[(triton.cdiv(columns, step),)](
            x, given, columns, ROTATION=rotation, TILE=step, enable_fp_fusion=True
        )
    width = tile_columns(columns, 16, tile["TILE_GENERAL"])
    height = max(1, tile["TILE_GENERAL"] // width)
    programs = min(triton.cdiv(rows, height), resident_programs(x.device, tile["programs_per_processor"]))
    _vector_kernel[(programs,)](
        y, x, message, table, scales, message.numel(), *sizes, FROM_TABLE=table.ndim == 2,
        TILE_ROWS=height, TILE_COLUMNS=width, num_warps=tile["num_warps"], enable_fp_fusion=True, **options,
    )  # fmt: skip
