"""Casts a base's tensor and decodes a piece of a bits payload, by FORMAT.md, "Bits payload"."""

import runpy
from pathlib import Path

import numpy as np

BASE = runpy.run_path(str(Path(__file__).with_name("base_decoder.py")))


def cast(dtype, raw, kind, quiet):
    """The patterns of a base's tensor in another dtype."""
    if dtype == kind:
        return np.frombuffer(raw, "<u4" if kind == "F32" else "<u2")
    with np.errstate(all="ignore"):  # casts to infinity, and of NaN
        values = BASE["widened"](dtype, raw)
        words = np.frombuffer(BASE["rounded"](values, kind), "<u4" if kind == "F32" else "<u2")
    return np.where(np.isnan(values), words.dtype.type(quiet), words)


def decode(coded, plain, base, fraction, width):
    """The patterns of a piece, from those of the base."""
    half, estimates, found = 1 << width - 1, {}, []
    low, high, word, taken = 0, 2**48 - 1, int.from_bytes((coded + bytes(6))[:6], "big"), 6
    rest = iter("".join(f"{byte:08b}" for byte in plain))

    def bit(key):
        nonlocal low, high, word, taken
        chance, count = estimates.get(key, (1 << 31, 0))
        rate, middle = 65536 // (count + 2), low + (high - low >> 16) * (chance >> 16 | 1)
        if one := word <= middle:
            high, chance = middle, chance + ((2**32 - 1 - chance) * rate >> 16)
        else:
            low, chance = middle + 1, chance - (chance * rate >> 16)
        estimates[key] = chance, min(count + 1, 254)
        while low >> 40 == high >> 40:
            low, high, word = (number % 2**40 << 8 for number in (low, high, word))
            high, word, taken = high + 255, word + (coded[taken] if taken < len(coded) else 0), taken + 1
        return int(one)

    mean, still, way = 16 * (base[0] % half >> fraction), 0, 0
    for b, sign in ((b % half, b // half) for b in base):
        e, s, run = b >> fraction, 1, (still > 0) + (still > 3) + (still > 15)
        c, z = min(max(mean - 16 * e >> 3, -16), 79), 1
        turned = bit((run, c, 0))
        for _ in range(width.bit_length() - 1):
            s = 2 * s + bit((run, c, s))
        if s := s % width:
            way = 1 + bit((s, way))
        for i in range(s - 1):
            near = min(max(2 * s - c >> 1, -4), 3)
            z = 2 * z + (bit(("next", s, near, z)) if i < 2 else int(next(rest)))
        t = b if s == 0 else b + z if way == 1 else b - z
        assert 0 <= t < half
        found.append(t + half * (sign ^ turned))
        moved = max(e, t >> fraction) + (fraction + 1 if turned else min(s, fraction + 1))
        mean, still = (mean + (16 * moved - mean >> 5), 0) if s or turned else (mean, still + 1)
    assert taken == len(coded) + 5 and set(rest) <= {"0"}
    return found
