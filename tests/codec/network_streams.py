"""Streams of made-up networks."""

import numpy as np
import torch
from torch import Tensor

from miracle_hub.code import Code
from miracle_hub.codec.dtypes import TORCH_DTYPES
from miracle_hub.codec.network import encode_stream_entry
from miracle_hub.coding.scales import rounded_scales
from miracle_hub.format.network import NetworkHeader, SharedSpec

CODES = [Code(8, 2, 1, seed=5), Code(12, 12, 9, seed=2**64 - 1), Code(10, 3, 17, seed=1), Code(1, 1, 256)]


def bits(weights: Tensor) -> Tensor:
    """-0 and 0 are different bits."""
    return weights.float().flatten().view(torch.int32)


def made_up(code: Code, seed: int) -> tuple[bytes, tuple[SharedSpec, ...], dict[str, Tensor]]:
    """A stream of a random network, its tensors and its float32 weights."""
    rng, tensors = np.random.default_rng(seed), []
    for i in range(int(rng.integers(1, 9))):
        shape = tuple(rng.integers(1, 7, rng.integers(0, 5)).tolist())
        n_weights, kind = int(np.prod(shape)), int(rng.integers(0, 3))
        n_values = int(rng.integers(1, n_weights + 1)) if kind else n_weights
        dtype = str(rng.choice(list(TORCH_DTYPES)))
        tensors.append(SharedSpec(f"layer.{i}", dtype, shape, kind, n_values))
    header = NetworkHeader(code, tuple(tensors))
    message = rng.integers(0, 256, code.message_bytes(header.n_values)).astype(np.uint8)
    message[-1] &= 0xFF << (-code.message_bits(header.n_values) % 8) & 0xFF
    scales = rounded_scales(torch.from_numpy(rng.random(len(tensors))).float())
    data, weights = encode_stream_entry(header, scales, torch.from_numpy(message))
    return data, header.tensors, weights


TENSORS = (SharedSpec("a", "F32", (3, 4), 1, 5), SharedSpec("b", "BF16", (8,), 0, 8))
CODE = Code(6, 3, 2, seed=1)
HEADER = NetworkHeader(CODE, TENSORS)  # 7 steps: 24 bits; 13 values
CODE_5 = Code(7, 3, 2, seed=1)  # 25 bits


def small(code: Code = CODE) -> bytes:
    message = torch.tensor([0b10110100, 77, 200, 0b10000000][: code.message_bytes(13)], dtype=torch.uint8)
    return encode_stream_entry(NetworkHeader(code, TENSORS), torch.tensor([0.5, 3.0]), message)[0]
