"""What a calibrated compression of 7 billion weights takes on one GPU: predicted by counting, or run.

    python benchmarks/seven_billion.py                                 results/seven_billion.json
    python benchmarks/seven_billion.py --run SOURCE OUT --bits 3       on a machine that has one

Counted are the products of every pass of an effort, there and back, and codes at the floor of the trellis's
kernel (results/gpu-floors.json), without the work of bands around it. What a GPU reaches of its speed is
assumed, since no machine here has one. The model has 32 blocks of 4,096 states and 11,008 between them,
32,000 words and a head of its own.
"""

import argparse
import json
import time
from typing import Any

import record
import torch

import miracle_hub
from miracle_hub.calibrate.recipe import refit_options

_WIDTH, _BETWEEN, _BLOCKS, _WORDS = 4096, 11_008, 32, 32_000
_OF_BLOCK = 4 * _WIDTH * _WIDTH + 3 * _WIDTH * _BETWEEN
_MULTIPLIED = _BLOCKS * _OF_BLOCK + _WORDS * _WIDTH
_WEIGHTS = _MULTIPLIED + _WORDS * _WIDTH
# Floating-point operations per second that passes reach on an H200 in bfloat16 and in float32: assumed.
_BF16, _FP32 = 3.5e14, 4.0e13
# Of `recipe`, `known` and `trials`, in tokens: sensitivity, a step, judgments, trials.
_LOOKED_AT, _STEP, _JUDGED, _TRIED = 16_384, 1024, 8192, 2048
_KINDS, _DAMPINGS, _INSTANCES, _JUDGMENTS = 7, 4, 3, 5
# Of the last problem of its kind in results/gpu-floors.json: windows of 12 bits, 2 bits a weight.
_CODE = "12.2.1 n=134217728"
_BYTES = 4  # of a float


def seconds(effort: int) -> dict[str, float]:
    """Of every part of a compression at an effort."""
    options = refit_options(effort, _WEIGHTS, _MULTIPLIED)
    blocks, of_block = options.blocks, 2 * _BLOCKS * _OF_BLOCK
    there = 2 * _MULTIPLIED  # operations per token
    moments = 2 * _BLOCKS * (6 * _WIDTH**2 + _BETWEEN**2)  # sums of products of the inputs of every matrix
    code = _seconds_per_code()
    tried = _KINDS * _DAMPINGS * (_TRIED * there / _FP32 + _INSTANCES * _OF_BLOCK / _KINDS * code)
    found = {
        "sensitivity": _LOOKED_AT * (2 * there + moments) / _FP32,  # gradients of outputs alone
        "trials of feedback": tried if options.is_any else 0.0,
        "coding": _WEIGHTS * code,
        "tuning": options.end_steps * _STEP * (there / _FP32 + 3 * there / _BF16),
        "judgments": _JUDGMENTS * _JUDGED * there / _FP32,
    }
    if blocks:
        steps = (blocks.groups - 1) * blocks.steps
        passes = 2 * blocks.batches * _STEP * of_block / _FP32
        found["blocks"] = steps * _STEP * 3 * of_block / _BF16 + passes
    return found


def gigabytes(effort: int) -> dict[str, float]:
    """At the peak, on the GPU unless it says otherwise."""
    options = refit_options(effort, _WEIGHTS, _MULTIPLIED)
    batches = 0 if options.blocks is None else options.blocks.batches
    n_tokens = (batches + _JUDGED // 2 // _STEP) * _STEP
    parts = {
        "the dense model": _WEIGHTS * _BYTES,
        "a block's gradients, moments and what may be undone": 4 * _OF_BLOCK * _BYTES,
        "states of all batches: dense, coded and wanted": 3 * n_tokens * _WIDTH * _BYTES,
        "activations of one step through the model": _BLOCKS * _STEP * (8 * _WIDTH + 3 * _BETWEEN) * 2,
        "curvature, of which the sums are on the GPU at first": _BLOCKS
        * (6 * _WIDTH**2 + _BETWEEN**2)
        * _BYTES,
    }
    return {name: round(n_bytes / 1e9, 1) for name, n_bytes in parts.items()}


def _seconds_per_code() -> float:
    floors = json.loads((record.RESULTS / "gpu-floors.json").read_text())["results"]["problems"]
    (found,) = [p for p in floors if p["op"] == "slide" and p["problem"] == _CODE]
    return found["floor_microseconds"] / 1e6 / found["size"]


def predicted(effort: int) -> dict[str, Any]:
    """Minutes and memory at an effort."""
    parts = {name: round(value / 60, 2) for name, value in seconds(effort).items()}
    return {
        "effort": effort,
        "minutes": round(sum(parts.values()), 1),
        "parts": parts,
        "gb": gigabytes(effort),
    }


def run(source: str, out: str, bits: float, effort: int) -> dict[str, Any]:
    """Compress for real; minutes, and the memory of the GPU at the peak."""
    start = time.perf_counter()
    report = miracle_hub.compress(source, out, bits_per_weight=bits, effort=effort, window_bits=12)
    peak = torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else 0.0
    minutes = (time.perf_counter() - start) / 60
    return {"minutes": round(minutes, 1), "gb": round(peak, 1), "report": str(report)}


def main() -> None:
    """Predict, or run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--run", nargs=2, metavar=("SOURCE", "OUT"))
    parser.add_argument("--bits", type=float, default=3.0)
    parser.add_argument("--effort", type=int, default=2)
    a = parser.parse_args()
    found: dict[str, Any] = {"n_weights": _WEIGHTS, "predicted": [predicted(effort) for effort in range(4)]}
    if a.run:
        found["run"] = run(a.run[0], a.run[1], a.bits, a.effort)
    print(json.dumps(found, indent=1))
    record.record("seven_billion", found)


if __name__ == "__main__":
    main()
