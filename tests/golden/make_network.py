"""Writes network.json, once: streams of random messages for made-up networks, and the weights they stand for.

Run it again only for a new version of the format: python tests/golden/make_network.py
"""

import json
from pathlib import Path

import numpy as np
import torch

from miracle_hub.code import Code, SplitCode, StreamCode
from miracle_hub.codec.network import encode_stream_entry
from miracle_hub.coding.sharing import KINDS
from miracle_hub.format.network import NetworkHeader, SharedSpec

# Code, then per tensor: name, dtype, shape, kind of sharing, values, scale.
CASES = (
    (
        Code(8, 2, 1, seed=5),
        (
            ("conv.weight", "F32", (4, 2, 3, 3), "none", 72, 0.5),
            ("conv.bias", "F32", (4,), "none", 4, 2.0**-64),
            ("fc.weight", "BF16", (6, 7), "hash", 10, 0.046875),
            ("fc.bias", "F16", (6,), "tile", 4, 1.0),
            ("temperature", "F64", (), "none", 1, 0.0),
        ),
    ),
    (
        Code(12, 12, 9, seed=2**64 - 1),
        (
            ("größe", "F32", (5, 5), "hash", 3, 2.0**64),
            ("b", "BF16", (31,), "hash", 31, 3.0),
            ("c", "F32", (1, 1), "tile", 1, 1.0078125),
        ),
    ),
    (Code(24, 5, 256, seed=2**32 + 1), (("only", "F32", (300,), "none", 300, 0.75),)),
    (Code(1, 1, 8, seed=9), (("only", "F16", (40, 5), "tile", 100, 0.125),)),
    (
        SplitCode(Code(10, 2, 1, seed=300), 37, Code(10, 3, 2, seed=300)),
        (
            ("conv.weight", "F32", (4, 2, 3, 3), "none", 72, 0.5),
            ("fc.weight", "BF16", (6, 7), "hash", 10, 0.046875),
        ),
    ),
    (
        SplitCode(Code(12, 12, 3, seed=7), 1, Code(12, 12, 256, seed=7)),
        (("only", "F32", (300,), "none", 300, 0.75),),
    ),
)


def case(number: int, code: StreamCode, tensors: tuple) -> dict:
    """One entry of network.json; the message's padding is zero, as the format asks."""
    specs = tuple(
        SharedSpec(name, dtype, shape, KINDS.index(kind), n_values)
        for name, dtype, shape, kind, n_values, _ in tensors
    )
    header = NetworkHeader(code, specs)
    message, end = bytearray(np.random.default_rng(number).bytes(code.message_bytes(header.n_values))), 0
    for n_values, own in code.segments(header.n_values):
        end += own.message_bytes(n_values)
        message[end - 1] &= 0xFF << (-own.message_bits(n_values) % 8) & 0xFF
    scales = torch.tensor([t[5] for t in tensors])
    stream, weights = encode_stream_entry(header, scales, torch.frombuffer(message, dtype=torch.uint8))
    return {
        "tensors": [[t.name, t.dtype, t.shape] for t in specs],
        "stream": stream.hex(),
        "weights_float32": {name: w.numpy().astype("<f4").tobytes().hex() for name, w in weights.items()},
    }


if __name__ == "__main__":
    cases = [case(number, *parameters) for number, parameters in enumerate(CASES)]
    text = json.dumps(cases, indent=1, ensure_ascii=False) + "\n"
    Path(__file__).with_name("network.json").write_text(text, encoding="utf-8")
