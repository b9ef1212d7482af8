"""The numba decoder: equal to `reference` bit for bit, a hundred times faster.

Parallel by plain threads over rows (the compiled functions release the interpreter lock), so it
needs no threading layer and the result cannot depend on the number of threads. No fast-math here.
"""

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import numpy as np
import torch
from numba import njit
from torch import Tensor

from miracle_hub.code import Code
from miracle_hub.coding.digest import GOLDEN, MIX_1, MIX_2
from miracle_hub.coding.lookup import PADDING, decode_bands_by_table, decode_by_table, window_at
from miracle_hub.coding.quantiles import quantiles
from miracle_hub.errors import TruncatedPayloadError

# Candidates of a stream are tabulated up to this many states × step_weights (8 MB of float32);
# beyond it Philox runs on the fly and memory stays bounded.
_TABLE_LIMIT = 1 << 21
# A table is made for a message of at least a step per this many states: making it then costs no more than
# some milliseconds per hundred bytes, and a file of many tiny streams cannot ask for a large one each.
_STATES_PER_STEP = 64
_ROWS_PER_TASK_WEIGHTS = 1 << 18

_jit = njit(nogil=True, cache=True, error_model="numpy")


def n_threads() -> int:
    """Threads to use: the processors this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def torch_threads() -> int:
    """Threads in which torch can work as well: it refuses new ones in a process that was forked after
    `torch.set_num_threads`.
    """
    with ThreadPoolExecutor(1) as pool:
        try:
            pool.submit(torch.get_num_threads).result()
        except RuntimeError:
            return 1
    return n_threads()


def in_threads(work: Callable[..., None], tasks: Iterable[tuple]) -> None:
    """Run `work(*task)` for every task; the first exception is raised."""
    tasks = list(tasks)
    if len(tasks) < 2 or n_threads() < 2:
        for task in tasks:
            work(*task)
        return
    with ThreadPoolExecutor(n_threads()) as pool:
        for done in [pool.submit(work, *task) for task in tasks]:
            done.result()


@_jit
def philox_halves(state, group, stream_id, key0, key1, halves):
    """Fill `halves` (8 × uint16) with the output of Philox4x32-10 at one counter."""
    mask = np.uint64(0xFFFFFFFF)
    c0, c1 = np.uint64(state), np.uint64(group)
    c2, c3 = np.uint64(stream_id), np.uint64(0)
    k0, k1 = np.uint64(key0), np.uint64(key1)
    for _ in range(10):
        p0 = np.uint64(0xD2511F53) * c0
        p1 = np.uint64(0xCD9E8D57) * c2
        c0, c1 = (p1 >> np.uint64(32)) ^ c1 ^ k0, p1 & mask
        c2, c3 = (p0 >> np.uint64(32)) ^ c3 ^ k1, p0 & mask
        k0 = (k0 + np.uint64(0x9E3779B9)) & mask
        k1 = (k1 + np.uint64(0xBB67AE85)) & mask
    for i, word in enumerate((c0, c1, c2, c3)):
        halves[2 * i] = np.uint16(word & np.uint64(0xFFFF))
        halves[2 * i + 1] = np.uint16(word >> np.uint64(16))


@_jit
def fill_candidates(first_state, quantile_table, stream_id, key0, key1, out):
    """out[i, v] = candidate of state first_state + i."""
    halves = np.empty(8, np.uint16)
    for i in range(out.shape[0]):
        for v in range(out.shape[1]):
            if v % 8 == 0:
                philox_halves(first_state + i, v // 8, stream_id, key0, key1, halves)
            out[i, v] = quantile_table[halves[v % 8]]


@lru_cache(1)
def quantiles_float32() -> np.ndarray:
    """The quantile table in the type that numba can compute with; the values stay float16's."""
    return quantiles().float().numpy()


def candidate_range(code: Code, first_state: int, n_states: int) -> np.ndarray:
    """Candidates of consecutive states, float32 [n_states, step_weights]."""
    out = np.empty((n_states, code.step_weights), np.float32)
    keys = (code.stream_id, code.seed & 0xFFFFFFFF, code.seed >> 32)
    fill_candidates(first_state, quantiles_float32(), *keys, out)
    return out


def candidates(states: np.ndarray, code: Code) -> np.ndarray:
    """Twin of `reference.candidates`: float32 [n, step_weights]."""
    out = np.empty((states.size, code.step_weights), np.float32)
    keys = (code.stream_id, code.seed & 0xFFFFFFFF, code.seed >> 32)
    chunk = max(1, _ROWS_PER_TASK_WEIGHTS // code.step_weights)
    in_threads(
        lambda at: _fill_states(states[at], quantiles_float32(), *keys, out[at]),
        ((slice(start, start + chunk),) for start in range(0, states.size, chunk)),
    )
    return out


@_jit
def _fill_states(states, quantile_table, stream_id, key0, key1, out):
    for i in range(states.shape[0]):
        fill_candidates(states[i], quantile_table, stream_id, key0, key1, out[i : i + 1])


@lru_cache(32)
def _cached_table(seed: int, stream_id: int, window_bits: int, step_weights: int) -> np.ndarray:
    code = Code(window_bits, window_bits, step_weights, seed, stream_id)
    table = candidate_range(code, 0, 1 << window_bits)
    table.setflags(write=False)
    return table


def candidate_table(code: Code) -> np.ndarray:
    """All candidates of a stream, float32 [2^L, V]; shared by codes that differ in step_bits only."""
    return _cached_table(code.seed, code.stream_id, code.window_bits, code.step_weights)


@_jit
def _decode_philox(message, quantile_table, code, stream_id, key0, key1, first, out):
    """Stream elements first, first + 1, … without a table; code = (window_bits, step_bits, step_weights)."""
    window_bits, step_bits, width = code
    halves = np.empty(8, np.uint16)
    last_step, last_group = np.int64(-1), np.int64(-1)
    for i in range(out.shape[0]):
        step, v = (first + i) // width, (first + i) % width
        if step != last_step or v // 8 != last_group:
            last_step, last_group = step, v // 8
            state = window_at(message, step * step_bits, window_bits)
            philox_halves(state, last_group, stream_id, key0, key1, halves)
        out[i] = quantile_table[halves[v % 8]]


@_jit
def _bands_philox(message, quantile_table, code, stream_id, key0, key1, n_rows, first_row, width, out):
    """Rows first_row, … of n_rows that are read band by band, without a table."""
    for start in range(0, out.shape[1], width):
        stop = min(start + width, out.shape[1])
        for row in range(out.shape[0]):
            first = n_rows * start + (first_row + row) * (stop - start)
            target = out[row, start:stop]
            _decode_philox(message, quantile_table, code, stream_id, key0, key1, first, target)


@_jit
def _butterflies_of_8(x, base):
    """Stages 1, 2 and 4 of eight neighbors in registers: short strides do not vectorize."""
    a0, a1, a2, a3 = x[base], x[base + 1], x[base + 2], x[base + 3]
    a4, a5, a6, a7 = x[base + 4], x[base + 5], x[base + 6], x[base + 7]
    b0, b1, b2, b3 = a0 + a1, a0 - a1, a2 + a3, a2 - a3
    b4, b5, b6, b7 = a4 + a5, a4 - a5, a6 + a7, a6 - a7
    c0, c1, c2, c3 = b0 + b2, b1 + b3, b0 - b2, b1 - b3
    c4, c5, c6, c7 = b4 + b6, b5 + b7, b4 - b6, b5 - b7
    x[base], x[base + 1], x[base + 2], x[base + 3] = c0 + c4, c1 + c5, c2 + c6, c3 + c7
    x[base + 4], x[base + 5], x[base + 6], x[base + 7] = c0 - c4, c1 - c5, c2 - c6, c3 - c7


@_jit
def hadamard_rows(values, width):
    """In-place twin of `rotation.hadamard` on a flat array whose length is a multiple of `width`."""
    first_stride = 1
    if width >= 8:
        first_stride = 8
        for base in range(0, values.shape[0], 8):
            _butterflies_of_8(values, base)
    for start in range(0, values.shape[0], width):
        stride = first_stride
        while stride < width:
            for base in range(start, start + width, 2 * stride):
                first = values[base : base + stride]
                second = values[base + stride : base + 2 * stride]
                for i in range(stride):
                    a, b = first[i], second[i]
                    first[i], second[i] = a + b, a - b
            stride *= 2


@_jit
def digest_words(words, first):
    """Twin of `digest.digest` on uint32 words that start at element `first`."""
    total = np.uint64(0)
    x0 = np.uint64(first) * np.uint64(GOLDEN)
    for i in range(words.shape[0]):
        x = x0 + np.uint64(i) * np.uint64(GOLDEN) + np.uint64(words[i])
        x = (x ^ (x >> np.uint64(30))) * np.uint64(MIX_1)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(MIX_2)
        total += x ^ (x >> np.uint64(31))
    return total


def decode_range(padded: np.ndarray, code: Code, first: int, out: np.ndarray) -> None:
    """Fill `out` (float32) with stream elements first, first + 1, …; see `pad_message`."""
    bits = (code.window_bits, code.step_bits)
    if not has_table(padded, code):
        keys = (code.stream_id, code.seed & 0xFFFFFFFF, code.seed >> 32)
        shape = (*bits, code.step_weights)
        _decode_philox(padded, quantiles_float32(), shape, *keys, first, out)
    else:
        decode_by_table(padded, candidate_table(code), *bits, first, out)


def decode_banded(
    padded: np.ndarray, code: Code, n_rows: int, first_row: int, width: int, out: np.ndarray
) -> None:
    """Fill `out` (float32 `[rows, columns]`) with rows of a stream that was read in bands of columns.

    Every band holds its rows one behind the other, so that no index of elements is needed.

    Args:
        padded: see `pad_message`.
        n_rows: of the stream.
        first_row: of `out` in the stream.
        width: of a band; the last one may be narrower.
    """
    bits, place = (code.window_bits, code.step_bits), (n_rows, first_row, width)
    if not has_table(padded, code):
        keys = (code.stream_id, code.seed & 0xFFFFFFFF, code.seed >> 32)
        _bands_philox(padded, quantiles_float32(), (*bits, code.step_weights), *keys, *place, out)
    else:
        decode_bands_by_table(padded, candidate_table(code), bits, *place, out)


def has_table(padded: np.ndarray, code: Code) -> bool:
    """Whether candidates are looked up."""
    few_steps = _STATES_PER_STEP * (8 * padded.size // code.step_bits) < 1 << code.window_bits
    return not few_steps and code.step_weights << code.window_bits <= _TABLE_LIMIT


def pad_message(message: np.ndarray) -> np.ndarray:
    """A message with zero bytes behind it, so that every word can be read whole."""
    return np.concatenate((message, np.zeros(PADDING, np.uint8)))


def decode_stream(message: Tensor, code: Code, n_weights: int) -> Tensor:
    """Twin of `reference.decode_stream`: float32 [n_weights] in stream order.

    Raises:
        TruncatedPayloadError: the message is shorter than the stream needs.
    """
    if message.numel() < code.message_bytes(n_weights):
        raise TruncatedPayloadError(
            f"message: {n_weights} weights need {code.message_bytes(n_weights)} bytes, found "
            f"{message.numel()}; pass the whole message"
        )
    out = np.empty(n_weights, np.float32)
    padded = pad_message(message.numpy())
    chunk = _ROWS_PER_TASK_WEIGHTS
    in_threads(
        lambda start: decode_range(padded, code, start, out[start : start + chunk]),
        ((start,) for start in range(0, n_weights, chunk)),
    )
    return torch.from_numpy(out)


def hadamard(values: Tensor, width: int) -> Tensor:
    """Twin of `rotation.hadamard`, returning a new tensor of the same shape."""
    out = values.contiguous().clone().flatten()
    flat = out.numpy()
    chunk = max(width, _ROWS_PER_TASK_WEIGHTS // width * width)
    in_threads(
        lambda start: hadamard_rows(flat[start : start + chunk], width),
        ((start,) for start in range(0, flat.size, chunk)),
    )
    return out.view(values.shape)


def digest(values: Tensor) -> int:
    """Twin of `digest.digest`."""
    words = values.detach().contiguous().flatten().numpy().view(np.uint32)
    partial: list[int] = []
    in_threads(
        lambda start: partial.append(int(digest_words(words[start : start + _ROWS_PER_TASK_WEIGHTS], start))),
        ((start,) for start in range(0, words.size, _ROWS_PER_TASK_WEIGHTS)),
    )
    return sum(partial) % 2**64
