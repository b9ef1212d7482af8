"""Decodes exact payloads in numpy, by FORMAT.md, "Exact payload", and the sections it names."""

import zlib

import numpy as np

DTYPES = "F32 BF16 F16 F64 I64 I32 I16 I8 U8 BOOL U64 U32 U16 F8_E4M3 F8_E5M2 F8_E8M0 C64".split()
BYTES = (4, 2, 2, 8, 8, 4, 2, 1, 1, 1, 8, 4, 2, 1, 1, 1, 8)


def digest(raw):
    words = np.frombuffer(raw + bytes(-len(raw) % 4), "<u4")
    x = np.arange(words.size, dtype="u8") * np.uint64(0x9E3779B97F4A7C15) + words
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ x >> np.uint64(shift)) * np.uint64(factor)
    return int((x ^ x >> np.uint64(31)).sum())


def decode(data):
    """Dtype, shape and little-endian bytes, and the digest."""
    at = 9
    assert data[:5] == b"MRCX\1" and zlib.crc32(data[at:]) == int.from_bytes(data[5:at], "little")

    def number():
        nonlocal at
        start, at = at, next(i for i in range(at, len(data)) if data[i] < 128) + 1
        return sum((digit & 127) << 7 * i for i, digit in enumerate(data[start:at]))

    dtype, shape = number(), [number() for _ in range(number())]
    n, width, form = int(np.prod(shape, dtype=object)), BYTES[dtype], number()
    n_words = number() if form < 2 else 0
    stated, at = int.from_bytes(data[at : at + 8], "little"), at + 8
    listed, at = np.frombuffer(data, f"<u{width}", n_words, at), at + n_words * width
    bits = max(1, (n_words - 1).bit_length())
    length = -(-n * bits // 8) if n_words else n * width
    body, rest = data[at : at + length], data[at + length :]
    if form:
        inflate = zlib.decompressobj(-15)
        body, rest = inflate.decompress(data[at:]), inflate.unused_data
    assert len(body) == length and not any(rest)
    assert len(data) == max(len(data) - len(rest), -(-n // 2048))
    if n_words:
        places = np.unpackbits(np.frombuffer(body, "u1"))[: n * bits].reshape(n, bits)
        words = listed[places @ (1 << np.arange(bits)[::-1])]
    else:
        planes = np.frombuffer(body, "u1").reshape(width, n)
        words = np.ascontiguousarray(planes.T).view(f"<u{width}").ravel()
        words = np.cumsum(words, dtype=words.dtype) if form == 3 else words
    assert digest(words.tobytes()) == stated
    return DTYPES[dtype], shape, words.tobytes(), stated
