"""Reads a lossless difference and its base in numpy, by FORMAT.md, "Bits payload" and "Base"."""

import json
import runpy
import zlib
from pathlib import Path

import numpy as np

PATHS = (Path(__file__).with_name(f"{kind}_decoder.py") for kind in ("bits", "exact"))
BITS, EXACT = (runpy.run_path(str(path)) for path in PATHS)
BASE = BITS["BASE"]
KINDS = (("F32", 23, 0x7FC00000), ("BF16", 7, 0x7FC0), ("F16", 10, 0x7E00))


def decode(data, dtype, raw):
    """Dtype, shape and bytes of a tensor, from its payload, and dtype and bytes of the base's."""
    at = 9
    assert data[:5] == b"MRCB\1" and zlib.crc32(data[at:]) == int.from_bytes(data[5:at], "little")

    def number():
        nonlocal at
        start, at = at, next(i for i in range(at, len(data)) if data[i] < 128) + 1
        return sum((digit & 127) << 7 * i for i, digit in enumerate(data[start:at]))

    kind, fraction, quiet = KINDS[number()]
    shape, found = [number() for _ in range(number())], []
    n = int(np.prod(shape, dtype=object))
    lengths = [(number(), number()) for _ in range(0, n, 2**20)]
    stated, at = int.from_bytes(data[at : at + 8], "little"), at + 8
    words = BITS["cast"](dtype, raw, kind, quiet)
    for first, (n_coded, n_plain) in zip(range(0, n, 2**20), lengths, strict=True):
        coded, plain = data[at : at + n_coded], data[at + n_coded : at + n_coded + n_plain]
        own, at = words[first : first + 2**20].tolist(), at + n_coded + n_plain
        found += BITS["decode"](coded, plain, own, fraction, 8 * words.itemsize)
    decoded = np.array(found, words.dtype).tobytes()
    assert not any(data[at:]) and len(data) == max(at, -(-n // 2048)) and EXACT["digest"](decoded) == stated
    return kind, shape, decoded


def read(folder, base):
    """Every tensor by name: dtype, shape, bytes."""
    stated = json.loads((folder / "config.json").read_text())["quantization_config"]["base_model"]
    theirs, tensors = BASE["entries_in"](base), BASE["entries_in"](folder)
    own_prefix, their_prefix = stated.get("prefix", ("", ""))
    for name in {**tensors, **stated["tensors"]}:
        raw = tensors[name][2] if name in tensors else b""
        if raw[:4] == b"MRCX":
            tensors[name] = EXACT["decode"](raw)[:3]
        if name in stated["tensors"]:
            dtype, shape, bits = theirs[their_prefix + name.removeprefix(own_prefix)]
            kind = stated.get("dtypes", {}).get(name, dtype)
            same = kind, shape, bits if kind == dtype else BASE["rounded"](BASE["widened"](dtype, bits), kind)
            tensors[name] = decode(raw, dtype, bits) if raw else same
    return tensors
