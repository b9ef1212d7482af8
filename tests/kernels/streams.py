"""Random streams and what they decode to by the package's reference, which is the definition."""

from typing import Any

import torch
from torch import Tensor

from miracle_hub.code import Code
from miracle_hub.coding import reference
from miracle_hub.coding.digest import digest
from miracle_hub.coding.order import banded_order
from miracle_hub.coding.quantiles import quantiles
from miracle_hub.coding.rotation import hadamard


def changed(given: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Arguments with some of them replaced."""
    return {**given, **changes}


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_message(code: Code, n_weights: int, seed: int = 0) -> Tensor:
    """Random bits; those after the last step are random too, which readers of streams do not mind."""
    return torch.randint(256, (code.message_bytes(n_weights),), generator=generator(seed)).to(torch.uint8)


def random_scales(n: int, seed: int = 0) -> Tensor:
    """bfloat16 scales of many magnitudes, one of them 0."""
    scales = torch.randn(n, generator=generator(seed)).abs().exp2()
    scales[n // 2] = 0 if n > 1 else 0.25
    return scales.bfloat16()


def table_of(code: Code) -> Tensor:
    """The candidates float16 [2^L, V] up to L = 16, else the quantiles, as `decode` takes them."""
    if code.window_bits > 16:
        return quantiles()
    return reference.candidates(torch.arange(1 << code.window_bits), code).half()


def defined_weights(
    message: Tensor, code: Code, scales: Tensor, rows: int, columns: int, rotation: int, band_columns: int = 0
) -> Tensor:
    """float32 [rows, columns] by the definition of the format."""
    z = torch.empty(rows * columns)
    z[banded_order(rows, columns, band_columns)] = reference.decode_stream(message, code, rows * columns)
    return hadamard(z.view(rows, columns) * scales.float()[:, None], rotation)


def signed(word: int) -> int:
    """An unsigned 64-bit word as the signed number that torch ops take."""
    return word - 2**64 if word >= 2**63 else word


def signed_digest(weights: Tensor) -> int:
    return signed(digest(weights.contiguous().view(-1)))
