"""Reads a difference and its base in numpy, by FORMAT.md, "Base", and the sections it names."""

import hashlib
import json
import runpy
from pathlib import Path

import numpy as np

HELD = runpy.run_path(str(Path(__file__).with_name("repository_decoder.py")))
stored, rounded, DTYPES, exact = (HELD[n] for n in ("stored", "rounded", "DTYPES", "decode_exact"))
difference = runpy.run_path(str(Path(__file__).with_name("difference_decoder.py")))["difference"]


def entries_in(folder):
    index = folder / "model.safetensors.index.json"
    names = json.loads(index.read_text())["weight_map"].values() if index.exists() else [index.name[:17]]
    return {name: entry for file in sorted(set(names)) for name, entry in stored(folder / file).items()}


def widened(dtype, raw):
    """Any floating dtype as float32."""
    if dtype == "BF16":
        return (np.frombuffer(raw, "<u2").astype("<u4") << 16).view("<f4")
    return np.frombuffer(raw, {"F32": "<f4", "F16": "<f2", "F64": "<f8"}[dtype]).astype("<f4")


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
    return {
        name: exact(found[2])[:3] if found[2][:4] == b"MRCX" else found for name, found in tensors.items()
    }
