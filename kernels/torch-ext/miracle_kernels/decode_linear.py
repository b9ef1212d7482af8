"""decode_linear: y = x·Wᵀ straight from the message; the weights exist in registers only.

W = (scale ∘ z)·H with H the rotation, which is symmetric, so y = (x·H)·zᵀ ∘ scale: the input is rotated
instead of the weights, and each row's scale is applied once, to the sum.
"""

# What Triton's language means by these operators is not what its stubs say.
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false

from typing import NamedTuple

import torch
from torch import Tensor

from ._triton import check_launch, on_its_device, tl, triton
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
from .decode import decode_torch
from .decode_vector import launch as launch_vector
from .registration import register, takes
from .rotation import rotate
from .tuning import resident_programs, tiles
from .windows import (
    as_entries,
    coded_candidates,
    fits_shared_memory,
    path_steps,
    tile_columns,
    whole_words,
)

MAX_BATCH = 64
# Rows that the reference decodes at a time.
_REFERENCE_ROWS = 256


@triton.jit(do_not_specialize=["batch"])
def _rotate_kernel(
    rotated_ptr,  # [BATCH, columns] float16, rows past `batch` are written too
    unit_ptr,  # [BATCH] float32, a power of two per row
    x_ptr,  # [batch, columns]
    batch, columns, ROTATION: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """x·H over a power of two that keeps it within [-1, 1], where float16 has the most digits."""
    row = tl.program_id(0).to(tl.int64)
    at = row * columns
    filled = tl.where(row < batch, columns, 0)
    largest = tl.zeros([], tl.float32)
    for first in range(0, columns, TILE):
        column = first + tl.arange(0, TILE)
        x = tl.load(x_ptr + at + column, mask=column < filled, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.max(tl.abs(rotate(x[None, :], ROTATION, 0)), axis=1).sum(0))
    # The exponent field alone, one higher: a power of two above the largest. 2^-126 … 2^127.
    exponent = tl.minimum(tl.maximum((largest.to(tl.int32, bitcast=True) >> 23) + 1, 1), 253)
    unit = (exponent << 23).to(tl.float32, bitcast=True)
    inverse = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    tl.store(unit_ptr + row, unit)
    for first in range(0, columns, TILE):
        column = first + tl.arange(0, TILE)
        x = tl.load(x_ptr + at + column, mask=column < filled, other=0.0).to(tl.float32)
        x = tl.reshape(rotate(x[None, :], ROTATION, 0), [TILE])
        tl.store(rotated_ptr + at + column, (x * inverse).to(tl.float16), mask=column < columns)


@triton.jit(do_not_specialize=["n_bytes", "window_mask", "batch", "band_columns", "seed", "stream_id"])
def _matrix_kernel(
    y_ptr,  # [batch, rows]
    rotated_ptr, unit_ptr,  # of _rotate_kernel
    message_ptr, table_ptr, scales_ptr,  # as in decode
    n_bytes, window_mask, batch, rows, columns, band_columns, seed, stream_id,
    L: tl.constexpr, K: tl.constexpr, V: tl.constexpr, STEPS: tl.constexpr, WHOLE_WORDS: tl.constexpr,
    FROM_TABLE: tl.constexpr, SHARED_TABLE: tl.constexpr, ROW_SCALES: tl.constexpr,
    BATCH: tl.constexpr, TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Several rows of x, on tensor cores: candidates are exact in float16, sums are float32."""
    table = tl.load(table_ptr + tl.arange(0, 1 << L)) if SHARED_TABLE else 0
    item = tl.arange(0, BATCH)
    n_tiles = tl.cdiv(rows, TILE_ROWS)
    for tile in range(tl.program_id(0).to(tl.int64), n_tiles, tl.num_programs(0)):
        row = tile * TILE_ROWS + tl.arange(0, TILE_ROWS).to(tl.int64)
        total = tl.zeros([TILE_ROWS, BATCH], tl.float32)
        for across in range(tl.cdiv(columns, TILE_COLUMNS)):
            column = across * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
            at = item.to(tl.int64)[None, :] * columns + column[:, None]
            x = tl.load(rotated_ptr + at, mask=(column < columns)[:, None], other=0.0)
            z = coded_candidates(
                message_ptr, n_bytes, window_mask, table_ptr, table, tl.minimum(row, rows - 1), across, rows,
                columns, band_columns, seed, stream_id, L, K, V, STEPS, WHOLE_WORDS, FROM_TABLE, SHARED_TABLE,
                TILE_COLUMNS,
            )  # fmt: skip
            total = tl.dot(z, x, total)
        scale = tl.load(scales_ptr + row * ROW_SCALES, mask=row < rows, other=0.0).to(tl.float32)
        y = total * scale[:, None] * tl.load(unit_ptr + item)[None, :]
        at = item.to(tl.int64)[None, :] * rows + row[:, None]
        mask = (row < rows)[:, None] & (item < batch)[None, :]
        tl.store(y_ptr + at, rounded(y, y_ptr.dtype.element_ty), mask=mask)


class _Arguments(NamedTuple):
    """Of `decode_linear`, in the order of its schema."""

    x: Tensor
    message: Tensor
    table: Tensor
    scales: Tensor
    rows: int
    window_bits: int
    step_bits: int
    step_weights: int
    seed: int
    stream_id: int
    rotation: int
    band_columns: int


def _check(given: _Arguments) -> None:
    op, x, scales, rows = "decode_linear", given.x, given.scales, given.rows
    code = (given.window_bits, given.step_bits, given.step_weights)
    check_code(op, *code)
    check_stream(op, given.seed, given.stream_id)
    check_tensor(op, "x", x, (torch.float32, torch.bfloat16, torch.float16), x)
    check_size(op, "x", x.ndim, 2, "dimensions")
    check_range(op, "batch (rows of x)", x.shape[0], 1, MAX_BATCH)
    check_range(op, "columns of x", x.shape[1], 1, MAX_COLUMNS)
    check_range(op, "rows", rows, 0, 2**31 - 1)
    check_range(op, "band_columns", given.band_columns, 0, 2**31 - 1)
    check_width(op, given.rotation, x.shape[1])
    check_tensor(op, "message", given.message, (torch.uint8,), x)
    check_message(op, given.message, rows * x.shape[1], *code)
    check_table(op, given.table, given.window_bits, given.step_weights, x)
    check_tensor(op, "scales", scales, (torch.bfloat16,), x)
    check_size(op, "scales", scales.numel(), 1 if scales.numel() == 1 else rows, "entries, or 1")


@on_its_device
@takes(_Arguments, _check)
def decode_linear_triton(given: _Arguments) -> Tensor:
    """x·Wᵀ of a coded matrix W, `[batch, rows]` in the dtype of x.

    Args:
        x: float32, bfloat16 or float16 `[batch, columns]`, batch from 1 to 64.
        rows: of W; its columns are those of x.

    The other arguments are those of `decode`. Sums are float32; for a batch of more than one, x·H is
    rounded to 11 bits, so y equals decoding to bfloat16 and multiplying to bfloat16 rounding.

    Raises:
        KernelInputError: a tensor or a number is not as said.
        KernelUnavailableError: there is no Triton, or no GPU.
    """
    check_launch("decode_linear", given.x)
    x, message, table, scales, rows, window_bits, step_bits, step_weights = given[:8]
    batch, columns = x.shape
    y = x.new_empty((batch, rows))
    if rows == 0:
        return y
    coded, sizes = (message, table, scales), (rows, columns, given.band_columns, given.seed, given.stream_id)
    launch = launch_vector if batch == 1 else _matrix
    launch(y, x, coded, sizes, given.rotation, (window_bits, step_bits, step_weights))
    return y


def _matrix(
    y: Tensor, x: Tensor, coded: tuple[Tensor, Tensor, Tensor], sizes: tuple[int, ...], rotation: int,
    code: tuple[int, int, int],
) -> None:  # fmt: skip
    (rows, columns, band_columns), (message, table, scales) = sizes[:3], coded
    steps = path_steps(table, *code, columns, band_columns)
    padded = max(16, triton.next_power_of_2(x.shape[0]))
    tile = tiles("decode_linear", x.device, batch=padded)
    rotated = x.new_empty((padded, columns), dtype=torch.float16)
    unit = x.new_empty(padded, dtype=torch.float32)
    _rotate_kernel[(padded,)](
        rotated, unit, x, x.shape[0], columns, ROTATION=rotation,
        TILE=max(rotation, min(triton.next_power_of_2(columns), tile["TILE_ROTATION"])),
        num_warps=tile["num_warps"], enable_fp_fusion=True,
    )  # fmt: skip
    height = tile["TILE_ROWS"]
    width = tile_columns(columns, max(steps * code[2], 16), tile["TILE_COLUMNS"])
    programs = min(triton.cdiv(rows, height), resident_programs(x.device, tile["programs_per_processor"]))
    _matrix_kernel[(programs,)](
        y, rotated, unit, message, as_entries(table) if steps else table, scales, message.numel(),
        (1 << code[0]) - 1, x.shape[0], *sizes, **dict(zip("LKV", code)), STEPS=steps,
        WHOLE_WORDS=steps > 0 and whole_words(*code[1:], columns, width), FROM_TABLE=table.ndim == 2,
        SHARED_TABLE=fits_shared_memory(table, steps, tile), ROW_SCALES=int(scales.numel() > 1),
        BATCH=padded, TILE_ROWS=height, TILE_COLUMNS=width, num_warps=tile["num_warps"],
        num_stages=tile["num_stages"], enable_fp_fusion=True,
    )  # fmt: skip


@takes(_Arguments, _check)
def decode_linear_torch(given: _Arguments) -> Tensor:
    """The reference of `decode_linear`: decodes rows to float32, some at a time, and multiplies."""
    x, message, table, scales, rows, *code = given
    y = x.new_empty((x.shape[0], rows))
    for first in range(0, rows, _REFERENCE_ROWS):
        stop = min(first + _REFERENCE_ROWS, rows)
        weights = x.new_empty((stop - first, x.shape[1]), dtype=torch.float32)
        decode_torch(weights, message, table, scales, None, rows, first, *code, 0, False)
        y[:, first:stop] = (x.float() @ weights.T).to(x.dtype)
    return y


def _fake(given: _Arguments) -> Tensor:
    return given.x.new_empty((given.x.shape[0], given.rows))


decode_linear = register(
    "decode_linear", _Arguments, triton=decode_linear_triton, reference=decode_linear_torch, fake=_fake
)
