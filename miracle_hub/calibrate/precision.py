"""The precision of products: bfloat16 where the processor multiplies it faster, but for what is judged."""

import torch
from torch import nn

from miracle_hub.calibrate.outputs import device_of

# With AVX-512 BF16 a step of SmolLM2, and of one of its blocks, took 0.6 of the time of float32.
_OF_CPUS = ("avx512_bf16", "amx_bf16")
# Weights of models whose texts and answers take minutes in float32: SmolLM2's texts 90 of 333 seconds of
# effort 1 with narrow windows. Its tokens, written 19 or 60 at a time, take 0.59 or 0.72 of that.
_LARGE = 30_000_000


def fast_products(device: torch.device, wanted: bool = True) -> torch.autocast:
    """Within it products of matrices are as precise as fits need; what is judged is outside of it."""
    known = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    is_fast = device.type == "cuda" or any(known.get(name) for name in _OF_CPUS)
    return torch.autocast(device.type, torch.bfloat16, enabled=is_fast and wanted)


def fast_if_large(model: nn.Module) -> torch.autocast:
    """The same, of a large model only: for what others are fitted to, and for texts."""
    n_weights = sum(parameter.numel() for parameter in model.parameters())
    return fast_products(device_of(model), n_weights > _LARGE)
