"""decode: message → weights in one pass: window, candidate, scale, rotation, mean, cast, digest."""

# What Triton's language means by these operators is not what its stubs say.
# pyright: reportOperatorIssue=false, reportGeneralTypeIssues=false

from typing import NamedTuple, Optional

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
from .digest import digest_torch, mixed_words
from .registration import register, takes
from .rotation import hadamard_torch, rotate
from .tuning import resident_programs, tiles
from .windows import (
    as_entries,
    candidates_torch,
    coded_candidates,
    fits_shared_memory,
    path_steps,
    tile_columns,
    whole_words,
    windows_torch,
)


@triton.jit(
    do_not_specialize=[
        "n_bytes",
        "mask",
        "n_tiles",
        "first_row",
        "band_columns",
        "seed",
        "stream_id",
        "first_index",
    ]
)
def _decode_kernel(
    out_ptr,  # [n_rows, columns] float32, bfloat16 or float16
    digests_ptr,  # [programs] int64, if WITH_DIGEST
    message_ptr,  # [n_bytes] uint8
    table_ptr,  # STEPS: [2^L] integers of 16·V bits; else [2^L, V] candidates or [65536] quantiles, float16
    scales_ptr,  # [rows] or [1] bfloat16
    mean_ptr,  # [n_rows, columns] float32, if HAS_MEAN
    n_bytes, window_mask, n_tiles, rows, n_rows, first_row, columns, band_columns, seed, stream_id,
    first_index,
    L: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    STEPS: tl.constexpr,  # of a group that is read as one word; 0: every weight finds its own window
    WHOLE_WORDS: tl.constexpr,  # whether every row and tile is a whole number of 32-bit words
    FROM_TABLE: tl.constexpr, SHARED_TABLE: tl.constexpr, ROW_SCALES: tl.constexpr,
    HAS_MEAN: tl.constexpr, WITH_DIGEST: tl.constexpr, ROTATION: tl.constexpr,
    WHOLE_COLUMNS: tl.constexpr,  # whether the columns are a whole number of tiles
    TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr,
):  # fmt: skip
    """A column of programs for every TILE_COLUMNS columns; each goes down through tiles of TILE_ROWS rows."""
    digest = tl.zeros([TILE_ROWS, TILE_COLUMNS], tl.uint64)
    table = tl.load(table_ptr + tl.arange(0, 1 << L)) if SHARED_TABLE else 0
    # With V = 1 an entry is one number, and converted here for all weights; the digest needs the registers.
    if SHARED_TABLE and V == 1 and not WITH_DIGEST:
        table = tl.cast(tl.cast(table, tl.float16, bitcast=True), tl.float32)
    tile_column = tl.program_id(0)
    column = tile_column * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
    in_tile = tl.arange(0, TILE_ROWS)
    # A row is up to 2^31 weights: 64 bits, but all of them the same in every tile.
    within = in_tile.to(tl.int64)[:, None] * columns + column[None, :]
    for tile in range(tl.program_id(1), n_tiles, tl.num_programs(1)):
        first = tile * TILE_ROWS
        n_left = n_rows - first
        mask = (in_tile < n_left)[:, None]
        if not WHOLE_COLUMNS:
            mask = mask & (column < columns)[None, :]
        # Past the last row the last one stands for all: what is read of it is not written.
        row = first + first_row + tl.minimum(in_tile, n_left - 1)
        z = coded_candidates(
            message_ptr, n_bytes, window_mask, table_ptr, table, row, tile_column, rows, columns,
            band_columns, seed, stream_id, L, K, V, STEPS, WHOLE_WORDS, FROM_TABLE, SHARED_TABLE,
            TILE_COLUMNS,
        )  # fmt: skip
        scale = tl.load(scales_ptr + row * ROW_SCALES).to(tl.float32)
        # The product is exact (11 significant bits times 8), so fused and unfused sums agree: they are fused.
        weight = rotate(z.to(tl.float32) * scale[:, None], ROTATION, STEPS * V)
        start = tl.cast(first, tl.int64) * columns
        if HAS_MEAN:
            weight += tl.load(mean_ptr + start + within, mask=mask, other=0.0)
        if WITH_DIGEST:
            index = within + (start + first_row.to(tl.int64) * columns + first_index)
            digest += tl.where(mask, mixed_words(weight, index), tl.zeros_like(digest))
        tl.store(out_ptr + start + within, rounded(weight, out_ptr.dtype.element_ty), mask=mask)
    if WITH_DIGEST:
        total = tl.sum(tl.sum(digest.to(tl.int64, bitcast=True), axis=1), axis=0)
        tl.store(digests_ptr + tl.program_id(1) * tl.num_programs(0) + tile_column, total)


class _Arguments(NamedTuple):
    """Of `decode`, in the order of its schema."""

    out: Tensor
    message: Tensor
    table: Tensor
    scales: Tensor
    mean: Optional[Tensor]
    rows: int
    first_row: int
    window_bits: int
    step_bits: int
    step_weights: int
    seed: int
    stream_id: int
    rotation: int
    band_columns: int
    first_index: int
    with_digest: bool


def _check(given: _Arguments) -> None:
    op, out, scales, mean = "decode", given.out, given.scales, given.mean
    check_code(op, given.window_bits, given.step_bits, given.step_weights)
    check_stream(op, given.seed, given.stream_id)
    check_tensor(op, "out", out, (torch.float32, torch.bfloat16, torch.float16), out)
    check_size(op, "out", out.ndim, 2, "dimensions")
    n_rows, columns = out.shape
    check_range(op, "first_row", given.first_row, 0, given.rows - n_rows)
    check_range(op, "band_columns", given.band_columns, 0, 2**31 - 1)
    check_range(op, "columns of out", columns, 1, MAX_COLUMNS)
    check_width(op, given.rotation, columns)
    check_tensor(op, "message", given.message, (torch.uint8,), out)
    code = (given.window_bits, given.step_bits, given.step_weights)
    check_message(op, given.message, given.rows * columns, *code)
    check_table(op, given.table, given.window_bits, given.step_weights, out)
    check_tensor(op, "scales", scales, (torch.bfloat16,), out)
    check_size(op, "scales", scales.numel(), 1 if scales.numel() == 1 else given.rows, "entries, or 1")
    if mean is not None:
        check_tensor(op, "mean", mean, (torch.float32,), out)
        check_size(op, "mean", mean.numel(), out.numel(), "entries")


@on_its_device
@takes(_Arguments, _check)
def decode_triton(given: _Arguments) -> Tensor:
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

    Source: FORMAT.md of miracle-hub.
    """
    check_launch("decode", given.out)
    out, message, table, scales, mean, rows, first_row, window_bits, step_bits, step_weights = given[:10]
    n_rows, columns = out.shape
    steps = path_steps(table, window_bits, step_bits, step_weights, columns, given.band_columns)
    shape, options = _tile_options(given, steps)
    across, down = triton.cdiv(columns, shape["TILE_COLUMNS"]), triton.cdiv(n_rows, shape["TILE_ROWS"])
    resident = resident_programs(out.device, options.pop("programs_per_processor"))
    grid = (across, min(down, triton.cdiv(resident, across)))
    digests = out.new_zeros(max(1, grid[0] * grid[1]), dtype=torch.int64)
    if down:
        _decode_kernel[grid](
            out, digests, message, as_entries(table) if steps else table, scales, mean,
            message.numel(), (1 << window_bits) - 1, down, rows, n_rows, first_row, columns,
            given.band_columns, given.seed, given.stream_id, given.first_index,
            L=window_bits, K=step_bits, V=step_weights, STEPS=steps, FROM_TABLE=table.ndim == 2,
            ROW_SCALES=int(scales.numel() > 1), HAS_MEAN=mean is not None, WITH_DIGEST=given.with_digest,
            ROTATION=given.rotation, enable_fp_fusion=True, **shape, **options,
        )  # fmt: skip
    return digests.sum()


def _tile_options(given: _Arguments, steps: int) -> tuple[dict[str, int], dict[str, int]]:
    """Tile sizes and what they allow, and where the table lies; launch options."""
    columns, code = given.out.shape[1], (given.step_bits, given.step_weights)
    tile = tiles("decode", given.out.device, steps=steps, with_digest=int(given.with_digest))
    largest = tile["TILE"] if steps else tile["TILE_GENERAL"]
    width = tile_columns(columns, max(given.rotation, steps * given.step_weights, 16), largest)
    shape = {"TILE_ROWS": max(1, largest // width), "TILE_COLUMNS": width}
    shape |= {
        "WHOLE_COLUMNS": columns % width == 0,
        "WHOLE_WORDS": steps > 0 and whole_words(*code, columns, width),
    }
    shape |= {"SHARED_TABLE": fits_shared_memory(given.table, steps, tile)}
    return shape, {name: tile[name] for name in ("num_warps", "programs_per_processor")}


@takes(_Arguments, _check)
def decode_torch(given: _Arguments) -> Tensor:
    """The reference of `decode`."""
    out, scales, first_row = given.out, given.scales.float(), given.first_row
    (n_rows, columns), band_columns = out.shape, given.band_columns
    row = torch.arange(first_row, first_row + n_rows, device=out.device)[:, None]
    column = torch.arange(columns, device=out.device)[None, :]
    first = column // band_columns * band_columns if band_columns else column * 0
    width = (columns - first).clamp(max=band_columns or columns)
    position = first * given.rows + row * width + column - first  # [n_rows, columns], in the stream
    step, v = position // given.step_weights, position % given.step_weights
    state = windows_torch(given.message, step * given.step_bits, given.window_bits)
    z = candidates_torch(given.table, state, v, given.seed, given.stream_id)
    scale = scales if scales.numel() == 1 else scales[first_row : first_row + n_rows, None]
    weights = hadamard_torch(z.float() * scale, given.rotation)
    if given.mean is not None:
        weights = weights + given.mean
    out.copy_(weights)
    if not given.with_digest:
        return state.new_zeros(())
    return digest_torch(weights, given.first_index + first_row * columns)


def _fake(given: _Arguments) -> Tensor:
    return given.out.new_empty((), dtype=torch.int64)


decode = register(
    "decode", _Arguments, triton=decode_triton, reference=decode_torch, fake=_fake, mutates=("out",)
)
