"""Weights per second of the encoders and of the decoder, all threads, in one run.

Floors on two cores: sliding L = 12, k = 2 encodes 250,000 weights/s, decoding without
rotation gives 100 M weights/s. `scalar_loop` is the same recursion as a plain numba loop, the
reason for coding/lanes.py.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numba import njit
from record import record

from miracle_hub.code import Code
from miracle_hub.codec.trellis import decode_payload, encode_tensor
from miracle_hub.coding import cpu
from miracle_hub.coding.encode import encode_stream
from miracle_hub.coding.posterior import squared_error_cost
from miracle_hub.coding.scales import prior_scale
from miracle_hub.format.payload import Segment

_ENCODED = ((8, 2, 1, 4_000_000), (12, 2, 1, 4_000_000), (14, 2, 1, 1_000_000), (16, 2, 1, 400_000))
_ENCODED += ((12, 1, 1, 2_000_000), (12, 4, 1, 4_000_000), (16, 16, 16, 131_072))
_DECODED = ((12, 2, 1), (14, 2, 1), (16, 2, 1), (14, 1, 4), (14, 3, 2), (16, 16, 16), (20, 4, 2))
_DECODED_WEIGHTS = 1 << 24


def median_seconds(work: Callable[[], Any], repeats: int = 5) -> float:
    """Median time of a call after one that is not counted."""
    work()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def encoding() -> list[dict[str, Any]]:
    """`best` on a Gaussian source."""
    rows = []
    for window, step, weights, n_weights in _ENCODED:
        code = Code(window, step, weights)
        source = torch.randn(n_weights, generator=torch.Generator().manual_seed(1)) / prior_scale(code)
        cost = squared_error_cost(source)
        rate = n_weights / median_seconds(lambda cost=cost, code=code: encode_stream(cost, code), 3)
        rows.append({"code": [window, step, weights], "weights_per_second": round(rate)})
        print("encode", rows[-1], flush=True)
    return rows


def decoding() -> list[dict[str, Any]]:
    """Streams into memory that was touched before: the decoder itself."""
    rows = []
    out = np.zeros(_DECODED_WEIGHTS, np.float32)
    for window, step, weights in _DECODED:
        code = Code(window, step, weights)
        n_bytes = code.message_bytes(_DECODED_WEIGHTS)
        message = np.random.default_rng(0).integers(0, 256, n_bytes, dtype=np.uint8)
        padded, chunk = cpu.pad_message(message), 1 << 18

        def work(code: Code = code, padded: np.ndarray = padded, chunk: int = chunk) -> None:
            tasks = ((padded, code, start, out[start : start + chunk]) for start in range(0, out.size, chunk))
            cpu.in_threads(cpu.decode_range, tasks)

        rate = _DECODED_WEIGHTS / median_seconds(work)
        rows.append({"code": [window, step, weights], "weights_per_second": round(rate)})
        print("decode", rows[-1], flush=True)
    return rows


def payloads() -> list[dict[str, Any]]:
    """decode_payload of a 16 M weight matrix: fresh memory, scales, rotation, digest and checks included."""
    rows = []
    weights = torch.randn(4096, 4096, generator=torch.Generator().manual_seed(4))
    for rotation in (1, 128):
        raw = encode_tensor(weights, [Segment(4096, Code(8, 2, 1), True)], rotation, where="matrix")
        payload = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
        seconds = median_seconds(lambda payload=payload: decode_payload(payload, "matrix"))
        rows.append({"rotation": rotation, "weights_per_second": round(weights.numel() / seconds)})
        print("payload", rows[-1], flush=True)
    return rows


@njit(nogil=True, fastmath=True)
def _scalar_loop(source, codebook, step_bits, nodes, reached, choices):
    for t in range(source.shape[0]):
        after = np.empty(nodes, np.float32)
        for node in range(nodes):
            best, choice = np.float32(1e30), 0
            for i in range(1 << step_bits):
                state = i * nodes + node
                cost = reached[state >> step_bits] + (source[t] - codebook[state]) ** 2
                if cost < best:
                    best, choice = cost, i
            after[node], choices[t, node] = best, choice
        reached = after
    return reached


def scalar_loop() -> dict[str, Any]:
    """One thread of the plain loop, L = 12, k = 2."""
    source = np.random.default_rng(1).standard_normal(20_000).astype(np.float32)
    codebook = cpu.candidate_table(Code(12, 2, 1))[:, 0].copy()
    choices = np.empty((source.size, 1024), np.uint8)
    seconds = median_seconds(
        lambda: _scalar_loop(source, codebook, 2, 1024, np.zeros(1024, np.float32), choices), 3
    )
    return {"weights_per_second_one_thread": round(source.size / seconds)}


if __name__ == "__main__":
    record(
        "throughput",
        {"encode": encoding(), "decode": decoding(), "payload": payloads(), "scalar_loop": scalar_loop()},
    )
