"""Differences of bit patterns: what a number has beyond that of a base, in as few bits as are news.

FORMAT.md, "Bits payload", is normative. Bit patterns of floating numbers become whole numbers that rise as
the numbers do; a difference of two is known by its size (how many bits it has), its next two bits, and the
rest. Sizes and next bits are decided bit by bit: an adaptive estimate gives each a chance, and an arithmetic
coder of two bounds (Witten, Neal & Cleary 1987, "Arithmetic coding for data compression"; bounds of 48 bits
do without its bits to follow) spends what it is worth. The rest is as good as random and stands as it is.

A fine-tuning moves weights by about the same, whatever they are: numbers of a large exponent by few of
their units, those of a small one by many. What a size is expected to be is therefore the mean of size and
exponent over the numbers that moved before, less the exponent of the base's number here. That is the context,
with how many numbers right before did not move: of a word table most rows stay where they were.
"""

import numpy as np
from numba import njit

from miracle_hub.errors import FormatError

# Bounds have 48 bits; a byte is written once it is the same in both.
_TOP, _MOST = 40, (1 << 48) - 1
# Contexts are halves of a bit of the expected size, for each of four lengths of a run that did not move;
# sizes have a tree of at most 64 nodes in each of them, and every size one of four nodes for the next bits.
_LEAST, _CONTEXTS, _RUNS, _NODES, _NEXT = -16, 96, 4, 64, 4
_SIZES = _RUNS * _CONTEXTS * _NODES
# An estimate is a mean over what was seen, at last of about this many.
_LONGEST = 254
_RATES = 65536 // np.arange(2, _LONGEST + 3)
# The mean of size and exponent, in sixteenths, moves by a share of 2^-5.
_SIXTEENTHS, _MOVES = 16, 5
_SOUND, _TOO_LARGE, _CODED_LENGTH, _PLAIN_LENGTH = range(4)
_DEFECTS = {
    _TOO_LARGE: "differences within the range of the dtype",
    _CODED_LENGTH: "coded bits of the length that is stated",
    _PLAIN_LENGTH: "plain bits of the length that is stated, and zeros behind them",
}

_jit = njit(nogil=True, cache=True, error_model="numpy")


def encode_piece(own: np.ndarray, base: np.ndarray, fraction_bits: int) -> tuple[bytes, bytes]:
    """What `own` has beyond `base`: coded bits and plain bits; `decode_piece` is the mirror.

    Args:
        own, base: bit patterns, uint16 or uint32 `[n]`, both of one dtype, n ≥ 1.
        fraction_bits: below the exponent.
    """
    width = 8 * own.itemsize
    # A decision writes at most 6 bytes: bounds of 48 bits then differ in the first.
    coded = np.empty(6 * 8 * len(own) + 1, np.uint8)
    plain = np.empty(4 * len(own) + 1, np.uint8)
    n_coded, n_plain = _encode(own, base, width, fraction_bits, coded, plain)
    return coded[:n_coded].tobytes(), plain[:n_plain].tobytes()


def decode_piece(
    coded: bytes, plain: bytes, base: np.ndarray, fraction_bits: int, own: np.ndarray, where: str
) -> None:
    """Write into `own`, uint16 or uint32 `[n]`, the bit patterns that `encode_piece` took.

    Raises:
        FormatError: the strings are none that it gives.
    """
    strings = [np.frombuffer(string, np.uint8) for string in (coded, plain)]
    found = _decode(base, 8 * base.itemsize, fraction_bits, *strings, own)
    if found != _SOUND:
        raise FormatError(
            f"{where}: bits payload: expected {_DEFECTS[found]}, found others; the file is damaged or was "
            "not written by miracle-hub"
        )


@_jit
def _ordered(pattern, sign):
    """A pattern as a whole number that rises as the floating one does."""
    return 2 * sign - 1 - pattern if pattern & sign else pattern + sign


@_jit
def _pattern(ordered, sign):
    """The mirror of `_ordered`."""
    return ordered - sign if ordered & sign else 2 * sign - 1 - ordered


@_jit
def _folded(difference, sign):
    """A difference modulo the range, nearest to zero, as 0, -1, 1, -2, 2, …"""
    difference &= 2 * sign - 1
    return 2 * difference if difference < sign else 2 * (2 * sign - difference) - 1


@_jit
def _unfolded(folded):
    """The mirror of `_folded`."""
    return (folded >> 1) ^ -(folded & 1)


@_jit
def _context(mean, exponent, still):
    """By what is expected, and how many numbers before did not move: the first of the nodes of a size."""
    run = (1 if still > 0 else 0) + (1 if still > 3 else 0) + (1 if still > 15 else 0)
    expected = (mean - _SIXTEENTHS * exponent) >> 3
    place = min(max(expected, _LEAST), _LEAST + _CONTEXTS - 1) - _LEAST
    return (run * _CONTEXTS + place) * _NODES


@_jit
def _moved(mean, still, size, exponent):
    """What is expected after a number."""
    if size == 0:
        return mean, still + 1
    return mean + ((_SIXTEENTHS * (size + exponent) - mean) >> _MOVES), 0


@_jit
def _middle(low, high, chance):
    """The last number between two bounds that stands for a 1."""
    return low + ((high - low) >> 16) * ((chance >> 16) | 1)


@_jit
def _learn(chances, counts, at, bit):
    """The chance of a 1, of 2^32, moves towards what was seen."""
    chance, count = np.int64(chances[at]), np.int64(counts[at])
    if bit:
        chances[at] = chance + (((1 << 32) - 1 - chance) * _RATES[count] >> 16)
    else:
        chances[at] = chance - (chance * _RATES[count] >> 16)
    if count < _LONGEST:
        counts[at] = count + 1


@_jit
def _put(bit, at, low, high, chances, counts, coded, end):
    middle = _middle(low, high, np.int64(chances[at]))
    if bit:
        high = middle
    else:
        low = middle + 1
    _learn(chances, counts, at, bit)
    while low >> _TOP == high >> _TOP:
        coded[end] = low >> _TOP
        end += 1
        low, high = (low << 8) & _MOST, ((high << 8) & _MOST) | 255
    return low, high, end


@_jit
def _take(at, low, high, word, chances, counts, coded, end):
    middle = _middle(low, high, np.int64(chances[at]))
    bit = 1 if word <= middle else 0
    if bit:
        high = middle
    else:
        low = middle + 1
    _learn(chances, counts, at, bit)
    while low >> _TOP == high >> _TOP:
        word = ((word << 8) & _MOST) | _byte(coded, end)
        end += 1
        low, high = (low << 8) & _MOST, ((high << 8) & _MOST) | 255
    return bit, low, high, word, end


@_jit
def _byte(data, at):
    """Behind the end there are zeros."""
    return np.int64(data[at]) if at < len(data) else 0


@_jit
def _fresh():
    n_estimates = _SIZES + 33 * _NEXT
    return np.full(n_estimates, 1 << 31, np.uint32), np.zeros(n_estimates, np.uint8)


@_jit
def _encode(own, base, width, fraction_bits, coded, plain):
    chances, counts = _fresh()
    sign, depth = 1 << (width - 1), 5 if width == 16 else 6
    low, high, end = 0, _MOST, 0
    held, n_held, plain_end, still = 0, 0, 0, 0
    mean = _SIXTEENTHS * ((np.int64(base[0]) & (sign - 1)) >> fraction_bits)
    for i in range(len(own)):
        theirs = np.int64(base[i])
        exponent = (theirs & (sign - 1)) >> fraction_bits
        folded = _folded(_ordered(np.int64(own[i]), sign) - _ordered(theirs, sign), sign)
        size = 0
        while folded >> size:
            size += 1
        first, node = _context(mean, exponent, still), 1
        for place in range(depth - 1, -1, -1):
            bit = size >> place & 1
            low, high, end = _put(bit, first + node, low, high, chances, counts, coded, end)
            node = 2 * node + bit
        first, node, rest = _SIZES + size * _NEXT, 1, size - 1
        for _ in range(2):
            if rest > 0:
                rest -= 1
                bit = folded >> rest & 1
                low, high, end = _put(bit, first + node, low, high, chances, counts, coded, end)
                node = 2 * node + bit
        if rest > 0:
            held = held << rest | folded & ((1 << rest) - 1)
            n_held += rest
            while n_held >= 8:
                n_held -= 8
                plain[plain_end] = held >> n_held
                plain_end += 1
                held &= (1 << n_held) - 1
        mean, still = _moved(mean, still, size, exponent)
    coded[end] = (low >> _TOP) + 1  # with zeros behind it a number between the bounds
    if n_held:
        plain[plain_end] = held << (8 - n_held)
        plain_end += 1
    return end + 1, plain_end


@_jit
def _decode(base, width, fraction_bits, coded, plain, own):
    chances, counts = _fresh()
    sign, depth = 1 << (width - 1), 5 if width == 16 else 6
    low, high, word, end = 0, _MOST, 0, 6
    for i in range(end):
        word = word << 8 | _byte(coded, i)
    held, n_held, plain_end, still = 0, 0, 0, 0
    mean = _SIXTEENTHS * ((np.int64(base[0]) & (sign - 1)) >> fraction_bits)
    for i in range(len(base)):
        theirs = np.int64(base[i])
        exponent = (theirs & (sign - 1)) >> fraction_bits
        first, node = _context(mean, exponent, still), 1
        for _ in range(depth):
            bit, low, high, word, end = _take(first + node, low, high, word, chances, counts, coded, end)
            node = 2 * node + bit
        size = node - (1 << depth)
        if size > width:
            return _TOO_LARGE
        first, node, rest = _SIZES + size * _NEXT, 1, size - 1
        for _ in range(2):
            if rest > 0:
                rest -= 1
                bit, low, high, word, end = _take(first + node, low, high, word, chances, counts, coded, end)
                node = 2 * node + bit
        folded = node if size else 0
        if rest > 0:
            while n_held < rest:
                held = held << 8 | _byte(plain, plain_end)
                n_held, plain_end = n_held + 8, plain_end + 1
            n_held -= rest
            folded = folded << rest | held >> n_held
            held &= (1 << n_held) - 1
        own[i] = _pattern((_ordered(theirs, sign) + _unfolded(folded)) & (2 * sign - 1), sign)
        mean, still = _moved(mean, still, size, exponent)
    if end - 5 != len(coded):
        return _CODED_LENGTH
    return _SOUND if plain_end == len(plain) and held == 0 else _PLAIN_LENGTH
