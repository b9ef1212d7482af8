"""Reads payloads of differences in numpy, by FORMAT.md, "Rows payload" and "Thin payload"."""

import runpy
import zlib
from pathlib import Path

import numpy as np

decode = runpy.run_path(str(Path(__file__).with_name("payload_decoder.py")))["decode"]


def numbers_at(raw, at, how_many):
    """Varints, and the byte after them."""
    numbers = []
    for _ in range(how_many):
        end = next(i for i in range(at, len(raw)) if raw[i] < 128) + 1
        numbers.append(sum((digit & 127) << 7 * i for i, digit in enumerate(raw[at:end])))
        at = end
    return numbers, at


def difference(raw):
    """Number of the dtype, and float32 differences in their shape."""
    if raw[:5] == b"MRCL\2":
        dtype, weights, *_ = decode(raw[:4] + b"\1" + raw[5:])
        return dtype, weights
    assert raw[4] == 1 and zlib.crc32(raw[9:]) == int.from_bytes(raw[5:9], "little")
    return {b"MRCR": some_rows, b"MRCT": of_low_rank}[raw[:4]](raw)


def some_rows(raw):
    (n_dimensions,), at = numbers_at(raw, 9, 1)
    shape, at = numbers_at(raw, at, n_dimensions)
    end = at + -(-shape[0] // 8)
    rows = np.unpackbits(np.frombuffer(raw[at:end], "u1"), bitorder="little")[: shape[0]].astype(bool)
    dtype, own = difference(raw[end:])
    weights = np.zeros((shape[0], own.shape[1]), "<f4")
    weights[rows] = own
    return dtype, weights.reshape(shape)


def of_low_rank(raw):
    (dtype, n_dimensions), at = numbers_at(raw, 9, 2)
    shape, at = numbers_at(raw, at, n_dimensions)
    (n_left, n_right), at = numbers_at(raw, at, 2)
    at = at + 12
    (_, left, *_), (_, right, *_) = decode(raw[at : at + n_left]), decode(raw[at + n_left :][:n_right])
    weights = np.zeros((), "<f4")
    for k, (one, other) in enumerate(zip(left, right, strict=True)):
        term = np.multiply(one[:, None], other, dtype="<f4")
        weights = weights + term if k else term
    weights = weights.reshape(shape)
    rest = raw[at + n_left + n_right :]
    return dtype, weights + difference(rest)[1] if rest else weights
