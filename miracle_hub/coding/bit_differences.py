"""Differences of bit patterns: what a number has beyond that of a base, in as few bits as are news.

FORMAT.md, "Bits payload", is normative. Without its sign, the bit pattern of a floating number rises as the
number does. What is coded is whether the sign is another, and the difference of the rest: its size (how many
bits it has), its direction, its next two bits, and all others. All but the others are decided bit by bit: an
adaptive estimate gives each a chance, and an arithmetic coder of two bounds (Witten, Neal & Cleary 1987,
"Arithmetic coding for data compression"; bounds of 48 bits do without its bits to follow) spends what it is
worth. The others are as good as random and stand as they are.

A fine-tuning moves weights by about the same, whatever they are: numbers of a large exponent by few of
their units, those of a small one by many. What a size is expected to be is therefore the mean of size and
exponent, which is the move's logarithm, over the numbers that moved before, less the exponent of the base's
number here. That is the context, with how many numbers right before did not move: most rows of a word table
stay where they were.
"""

import numpy as np
from numba import njit

from miracle_hub.errors import FormatError

# Bounds have 48 bits; a byte is written once it is the same in both.
_TOP, _MOST = 40, (1 << 48) - 1
# Contexts are halves of a bit of the expected size, for each of four lengths of a run that did not move. Each
# has a tree of at most 32 nodes for the size, of which the root, 1, is preceded by the sign's, 0.
_LEAST, _CONTEXTS, _RUNS, _NODES = -16, 96, 4, 32
_DIRECTIONS = _RUNS * _CONTEXTS * _NODES
# For every size, by the direction before: none, up or down.
_NEXT = _DIRECTIONS + _NODES * 3
# For every size, by how far it is from what was expected, a tree of two bits.
_FARTHEST, _DISTANCES = 4, 8
_ESTIMATES = _NEXT + _NODES * _DISTANCES * 4
# An estimate is a mean over what was seen, at last of about this many: a choice, 1,022 are within 0.2 %.
_LONGEST = 254
_RATES = 65536 // np.arange(2, _LONGEST + 3)
# The mean of size and exponent, in sixteenths, moves by a share of 2^-5: a choice, 2^-6 and 2^-7 are within
# 0.3 % on Gaussian moves, and 1 % worse where rows differ.
_SIXTEENTHS, _MOVES = 16, 5
_SOUND, _TOO_LARGE, _CODED_LENGTH, _PLAIN_LENGTH = range(4)
_DEFECTS = {
    _TOO_LARGE: "numbers of the dtype",
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
    # A decision, of which a number has 9, writes at most 6 bytes: bounds of 48 bits then differ in the first.
    coded = np.empty(6 * 9 * len(own) + 1, np.uint8)
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
    first, second = (np.frombuffer(string, np.uint8) for string in (coded, plain))
    found: int = _decode(base, 8 * base.itemsize, fraction_bits, first, second, own)
    if found != _SOUND:
        raise FormatError(
            f"{where}: bits payload: expected {_DEFECTS[found]}, found others; the file is damaged or was "
            "not written by miracle-hub"
        )


@_jit
def _expected(mean, exponent):
    """Halves of a bit."""
    return min(max((mean - _SIXTEENTHS * exponent) >> 3, _LEAST), _LEAST + _CONTEXTS - 1)


@_jit
def _of_size(expected, still):
    """The first of the nodes of sign and size."""
    run = (1 if still > 0 else 0) + (1 if still > 3 else 0) + (1 if still > 15 else 0)
    return (run * _CONTEXTS + expected - _LEAST) * _NODES


@_jit
def _of_next(expected, n_bits):
    """The node before the first of those of the two bits below the highest."""
    distance = min(max((2 * n_bits - expected) >> 1, -_FARTHEST), _DISTANCES - _FARTHEST - 1) + _FARTHEST
    return _NEXT + (n_bits * _DISTANCES + distance) * 4


@_jit
def _moved(mean, n_bits, is_turned, largest, fraction_bits):
    """What is expected after a number that moved; `largest` is the larger of two exponents."""
    moved = largest + (fraction_bits + 1 if is_turned else min(n_bits, fraction_bits + 1))
    return mean + ((_SIXTEENTHS * moved - mean) >> _MOVES)


@_jit
def _bit_length(number):
    found = 0
    while number >> found:
        found += 1
    return found


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
    return np.full(_ESTIMATES, 1 << 31, np.uint32), np.zeros(_ESTIMATES, np.uint8)


@_jit
def _encode(own, base, width, fraction_bits, coded, plain):
    chances, counts = _fresh()
    most, depth = (1 << (width - 1)) - 1, 4 if width == 16 else 5
    low, high, end = 0, _MOST, 0
    held, n_held, plain_end, still, direction = 0, 0, 0, 0, 0
    mean = _SIXTEENTHS * ((np.int64(base[0]) & most) >> fraction_bits)
    for i in range(len(own)):
        ours, theirs = np.int64(own[i]), np.int64(base[i])
        is_turned = (ours ^ theirs) >> (width - 1)
        ours, theirs = ours & most, theirs & most
        exponent, difference = theirs >> fraction_bits, abs(ours - theirs)
        n_bits, expected = _bit_length(difference), _expected(mean, exponent)
        first, node = _of_size(expected, still), 1
        low, high, end = _put(is_turned, first, low, high, chances, counts, coded, end)
        for place in range(depth - 1, -1, -1):
            bit = n_bits >> place & 1
            low, high, end = _put(bit, first + node, low, high, chances, counts, coded, end)
            node = 2 * node + bit
        still = 0 if n_bits or is_turned else still + 1
        if n_bits:
            is_down = 1 if ours < theirs else 0
            first, node, rest = _DIRECTIONS + 3 * n_bits + direction, 1, n_bits - 1
            low, high, end = _put(is_down, first, low, high, chances, counts, coded, end)
            direction, first = 1 + is_down, _of_next(expected, n_bits)
            for _ in range(min(rest, 2)):
                rest -= 1
                bit = difference >> rest & 1
                low, high, end = _put(bit, first + node, low, high, chances, counts, coded, end)
                node = 2 * node + bit
            held, n_held = held << rest | difference & ((1 << rest) - 1), n_held + rest
            while n_held >= 8:
                n_held -= 8
                plain[plain_end] = held >> n_held
                held, plain_end = held & ((1 << n_held) - 1), plain_end + 1
        if still == 0:
            mean = _moved(mean, n_bits, is_turned, max(exponent, ours >> fraction_bits), fraction_bits)
    coded[end] = (low >> _TOP) + 1  # with zeros behind it a number between the bounds
    if n_held:
        plain[plain_end] = held << (8 - n_held)
    return end + 1, plain_end + (1 if n_held else 0)


@_jit
def _decode(base, width, fraction_bits, coded, plain, own):
    chances, counts = _fresh()
    most, depth = (1 << (width - 1)) - 1, 4 if width == 16 else 5
    low, high, word, end = 0, _MOST, 0, 6
    for i in range(end):
        word = word << 8 | _byte(coded, i)
    held, n_held, plain_end, still, direction = 0, 0, 0, 0, 0
    mean = _SIXTEENTHS * ((np.int64(base[0]) & most) >> fraction_bits)
    for i in range(len(base)):
        theirs, difference = np.int64(base[i]) & most, 0
        exponent = theirs >> fraction_bits
        expected = _expected(mean, exponent)
        first, node = _of_size(expected, still), 1
        is_turned, low, high, word, end = _take(first, low, high, word, chances, counts, coded, end)
        for _ in range(depth):
            bit, low, high, word, end = _take(first + node, low, high, word, chances, counts, coded, end)
            node = 2 * node + bit
        n_bits = node - (1 << depth)
        still = 0 if n_bits or is_turned else still + 1
        if n_bits:
            first, node, rest = _DIRECTIONS + 3 * n_bits + direction, 1, n_bits - 1
            is_down, low, high, word, end = _take(first, low, high, word, chances, counts, coded, end)
            direction, first = 1 + is_down, _of_next(expected, n_bits)
            for _ in range(min(rest, 2)):
                bit, low, high, word, end = _take(first + node, low, high, word, chances, counts, coded, end)
                node, rest = 2 * node + bit, rest - 1
            while n_held < rest:
                held, n_held, plain_end = held << 8 | _byte(plain, plain_end), n_held + 8, plain_end + 1
            n_held -= rest
            difference, held = node << rest | held >> n_held, held & ((1 << n_held) - 1)
            difference = -difference if is_down else difference
        ours = theirs + difference
        if not 0 <= ours <= most:
            return _TOO_LARGE
        own[i] = ours | ((np.int64(base[i]) >> (width - 1)) ^ is_turned) << (width - 1)
        if still == 0:
            mean = _moved(mean, n_bits, is_turned, max(exponent, ours >> fraction_bits), fraction_bits)
    if end - 5 != len(coded):
        return _CODED_LENGTH
    return _SOUND if plain_end == len(plain) and held == 0 else _PLAIN_LENGTH
