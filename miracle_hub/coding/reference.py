"""The definition of the code: message bits → windows → candidates. Slow, short, exact.

    state_t    = message[k·t : k·t + L]                 most significant bit first
    z[t·V + v] = Q[ half v % 8 of Philox(key = seed, counter = (state_t, v // 8, stream_id, 0)) ]

Everything faster in this project must equal this file bit for bit. FORMAT.md, "Stream", says the same for
readers of files.
"""

import torch
from jaxtyping import Float32, Int64, UInt8
from torch import Tensor

from miracle_hub.code import Code
from miracle_hub.coding.philox import philox4x32
from miracle_hub.coding.quantiles import quantiles

_HALVES = 8


def windows(message: UInt8[Tensor, " bytes"], code: Code, n_steps: int) -> Int64[Tensor, " steps"]:
    """The L-bit window of every step."""
    shifts = torch.arange(7, -1, -1, dtype=torch.uint8)
    bits = ((message[:, None] >> shifts) & 1).flatten().long()
    starts = torch.arange(n_steps) * code.step_bits
    states = torch.zeros(n_steps, dtype=torch.int64)
    for offset in range(code.window_bits):
        states = states * 2 + bits[starts + offset]
    return states


def candidates(states: Int64[Tensor, " n"], code: Code) -> Float32[Tensor, "n step_weights"]:
    """The standard normal candidate that each state stands for (float16 values, held as float32)."""
    halves = []
    for group in range(-(-code.step_weights // _HALVES)):
        for word in philox4x32((states, group, code.stream_id, 0), code.seed):
            halves += [word & 0xFFFF, word >> 16]
    uniform = torch.stack(halves[: code.step_weights], dim=1)
    return quantiles()[uniform].float()


def decode_stream(message: UInt8[Tensor, " bytes"], code: Code, n_weights: int) -> Float32[Tensor, " n"]:
    """The standard normal values of a stream, in stream order, before scale, rotation and mean."""
    states = windows(message, code, code.steps(n_weights))
    return candidates(states, code).flatten()[:n_weights]
