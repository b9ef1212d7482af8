"""Posterior × code → message: the one entry point to both encoders."""

import numpy as np
import torch
from jaxtyping import UInt8
from numba import njit
from torch import Tensor

from miracle_hub.checks import check_choice
from miracle_hub.code import Code
from miracle_hub.coding.block import encode_block
from miracle_hub.coding.posterior import Cost
from miracle_hub.coding.sliding import encode_sliding
from miracle_hub.errors import OptionError

SELECTIONS = ("best", "sample")


def encode_stream(
    cost: Cost, code: Code, selection: str = "best", generator: torch.Generator | None = None
) -> UInt8[Tensor, " bytes"]:
    """The message of a stream; `cpu.decode_stream` gives the candidates back.

    Args:
        cost: per weight, in stream order.
        selection: "best" takes the candidates of largest importance weight, "sample" draws them in
            proportion to it, the rule of the paper.
        generator: the only source of the encoder's randomness; needed by "sample".

    Raises:
        OptionError: an unknown selection, or "sample" without a generator.

    Source: Havasi et al. 2019, algorithm 1. "best" deviates: no proof, less distortion, equal length.
    """
    check_selection(selection, generator)
    if cost.linear.numel() == 0:
        return torch.zeros(0, dtype=torch.uint8)
    return pack_states(encode_states(cost, code, selection, generator), code)


def encode_states(
    cost: Cost, code: Code, selection: str, generator: torch.Generator | None, entry: int | None = None
) -> np.ndarray:
    """The windows of a stream, or of its next steps, int64 [steps]; see `encode_stream`.

    Args:
        entry: the L - k bits that the last window before these steps shares with the first of them; None
            means that these are the first steps.
    """
    if code.overlap_bits:
        return encode_sliding(cost, code, selection, generator, entry)
    return encode_block(cost, code, selection, generator)


def check_selection(selection: str, generator: torch.Generator | None) -> None:
    """Raise unless the selection exists and has the generator it needs.

    Raises:
        OptionError: it does not, or has not.
    """
    check_choice("selection", selection, SELECTIONS)
    if selection == "sample" and generator is None:
        raise OptionError("selection='sample' needs a torch.Generator: pass generator=…")


def pack_states(states: np.ndarray, code: Code) -> UInt8[Tensor, " bytes"]:
    """States → message, the mirror of `reference.windows`; the last byte is filled with zero bits."""
    n_bits = code.overlap_bits + code.step_bits * states.size
    out = np.empty(-(-n_bits // 8), np.uint8)
    _pack(states, code.overlap_bits, code.step_bits, out)
    return torch.from_numpy(out)


@njit(nogil=True, cache=True)
def _pack(states, overlap_bits, step_bits, out):
    pending = np.uint64(states[0] >> step_bits)
    n_pending, n_bytes = overlap_bits, 0
    for t in range(-1, states.shape[0]):
        if t >= 0:
            new = np.uint64(states[t] & ((1 << step_bits) - 1))
            pending = (pending << np.uint64(step_bits)) | new
            n_pending += step_bits
        while n_pending >= 8:
            n_pending -= 8
            out[n_bytes] = np.uint8((pending >> np.uint64(n_pending)) & np.uint64(0xFF))
            n_bytes += 1
    if n_pending:
        out[n_bytes] = np.uint8((pending << np.uint64(8 - n_pending)) & np.uint64(0xFF))
