"""Reads whole repositories in numpy, by FORMAT.md, "Repository", and the sections it names."""

import hashlib
import json
import runpy
from pathlib import Path

import numpy as np

PATHS = (Path(__file__).with_name(f"{kind}_decoder.py") for kind in ("payload", "exact"))
decode, decode_exact = (runpy.run_path(str(path))["decode"] for path in PATHS)
DTYPES = ("F32", "BF16", "F16", "F64")


def stored(file):
    """Every entry of a safetensors file by name: dtype, shape, bytes; float32 again where it was narrowed."""
    data, entries = file.read_bytes(), {}
    start = 8 + int.from_bytes(data[:8], "little")
    narrowed = (header := json.loads(data[8:start])).pop("__metadata__", {}).get("narrowed_from_F32", "[]")
    for name, entry in header.items():
        (first, last), dtype = entry["data_offsets"], entry["dtype"]
        raw = data[start + first : start + last]
        if dtype == "F16" and (narrowed == "*" or name in json.loads(narrowed)):
            dtype, raw = "F32", np.frombuffer(raw, "<f2").astype("<f4").tobytes()
        entries[name] = dtype, entry["shape"], raw
    return entries


def rounded(weights, dtype):
    """The bytes of float32 weights in another dtype."""
    word = weights.view("<u4")
    if dtype != "BF16":
        return weights.astype({"F32": "<f4", "F16": "<f2", "F64": "<f8"}[dtype]).tobytes()
    return (word + np.uint32(0x7FFF) + (word >> 16 & 1) >> 16).astype("<u2").tobytes()


def read(folder):
    """Every tensor of a repository by name: dtype, shape, bytes."""
    facts = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert facts["quant_method"] == "miracle" and facts["format_version"] in (1, 2, 3)
    index, tensors, coded, lines = folder / "model.safetensors.index.json", {}, {}, {}
    names = json.loads(index.read_text())["weight_map"].values() if index.exists() else [index.name[:17]]
    for file in sorted(set(names)):
        stage = int(file[12]) if file.startswith("model.stage-") else 1
        for name, (dtype, shape, raw) in stored(folder / file).items():
            if dtype == "U8" and len(shape) == 1 and raw[:4] == b"MRCL":
                number, weights, _, digest = decode(raw)
                lines[name] = f"{name} {digest:016x}\n"
                name = name.removesuffix(f".stage_{stage}") if stage > 1 else name
                dtype, earlier = coded[name] if stage > 1 else (DTYPES[number], None)
                coded[name] = dtype, weights if stage == 1 else earlier + weights
                continue
            if dtype == "U8" and len(shape) == 1 and raw[:4] == b"MRCX":
                dtype, shape, raw, digest = decode_exact(raw)
                lines[name] = f"{name} {digest:016x}\n"
            tensors[name] = dtype, shape, raw
    text = "".join(lines[name] for name in sorted(lines))
    assert facts["digest"] in (None, hashlib.sha256(text.encode()).hexdigest())
    return tensors | {name: (d, list(w.shape), rounded(w, d)) for name, (d, w) in coded.items()}
