"""The dtypes of safetensors and those of torch."""

import torch
from torch import Tensor

from miracle_hub.errors import FormatError

TORCH_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
# Which torch of some version may lack; they are stored, and kept exact, where it has them.
_LATER = {
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu", "C64": "complex64",
}  # fmt: skip
EXACT_DTYPES = TORCH_DTYPES | {
    name: getattr(torch, spelled) for name, spelled in _LATER.items() if hasattr(torch, spelled)
}
DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


def dtype_name(where: str, tensor: Tensor) -> str:
    """How safetensors spells a tensor's dtype.

    Raises:
        FormatError: it has none that every version of torch and safetensors knows.
    """
    if tensor.dtype not in DTYPE_NAMES:
        raise FormatError(
            f"{where}: expected one of {', '.join(TORCH_DTYPES)}, found {tensor.dtype}; cast it, or make "
            "it a buffer that is not persistent"
        )
    return DTYPE_NAMES[tensor.dtype]


def raw_bytes(tensor: Tensor) -> bytes:
    """A tensor's bytes as safetensors stores them."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def as_bytes(data: bytes) -> Tensor:
    """A string of bytes as entries of files have it, uint8 `[bytes]`; of one byte or more."""
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def is_bytes(tensor: Tensor) -> bool:
    """Whether a tensor is a string of bytes: what a payload or a stream is stored as."""
    return tensor.dtype == torch.uint8 and tensor.ndim == 1 and not tensor.is_meta
