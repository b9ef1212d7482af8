"""Triton kernels of miracle-hub: candidates, decoding, selection, trellis search, variational noise.

Every op is a torch custom op: Triton on a GPU, its torch reference on a CPU. Imports the standard
library, torch and triton only, so that the same files serve pip and the kernels library.
"""

from .codebook import codebook, codebook_torch
from .decode import decode, decode_torch
from .errors import KernelError, KernelInputError, KernelUnavailableError

__all__ = [
    "KernelError",
    "KernelInputError",
    "KernelUnavailableError",
    "codebook",
    "codebook_torch",
    "decode",
    "decode_torch",
]
