"""Whether a tensor that readers get is finite, and what a dense model's tensor was compressed to."""

from collections.abc import Callable, Collection

import torch
from torch import Tensor

from miracle_hub.codec.dtypes import TORCH_DTYPES
from miracle_hub.codec.finite import first_non_finite, is_taken
from miracle_hub.codec.source import SourceTensor
from miracle_hub.codec.stored import StoredTensor
from miracle_hub.errors import NonFiniteWeightError, SourceError

TUNED = "tuned"  # in the quantization_config: names of plain tensors that are not the source's
# Of the squared error that a payload promises: its digits in float32, and another order of summation.
_ERROR_TOLERANCE = 1e-4


def check_finite(tensor: StoredTensor, values: Tensor, listed: Collection[str]) -> None:
    """
    Args:
        values: as readers get them.
        listed: names of tensors that may have NaN or infinity.

    Raises:
        NonFiniteWeightError: a number is NaN or infinite, and is none of a constant's.
    """
    if first_non_finite(values) is None:
        return
    if (tensor.is_coded and not tensor.is_exact) or not is_taken(tensor.name, values, listed):
        raise NonFiniteWeightError(
            f"{tensor.path}: {tensor.name}: expected finite numbers, found NaN or infinity; "
            "download the file again, or repair the model that it was made from"
        )


def compare_plain(tensor: StoredTensor, found: Tensor, source: SourceTensor, is_tuned: bool = False) -> None:
    """
    Raises:
        SourceError: it is not the source's tensor, or, tuned, no tensor like that.
    """
    (_compare_kinds if is_tuned else compare_bits)(tensor, found, source)


def compare_bits(tensor: StoredTensor, found: Tensor, source: SourceTensor) -> None:
    """
    Raises:
        SourceError: it is not the source's tensor, rounded to float16 where the file says so.
    """
    original = source.load()
    expected = original.half() if tensor.is_narrowed else original
    same = found.dtype == expected.dtype and found.shape == expected.shape
    # As bytes: -0.0 counts.
    if not same or not torch.equal(*(x.reshape(-1).view(torch.uint8) for x in (found, expected))):
        kind = "exact" if tensor.is_exact else "plain"
        raise _other_model(tensor, f"expected the bits of the dense model's {kind} tensor, found others")


def _compare_kinds(tensor: StoredTensor, found: Tensor, source: SourceTensor) -> None:
    """
    Raises:
        SourceError: a tuned tensor has another shape than the source's, or another dtype than it may.
    """
    original = source.load()
    dtype = torch.float16 if tensor.is_narrowed else original.dtype
    if found.dtype != dtype or found.shape != original.shape:
        expected = f"expected {dtype} {list(original.shape)}"
        raise _other_model(tensor, f"{expected}, found {found.dtype} {list(found.shape)}")


def compare(
    tensor: StoredTensor, weights: Tensor, source: SourceTensor, unrounded: Callable[[], Tensor]
) -> None:
    """
    Args:
        weights: in the dtype of the source.
        unrounded: gives them in float32.

    Raises:
        SourceError: a coded tensor does not have the shape, dtype and squared error that were promised.
    """
    if tensor.is_exact:
        return compare_bits(tensor, weights, source)
    original = source.load()
    if tuple(original.shape) != tensor.shape or original.dtype != TORCH_DTYPES[tensor.dtype]:
        found = f"found {tensor.dtype} {list(tensor.shape)}"
        raise _other_model(tensor, f"expected {original.dtype} {list(original.shape)}, {found}")
    promised, found = tensor.relative_error, _relative_error(weights, original)
    # Tensors that training coded promise no error. Encoders of before measured theirs ahead of the cast.
    if (
        promised
        and not _agree(found, promised)
        and not _agree(_relative_error(unrounded(), original), promised)
    ):
        raise _other_model(tensor, f"expected a relative squared error of {promised:.6g}, found {found:.6g}")
    return None


def compare_based(tensor: StoredTensor, weights: Tensor, source: SourceTensor) -> None:
    """
    Raises:
        SourceError: a tensor with a base is not what was compressed.
    """
    is_lossy = tensor.is_coded and not tensor.is_exact
    (_compare_difference if is_lossy else compare_bits)(tensor, weights, source)


def _compare_difference(tensor: StoredTensor, weights: Tensor, source: SourceTensor) -> None:
    """
    Args:
        weights: the sum of a base's tensor and a difference, in the dtype of the source.

    Raises:
        SourceError: it has not the shape, dtype and squared error, over that of the base, that were promised.
    """
    original, base = source.load(), tensor.load_base()
    assert base is not None
    if original.shape != weights.shape or original.dtype != weights.dtype:
        found = f"found {tensor.dtype} {list(tensor.shape)}"
        raise _other_model(tensor, f"expected {original.dtype} {list(original.shape)}, {found}")
    power = squared_distance(base.to(original.dtype), original)
    found = squared_distance(weights, original) / power if power else 0.0
    if tensor.relative_error and not _agree(found, tensor.relative_error):
        expected = f"expected {tensor.relative_error:.6g} of the squared difference to the base"
        raise _other_model(tensor, f"{expected}, found {found:.6g}")


def squared_distance(a: Tensor, b: Tensor) -> float:
    """Of differences in float32, or in float64 where the second has so many bits, summed in float64."""
    wide = torch.float64 if b.dtype == torch.float64 else torch.float32
    return float((a.reshape(-1).to(wide) - b.reshape(-1).to(wide)).double().square().sum())


def _relative_error(weights: Tensor, original: Tensor) -> float:
    power = float(original.double().square().sum())
    return squared_distance(weights, original) / power if power else 0.0


def _agree(found: float, promised: float) -> bool:
    return abs(found - promised) <= _ERROR_TOLERANCE * promised


def _other_model(tensor: StoredTensor, fault: str) -> SourceError:
    return SourceError(
        f"{tensor.path}: {tensor.name}: {fault}; give the model that was compressed, or compress it again"
    )
