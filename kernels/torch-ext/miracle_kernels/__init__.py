"""Triton kernels of miracle-hub: candidates, decoding, selection, trellis search, variational noise.

Every op is a torch custom op: Triton on a GPU, its torch reference on a CPU. Imports the standard
library, torch and triton only, so that the same files serve pip and the kernels library.
"""

from ._triton import HAS_TRITON, INTERPRETED
from .codebook import codebook, codebook_torch
from .decode import decode, decode_torch
from .decode_linear import decode_linear, decode_linear_torch
from .errors import KernelError, KernelInputError, KernelUnavailableError
from .reparameterize import reparameterize, reparameterize_torch
from .reparameterize_mean_kl import reparameterize_mean_kl, reparameterize_mean_kl_torch
from .select import select, select_torch
from .slide import slide, slide_torch

__all__ = [
    "HAS_TRITON",
    "INTERPRETED",
    "KernelError",
    "KernelInputError",
    "KernelUnavailableError",
    "codebook",
    "codebook_torch",
    "decode",
    "decode_linear",
    "decode_linear_torch",
    "decode_torch",
    "reparameterize",
    "reparameterize_mean_kl",
    "reparameterize_mean_kl_torch",
    "reparameterize_torch",
    "select",
    "select_torch",
    "slide",
    "slide_torch",
]
