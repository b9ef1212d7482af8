"""Writes coding.json, once: messages of random bytes and what the reference decodes from them.

Run it again only for a new version of the format: python tests/golden/make_coding.py
"""

import hashlib
import json
from pathlib import Path

import numpy as np
import torch

from miracle_hub.code import Code
from miracle_hub.coding import reference

FIRST = 16
# (L, k, V, seed, stream_id, n)
CASES = (
    (8, 2, 1, 0, 0, 100),
    (12, 1, 1, 1, 0, 301),
    (12, 3, 1, 0xDEADBEEF, 7, 200),
    (10, 4, 2, 12345, 1, 333),
    (16, 16, 8, 42, 0, 128),
    (8, 8, 4, 2**64 - 1, 2**32 - 1, 61),
    (12, 5, 9, 99, 3, 100),
    (18, 7, 9, 0x0123456789ABCDEF, 5, 91),
    (24, 24, 3, 0xFEDCBA9876543210, 0x80000001, 50),
    (24, 5, 1, 0x8000000000000000, 11, 80),
    (24, 1, 17, 3, 0, 120),
    (1, 1, 1, 4, 0, 77),
    (1, 1, 8, 5, 2, 40),
    (8, 3, 256, 6, 0, 1000),
    (14, 14, 256, 7, 9, 513),
    (9, 4, 7, 8, 0, 1),
    (20, 19, 1, 9, 0, 64),
)


def case(number: int, L: int, k: int, V: int, seed: int, stream_id: int, n: int) -> dict[str, int | str]:
    """One entry of coding.json; the bits that fill the last byte are random too, and decode to nothing."""
    code = Code(L, k, V, seed, stream_id)
    message = np.random.default_rng(number).bytes(code.message_bytes(n))
    values = reference.decode_stream(torch.frombuffer(bytearray(message), dtype=torch.uint8), code, n).numpy()
    return {
        "L": L,
        "k": k,
        "V": V,
        "seed": seed,
        "stream_id": stream_id,
        "n": n,
        "message": message.hex(),
        "first_float16": values[:FIRST].astype(">f2").tobytes().hex(" ", 2),
        "float32_sha256": hashlib.sha256(values.astype("<f4").tobytes()).hexdigest(),
    }


if __name__ == "__main__":
    cases = [case(number, *parameters) for number, parameters in enumerate(CASES)]
    Path(__file__).with_name("coding.json").write_text(json.dumps(cases, indent=1) + "\n")
