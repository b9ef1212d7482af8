"""Decodes a network's stream in numpy, by FORMAT.md, "Network", and the sections it names."""

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


def decode(data, tensors):
    """Float32 weights by name, for tensors [(name, dtype, shape), …] of the module."""
    at = 9
    assert data[:4] == b"MRCN" and zlib.crc32(data[at:]) == int.from_bytes(data[5:at], "little")

    def number():
        nonlocal at
        start, at = at, next(i for i in range(at, len(data)) if data[i] < 128) + 1
        return sum((digit & 127) << 7 * i for i, digit in enumerate(data[start:at]))

    L, *codes, seed = (number() for _ in range(4))
    codes = [[number(), *codes], [0, number(), number()]] if data[4] > 1 else [[0, *codes]]
    assert number() == len(tensors)
    sizes = [int(np.prod(shape)) for _, _, shape in tensors]
    sharing = [(kind := number(), number() if kind else size) for size in sizes]
    lines = (f"{name} {dtype} {'×'.join(map(str, shape))}\n" for name, dtype, shape in tensors)
    assert zlib.crc32("".join(lines).encode()) == int.from_bytes(data[at : at + 4], "little")
    scales = (np.frombuffer(data, "<u2", len(tensors), at + 12).astype("<u4") << 16).view("<f4")
    codes[-1][0] = (n := sum(values for _, values in sharing)) - sum(values for values, _, _ in codes)
    bits = np.unpackbits(np.frombuffer(data, "u1", offset=at + 12 + 2 * len(tensors)))
    table = np.fromfile(Path(__file__).parents[2] / "miracle_hub/coding/quantiles.f16", "<f2")
    z, weights = [], {}
    for count, k, V in codes:
        own, bits = np.split(bits, [-(-(L - k + k * (steps := -(-count // V))) // 8) * 8])
        states = np.lib.stride_tricks.sliding_window_view(own, L)[: k * steps : k] @ (1 << np.arange(L)[::-1])
        halves = philox((states[:, None], np.arange(-(-V // 8)), 0, 0), seed).astype("<u4").view("<u2")
        z.append(table[halves.reshape(steps, -1)[:, :V]].ravel()[:count])
    keys, values = philox((np.arange(n), 0, 0, 1), seed), np.empty(n, "<f4")
    values[np.lexsort((keys[:, 0], keys[:, 1]))] = np.concatenate([*z, bits])  # nothing is left of them
    for i, ((name, _, shape), size, (kind, count)) in enumerate(zip(tensors, sizes, sharing, strict=True)):
        words, own, values = philox((np.arange(size), 0, i, 1), seed), values[:count], values[count:]
        places = np.lexsort((words[:, 0], words[:, 1])) if kind == 1 else np.arange(size)
        signs = 1 - 2 * (words[:, 2] & 1).astype("<f4") if kind == 1 else np.ones(size, "<f4")
        weights[name] = ((own * scales[i])[places % count] * signs).reshape(shape)
    flat = np.concatenate([w.ravel() for w in weights.values()])
    x = np.arange(flat.size, dtype="u8") * np.uint64(0x9E3779B97F4A7C15) + flat.view("<u4")
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ x >> np.uint64(shift)) * np.uint64(factor)
    assert int((x ^ x >> np.uint64(31)).sum()) == int.from_bytes(data[at + 4 : at + 12], "little")
    return weights
