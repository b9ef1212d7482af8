"""Decodes whole payloads in numpy, by FORMAT.md, "Payload", and the sections it names."""

import zlib
from pathlib import Path

import numpy as np


def philox(counter, seed):
    c0, c1, c2, c3 = np.broadcast_arrays(*map(np.uint64, counter))
    key0, key1, word, half = seed % 2**32, seed // 2**32, np.uint64(2**32 - 1), np.uint64(32)
    for _ in range(10):
        p0, p1 = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1 = p1 >> half ^ c1 ^ np.uint64(key0), p1 & word
        c2, c3 = p0 >> half ^ c3 ^ np.uint64(key1), p0 & word
        key0, key1 = (key0 + 0x9E3779B9) % 2**32, (key1 + 0xBB67AE85) % 2**32
    return np.stack((c0, c1, c2, c3), axis=-1)


def decode(data):
    """Number of the dtype, float32 weights in their shape, relative squared error, digest."""
    at = 9
    assert data[:5] == b"MRCL\1" and zlib.crc32(data[at:]) == int.from_bytes(data[5:at], "little")

    def number():
        nonlocal at
        start, at = at, next(i for i in range(at, len(data)) if data[i] < 128) + 1
        return sum((digit & 127) << 7 * i for i, digit in enumerate(data[start:at]))

    dtype, shape = number(), [number() for _ in range(number())]
    columns, band, permuted, rotation, seed, stream = (number() for _ in range(6))
    segments = [[number() for _ in range(5)] for _ in range(number())]
    error, digest = np.frombuffer(data, "<f4", 1, at)[0], int.from_bytes(data[at + 4 : at + 12], "little")
    counts = [rows if per_row else 1 for rows, *_, per_row in segments]
    scales = (np.frombuffer(data, "<u2", sum(counts), at + 12).astype("<u4") << 16).view("<f4")
    table = np.fromfile(Path(__file__).parents[2] / "miracle_hub/coding/quantiles.f16", "<f2")
    at, band, parts = at + 12 + 2 * sum(counts), band or columns, []
    for (rows, L, k, V, _), count in zip(segments, counts, strict=True):
        n, steps = rows * columns, -(-rows * columns // V)
        bits = np.unpackbits(np.frombuffer(data, "u1", length := -(-(L - k + k * steps) // 8), at))
        windows = np.lib.stride_tricks.sliding_window_view(bits, L)[: k * steps : k]
        states = windows @ (1 << np.arange(L)[::-1])
        halves = philox((states[:, None], np.arange(-(-V // 8)), stream, 0), seed).astype("<u4").view("<u2")
        bands = np.split(np.arange(n).reshape(rows, columns), range(band, columns, band), axis=1)
        order = np.concatenate([rows_of_band.ravel() for rows_of_band in bands])
        keys = philox((np.arange(n), 0, stream, 1), seed)
        order = order[np.lexsort((keys[:, 0], keys[:, 1]))] if permuted else order
        z = table[halves.reshape(steps, -1)[:, :V]].ravel()[np.argsort(order)]
        parts.append(z.reshape(rows, columns) * scales[:count, None])
        at, scales = at + length, scales[count:]
    w = np.concatenate(parts)
    for stage in range(rotation):
        a, b = w.reshape(-1, 2, 2**stage).swapaxes(0, 1)
        w = np.stack((a + b, a - b), axis=1).reshape(shape)
    x = np.arange(w.size, dtype="u8") * np.uint64(0x9E3779B97F4A7C15) + w.view("<u4").ravel()
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ x >> np.uint64(shift)) * np.uint64(factor)
    assert at == len(data) and int((x ^ x >> np.uint64(31)).sum()) == digest
    return dtype, w.reshape(shape), error, digest
