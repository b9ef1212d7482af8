"""Windows of a message looked up in a table of candidates: eight steps of one word, without a branch.

A word holds the windows of eight steps for all rates up to five bits a step and windows of up to 16 bits.
Taken one after the other, windows took several times as long.
"""

import numpy as np
from numba import njit

# Bytes behind a message, so that every word can be read whole.
PADDING = 8
_AT_ONCE = 8
# Candidates that are looked up before they are used elsewhere: a choice.
PIECE = 256
_jit = njit(nogil=True, cache=True, error_model="numpy")


@_jit
def word_at(message, byte):
    """Eight bytes of a padded message, the first one on top."""
    word = np.uint64(0)
    for i in range(8):
        word = (word << np.uint64(8)) | np.uint64(message[byte + i])
    return word


@_jit
def window_at(message, bit, window_bits):
    """The window that starts at `bit`."""
    word = word_at(message, bit >> 3)
    return (word >> np.uint64(64 - window_bits - (bit & 7))) & np.uint64((1 << window_bits) - 1)


@_jit
def decode_by_table(message, table, window_bits, step_bits, first, out):
    """Stream elements first, first + 1, … of a padded message; `table` is float32 [2^window_bits, V]."""
    width = table.shape[1]
    step, i = first // width, 0
    if first % width:  # what is left of a step
        state = window_at(message, step * step_bits, window_bits)
        for v in range(first % width, min(width, first % width + out.shape[0])):
            out[i] = table[state, v]
            i += 1
        step += 1
    # Eight steps are whole bytes: all eights begin at the same bit of one.
    if (_AT_ONCE - 1) * step_bits + window_bits + (step * step_bits & 7) <= 64:
        n = (out.shape[0] - i) // (_AT_ONCE * width)
        _decode_eights(message, table, window_bits, step_bits, step, out[i : i + n * _AT_ONCE * width])
        i += n * _AT_ONCE * width
        step += n * _AT_ONCE
    while i < out.shape[0]:
        state = window_at(message, step * step_bits, window_bits)
        for v in range(min(width, out.shape[0] - i)):
            out[i + v] = table[state, v]
        i += width
        step += 1


@_jit
def _decode_eights(message, table, window_bits, step_bits, step, out):
    """Eights of whole steps. Loops of lengths that the compiler knows are twice as fast for four weights."""
    width = table.shape[1]
    mask, bit = np.uint64((1 << window_bits) - 1), step * step_bits
    for i in range(0, out.shape[0], _AT_ONCE * width):
        word, shift = word_at(message, bit >> 3), np.uint64(64 - window_bits - (bit & 7))
        if width == 1:
            for j in range(_AT_ONCE):
                out[i + j] = table[(word >> (shift - np.uint64(j * step_bits))) & mask, 0]
        else:
            for j in range(_AT_ONCE):
                state, at = (word >> (shift - np.uint64(j * step_bits))) & mask, i + j * width
                if width == 2:
                    for v in range(2):
                        out[at + v] = table[state, v]
                elif width == 4:
                    for v in range(4):
                        out[at + v] = table[state, v]
                else:
                    for v in range(width):
                        out[at + v] = table[state, v]
        bit += _AT_ONCE * step_bits


@_jit
def decode_bands_by_table(message, table, code, n_rows, first_row, width, out):
    """Rows first_row, … of n_rows that are read band by band; code = (window_bits, step_bits).

    Rows of a band follow each other in the stream, so that pieces of several are looked up together.
    """
    together = max(1, PIECE // width)
    piece = np.empty(together * min(width, out.shape[1]), np.float32)
    for start in range(0, out.shape[1], width):
        of_band = min(width, out.shape[1] - start)
        for row in range(0, out.shape[0], together):
            n = min(together, out.shape[0] - row)
            first = n_rows * start + (first_row + row) * of_band
            decode_by_table(message, table, code[0], code[1], first, piece[: n * of_band])
            for i in range(n):
                for j in range(of_band):
                    out[row + i, start + j] = piece[i * of_band + j]
