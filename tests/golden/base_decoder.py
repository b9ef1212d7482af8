"""Reads a difference and its base in numpy, by FORMAT.md, "Base", and the sections it names."""

import hashlib
import json
import runpy
import zlib
from pathlib import Path

import numpy as np

HELD = runpy.run_path(str(Path(__file__).with_name("repository_decoder.py")))
decode, stored, rounded, DTYPES = (HELD[name] for name in ("decode", "stored", "rounded", "DTYPES"))


def entries_in(folder):
    index = folder / "model.safetensors.index.json"
    names = json.loads(index.read_text())["weight_map"].values() if index.exists() else [index.name[:17]]
    return {name: entry for file in sorted(set(names)) for name, entry in stored(folder / file).items()}


def widened(dtype, raw):
    """Any floating dtype as float32."""
    if dtype == "BF16":
        return (np.frombuffer(raw, "<u2").astype("<u4") << 16).view("<f4")
    return np.frombuffer(raw, {"F32": "<f4", "F16": "<f2", "F64": "<f8"}[dtype]).astype("<f4")


def difference(raw):
    """Number of the dtype, and float32 differences in their shape."""
    if raw[:5] == b"MRCL\2":
        dtype, weights, *_ = decode(raw[:4] + b"\1" + raw[5:])
        return dtype, weights
    assert raw[:5] == b"MRCR\1" and zlib.crc32(raw[9:]) == int.from_bytes(raw[5:9], "little")
    numbers, at = [], 9
    while len(numbers) < 1 or len(numbers) < 1 + numbers[0]:
        end = next(i for i in range(at, len(raw)) if raw[i] < 128) + 1
        numbers.append(sum((digit & 127) << 7 * i for i, digit in enumerate(raw[at:end])))
        at = end
    shape, end = numbers[1:], at + -(-numbers[1] // 8)
    rows = np.unpackbits(np.frombuffer(raw[at:end], "u1"), bitorder="little")[: shape[0]].astype(bool)
    dtype, own = difference(raw[end:])
    weights = np.zeros((shape[0], own.shape[1]), "<f4")
    weights[rows] = own
    return dtype, weights.reshape(shape)


def read(folder, base):
    """Every tensor by name: dtype, shape, bytes."""
    facts = json.loads((folder / "config.json").read_text())["quantization_config"]
    stated, theirs, tensors = facts["base_model"], entries_in(base), entries_in(folder)
    own_prefix, their_prefix = stated.get("prefix", ("", ""))
    assert facts["format_version"] == 4
    for name, digest in stated["tensors"].items():
        dtype, shape, raw = theirs[their_prefix + name.removeprefix(own_prefix)]
        assert digest == hashlib.sha256(f"{dtype} {json.dumps(shape)}\n".encode() + raw).hexdigest()[:32]
        if name in tensors:
            number, weights = difference(tensors[name][2])
            total = widened(dtype, raw).reshape(shape) + weights
            tensors[name] = DTYPES[number], shape, rounded(total, DTYPES[number])
        else:
            cast = stated.get("dtypes", {}).get(name, dtype)
            tensors[name] = cast, shape, raw if cast == dtype else rounded(widened(dtype, raw), cast)
    return tensors
