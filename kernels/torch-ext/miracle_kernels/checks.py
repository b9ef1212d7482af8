"""What every op checks before it allocates: dtype, device, dimensions, ranges."""

import torch
from torch import Tensor

from .errors import KernelInputError

MAX_WINDOW_BITS = 24
MAX_WIDTH = 1 << 15
# Columns and tiles of them are counted in 32 bits, with room for the last tile; rows in 64.
MAX_COLUMNS = 1 << 30
MAX_STEP_WEIGHTS = 256
N_QUANTILES = 1 << 16


def check_tensor(op: str, name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...], like: Tensor) -> None:
    """Raise unless `tensor` is contiguous, of one of `dtypes`, and on the device of `like`.

    Raises:
        KernelInputError: it is not.
    """
    if tensor.dtype not in dtypes:
        wanted = " or ".join(str(dtype).replace("torch.", "") for dtype in dtypes)
        raise KernelInputError(
            f"{op}: {name}: expected {wanted}, found {tensor.dtype}; convert it with .to()"
        )
    if tensor.device != like.device:
        raise KernelInputError(
            f"{op}: {name}: expected all tensors on {like.device}, found {tensor.device}; move one of them"
        )
    if not tensor.is_contiguous():
        raise KernelInputError(
            f"{op}: {name}: expected a contiguous tensor, found strides {tuple(tensor.stride())} for shape "
            f"{tuple(tensor.shape)}; call .contiguous()"
        )


def check_size(op: str, name: str, found: int, expected: int, what: str) -> None:
    """Raise unless a tensor has exactly the elements (or bytes) that the other arguments imply.

    Raises:
        KernelInputError: it has not.
    """
    if found != expected:
        raise KernelInputError(
            f"{op}: {name}: expected {expected} {what}, found {found}; it belongs to another shape or code"
        )


def check_shape(op: str, name: str, tensor: Tensor, expected: tuple[int, ...]) -> None:
    """Raise unless a tensor has exactly the shape that the other arguments imply.

    Raises:
        KernelInputError: it has not.
    """
    if tuple(tensor.shape) != expected:
        raise KernelInputError(
            f"{op}: {name}: expected shape {expected}, found {tuple(tensor.shape)}; reshape it or pass the "
            "tensors of one problem"
        )


def check_range(op: str, name: str, value: int, low: int, high: int) -> None:
    """Raise unless low ≤ value ≤ high.

    Raises:
        KernelInputError: it is outside.
    """
    if not low <= value <= high:
        raise KernelInputError(
            f"{op}: {name}: expected an integer from {low} to {high}, found {value}; choose another value"
        )


def check_code(op: str, window_bits: int, step_bits: int, step_weights: int) -> None:
    """Raise unless L, k and V make a code of the format.

    Raises:
        KernelInputError: one of them is out of range.
    """
    check_range(op, "window_bits", window_bits, 1, MAX_WINDOW_BITS)
    check_range(op, "step_bits", step_bits, 1, window_bits)
    check_range(op, "step_weights", step_weights, 1, MAX_STEP_WEIGHTS)


def check_stream(op: str, seed: int, stream_id: int) -> None:
    """Raise unless the seed is a signed 64-bit word and the stream_id an unsigned 32-bit one.

    Raises:
        KernelInputError: one of them is out of range.
    """
    check_range(op, "seed", seed, -(2**63), 2**63 - 1)
    check_range(op, "stream_id", stream_id, 0, 2**32 - 1)


def message_bytes(n_weights: int, window_bits: int, step_bits: int, step_weights: int) -> int:
    """Bytes of the message of `n_weights` weights: (L - k) + k·⌈N/V⌉ bits, rounded up; 0 for none."""
    steps = -(-n_weights // step_weights)
    return -(-(window_bits - step_bits + step_bits * steps) // 8) if steps else 0


def check_message(
    op: str, message: Tensor, n_weights: int, window_bits: int, step_bits: int, step_weights: int
) -> None:
    """Raise unless the message has the length that the code gives to so many weights.

    Raises:
        KernelInputError: it has not.
    """
    expected = message_bytes(n_weights, window_bits, step_bits, step_weights)
    check_size(op, "message", message.numel(), expected, f"bytes for {n_weights} weights")


def check_width(op: str, rotation: int, columns: int) -> None:
    """Raise unless groups of `rotation` columns tile a row.

    Raises:
        KernelInputError: the width is no power of two, too large, or does not divide the columns.
    """
    if rotation & (rotation - 1) or not 1 <= rotation <= MAX_WIDTH or columns % rotation:
        raise KernelInputError(
            f"{op}: rotation: expected a power of two up to {MAX_WIDTH} that divides {columns} columns, "
            f"found {rotation}; 1 is none"
        )


def check_table(
    op: str, table: Tensor, window_bits: int, step_weights: int, like: Tensor, *, quantiles: bool = True
) -> None:
    """Raise unless `table` holds the candidates of a code, `[2^L, V]`, or the quantiles, `[65536]`.

    Raises:
        KernelInputError: it holds neither, or the quantiles where `quantiles` is false.
    """
    check_tensor(op, "table", table, (torch.float16,), like)
    shapes = [(1 << window_bits, step_weights), (N_QUANTILES,)][: 1 + quantiles]
    if tuple(table.shape) not in shapes:
        raise KernelInputError(
            f"{op}: table: expected candidates of shape {shapes[0]}"
            + (f" or quantiles of shape {shapes[1]}" if quantiles else "")
            + f", found {tuple(table.shape)}; make it with codebook"
        )


def check_choice(op: str, name: str, found: str, choices: tuple[str, ...]) -> None:
    """Raise unless `found` is one of `choices`.

    Raises:
        KernelInputError: it is not.
    """
    if found not in choices:
        raise KernelInputError(
            f"{op}: {name}: expected one of {choices}, found {found!r}; choose one of them"
        )
