"""Decodes one message of the code in numpy, by FORMAT.md, "Stream", alone."""

import hashlib
from pathlib import Path

import numpy as np

TABLE = (Path(__file__).parents[2] / "miracle_hub/coding/quantiles.f16").read_bytes()
TABLE_SHA256 = "c84e2ee9a90a7a594e0c266c687ccb9dbfe20d0c0040f95fe05e2511d533ad11"
MASK = np.uint64(2**32 - 1)


def multiply(constant: int, word: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """High and low word of a 32 × 32 bit product."""
    product = np.uint64(constant) * word
    return product >> np.uint64(32), product & MASK


def philox4x32(counter: tuple[np.ndarray | int, ...], key: tuple[int, int]) -> np.ndarray:
    """Ten rounds of Philox4x32 (Salmon et al. 2011): uint32 `[…, 4]`, one row per counter."""
    x = [np.array(word) for word in np.broadcast_arrays(*(np.array(word, np.uint64) for word in counter))]
    for number in range(10):
        round_key = [
            (word + number * weyl) % 2**32 for word, weyl in zip(key, (0x9E3779B9, 0xBB67AE85), strict=True)
        ]
        high0, low0 = multiply(0xD2511F53, x[0])
        high1, low1 = multiply(0xCD9E8D57, x[2])
        x = [high1 ^ x[1] ^ np.uint64(round_key[0]), low1, high0 ^ x[3] ^ np.uint64(round_key[1]), low0]
    return np.stack(x, axis=-1).astype(np.uint32)


def windows(message: bytes, window_bits: int, step_bits: int, steps: int) -> list[int]:
    """The message as one long number, read at every step."""
    number, length = int.from_bytes(message, "big"), 8 * len(message)
    return [number >> (length - window_bits - step_bits * t) & (2**window_bits - 1) for t in range(steps)]


def decode(message: bytes, L: int, k: int, V: int, seed: int, stream_id: int, n: int) -> np.ndarray:
    """The candidates that `message` stands for, float16 `[n]`."""
    assert hashlib.sha256(TABLE).hexdigest() == TABLE_SHA256
    states = np.array(windows(message, L, k, -(-n // V)), np.uint64)
    groups = np.arange(-(-V // 8), dtype=np.uint64)
    words = philox4x32((states[:, None], groups, stream_id, 0), (seed % 2**32, seed >> 32))
    halves = np.stack((words & np.uint32(0xFFFF), words >> np.uint32(16)), axis=-1)
    u16 = halves.reshape(states.size, -1)[:, :V].ravel()[:n]
    return np.frombuffer(TABLE, "<f2")[u16]
