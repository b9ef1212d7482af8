"""Windows → message: the bits of a path inside a kernel, and the same in torch."""

import torch
from torch import Tensor

from ._triton import tl, triton


@triton.jit(do_not_specialize=["n_steps", "n_bytes"])
def pack_kernel(
    message_ptr,  # [n_bytes] uint8
    states_ptr,  # [n_steps] int32
    n_steps, n_bytes, L: tl.constexpr, K: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Bit p < L of the message is the first state's; bit L + k·t + r is the r-th that state t + 1 adds."""
    byte = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    place = tl.arange(0, 8)
    bit = byte[:, None] * 8 + place[None, :] - (L - K)
    step = tl.where(bit < 0, 0, bit // K)
    state = tl.load(states_ptr + step, mask=step < n_steps, other=0)
    value = (state >> (K - 1 - (bit - step * K)).to(tl.int32)) & 1
    packed = tl.sum(value << (7 - place)[None, :], axis=1)
    tl.store(message_ptr + byte, packed.to(tl.uint8), mask=byte < n_bytes)


def pack_torch(states: Tensor, window_bits: int, step_bits: int) -> Tensor:
    """States → message, uint8; the last byte is filled with zero bits. The reference of `pack_kernel`."""
    if states.numel() == 0:
        return states.new_empty(0, dtype=torch.uint8)
    places = torch.arange(window_bits - 1, -1, -1, device=states.device)
    head = states[:1, None] >> places[: window_bits - step_bits]
    tail = states[:, None] >> places[window_bits - step_bits :]
    bits = torch.cat((head.flatten(), tail.flatten())) & 1
    bits = torch.nn.functional.pad(bits, (0, -bits.numel() % 8)).view(-1, 8)
    return (bits << torch.arange(7, -1, -1, device=states.device)).sum(1).to(torch.uint8)
