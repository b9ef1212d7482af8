"""Random damage to a file: a flipped bit, a truncation, inserted bytes, two tensors that changed places."""

import json
import random
from typing import Any


def damage(data: bytes, name: str, draw: random.Random) -> tuple[str, bytes]:
    """What was done to the bytes of a file, and the bytes that are left."""
    is_weights = name.endswith(".safetensors")
    kinds = [flipped, flipped, truncated, inserted] + [swapped_bytes, swapped_names] * is_weights
    return draw.choice(kinds)(data, is_weights, draw)


def flipped(data: bytes, is_weights: bool, draw: random.Random) -> tuple[str, bytes]:
    """One bit, of anything, of the header or of a plain tensor."""
    first, last = draw.choice(regions(data)) if is_weights else (0, len(data))
    bit = draw.randrange(8 * first, 8 * last)
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return f"bit {bit % 8} of byte {bit // 8} flipped", bytes(changed)


def truncated(data: bytes, is_weights: bool, draw: random.Random) -> tuple[str, bytes]:
    """The end is lost."""
    kept = draw.randrange(len(data))
    return f"truncated to {kept} bytes", data[:kept]


def inserted(data: bytes, is_weights: bool, draw: random.Random) -> tuple[str, bytes]:
    """Some bytes too many."""
    at, more = draw.randrange(len(data) + 1), draw.randbytes(draw.choice([1, 1, 2, 8]))
    return f"{more!r} inserted at byte {at}", data[:at] + more + data[at:]


def swapped_bytes(data: bytes, is_weights: bool, draw: random.Random) -> tuple[str, bytes]:
    """The bytes of two tensors of one size."""
    start, header = header_of(data)
    spans = {name: entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"}
    pairs = [
        (one, other)
        for one in spans
        for other in spans
        if one < other and spans[one][1] - spans[one][0] == spans[other][1] - spans[other][0] > 0
    ]
    if not pairs:
        return flipped(data, is_weights, draw)
    one, other = draw.choice(pairs)
    (a, b), (c, d) = spans[one], spans[other]
    changed = bytearray(data)
    changed[start + a : start + b], changed[start + c : start + d] = (
        data[start + c : start + d],
        data[start + a : start + b],
    )
    return f"bytes of {one} and {other} swapped", bytes(changed)


def swapped_names(data: bytes, is_weights: bool, draw: random.Random) -> tuple[str, bytes]:
    """The names of two tensors, of one dtype and shape where there are two."""
    start, header = header_of(data)
    names = sorted(name for name in header if name != "__metadata__")
    kinds = {name: (header[name]["dtype"], header[name]["shape"]) for name in names}
    pairs = [(a, b) for a in names for b in names if a < b]
    pairs = [(a, b) for a, b in pairs if kinds[a] == kinds[b]] or pairs
    if not pairs:
        return flipped(data, is_weights, draw)
    one, other = draw.choice(pairs)
    other_name = {one: other, other: one}
    text = json.dumps({other_name.get(name, name): entry for name, entry in header.items()}).encode()
    text += b" " * (-len(text) % 8)
    return f"names {one} and {other} swapped", len(text).to_bytes(8, "little") + text + data[start:]


def header_of(data: bytes) -> tuple[int, dict[str, Any]]:
    """Where the data of a safetensors file begins, and its header."""
    start = 8 + int.from_bytes(data[:8], "little")
    return start, json.loads(data[8:start])


def regions(data: bytes) -> list[tuple[int, int]]:
    """All of a file, its header, and some of its plain tensors."""
    start, header = header_of(data)
    offsets = [entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"]
    spans = [(start + first, start + last) for first, last in offsets if first < last]
    plain = [(a, b) for a, b in spans if data[a : a + 3] != b"MRC"]
    return [(0, len(data)), (0, start), *plain[:: max(1, len(plain) // 2)]]
