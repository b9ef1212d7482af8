"""Variational draws in numba: the twins of miracle_kernels' `reparameterize` ops, for the CPU.

A loop over a chunk of blocks at a time keeps noise and powers in the first-level cache. Both are written so
that LLVM turns them into vector instructions; benchmarks/variational_step.py has what that is worth. Draws
are no part of the format: sums may be taken in any order here.
"""

import numpy as np
from numba import njit

from miracle_hub.coding.cpu import quantiles_float32

# Elements of noise per chunk: 16 KiB of float32, a whole number of blocks of up to 1,024 weights.
_CHUNK = 4096
_DOMAIN = 2  # of the Philox counter: the noise of variational weights
_jit = njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract", "reassoc", "nsz"})
_f4 = np.float32


def width(block_weights: int) -> int:
    """Elements of noise that belong to a block: its weights, rounded up to a power of two."""
    return 1 << (block_weights - 1).bit_length()


def keys(seed: int, stream_id: int) -> tuple[np.uint64, np.uint64, np.uint64]:
    """Stream, low and high word of the seed, as the compiled functions take them."""
    word = seed % 2**64
    return np.uint64(stream_id), np.uint64(word & 0xFFFFFFFF), np.uint64(word >> 32)


@_jit
def exp(x):
    """e^x to 3e-7, relatively, by a polynomial that vectorizes; 0 and infinity are out of its range."""
    x = min(max(x, _f4(-87.0)), _f4(88.0))
    n = np.floor(x * _f4(1.44269504) + _f4(0.5))
    r = (x - n * _f4(0.693359375)) + n * _f4(2.12194440e-4)
    p = _f4(1.3981999507e-3) + r * _f4(1.9875691500e-4)
    p = _f4(4.1665795894e-2) + r * (_f4(8.3334519073e-3) + r * p)
    p = _f4(0.5) + r * (_f4(1.6666665459e-1) + r * p)
    power = np.int32((np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)
    return (p * r * r + r + _f4(1.0)) * power


@_jit
def fill_noise(first, table, key, words, out):
    """out = the noise of elements 8·first, 8·first + 1, …; a multiple of eight of them."""
    mask, n = np.uint64(0xFFFFFFFF), out.shape[0] // 8
    k0, k1 = key[1], key[2]
    c0, c1, c2, c3 = words[0], words[1], words[2], words[3]
    for i in range(n):
        group = np.uint64(first + i)
        c0[i], c1[i], c2[i], c3[i] = group & mask, group >> np.uint64(32), key[0], np.uint64(_DOMAIN)
    for _ in range(10):
        for i in range(n):
            p0 = np.uint64(0xD2511F53) * c0[i]
            p1 = np.uint64(0xCD9E8D57) * c2[i]
            c0[i], c2[i] = (p1 >> np.uint64(32)) ^ c1[i] ^ k0, (p0 >> np.uint64(32)) ^ c3[i] ^ k1
            c1[i], c3[i] = p1 & mask, p0 & mask
        k0, k1 = (k0 + np.uint64(0x9E3779B9)) & mask, (k1 + np.uint64(0xBB67AE85)) & mask
    half = np.uint64(0xFFFF)
    for i in range(n):
        for j in range(4):
            word = words[j][i]
            out[8 * i + 2 * j] = table[word & half]
            out[8 * i + 2 * j + 1] = table[word >> np.uint64(16)]


@_jit
def _blend(condition, first, second):
    """`first if condition else second` of finite numbers; a branch would keep a loop from vectorizing."""
    share = _f4(condition)
    return share * first + (_f4(1.0) - share) * second


@_jit
def _solve(s):
    """√v and h = d/(v - 1), where v ≤ 1 solves v - log v = 1 + d with d = s²/2; see the Triton kernel."""
    d = _f4(0.5) * s * s
    near = _f4(-6.3742830e-4) + s * (_f4(-9.5693243e-5) + s * _f4(1.0634382e-4))
    near = _f4(0.49999912) + s * (_f4(-0.041654812) + s * (_f4(-6.9984765e-3) + s * near))
    root = exp(_f4(-0.5) - _f4(0.5) * d)
    power = root * root
    far = _f4(0.62172505) + power * (_f4(1.1171751) + power * (_f4(0.66336864) + power * _f4(10.437796)))
    far = root * (_f4(0.99999992) + power * (_f4(0.50004003) + power * far))
    is_near = d < _f4(1.0)
    std = _blend(is_near, _f4(1.0) - s * near, far)
    bottom = _blend(is_near, near * (s * near - _f4(2.0)), far * far - _f4(1.0))
    return std, _blend(is_near, _f4(0.5) * s, d) / bottom


@_jit
def _tanh_sech(tau):
    decay = exp(-abs(tau))
    square, decay2 = tau * tau, decay * decay
    inverse = _f4(1.0) / (_f4(1.0) + decay2)
    far = (_f4(1.0) - decay2) * inverse * (_f4(1.0) - _f4(2.0) * _f4(tau < _f4(0.0)))
    square = min(square, _f4(1.0))  # keeps the side that is not taken finite
    near = _f4(2 / 15) + square * (_f4(-17 / 315) + square * _f4(62 / 2835))
    near = tau + tau * square * (_f4(-1 / 3) + square * near)
    return _blend(square < _f4(0.0625), near, far), _f4(2.0) * decay * inverse


@_jit
def _shares(alpha, rate, block_weights, share):
    """share = softmax(rate · alpha) over each block; exponentials have a pass of their own, which is long."""
    for a in range(0, alpha.shape[0], block_weights):
        b = min(a + block_weights, alpha.shape[0])
        top = alpha[a]
        for i in range(a, b):
            top = max(top, alpha[i])
        for i in range(a, b):
            share[i] = rate * (alpha[i] - top)
    for i in range(alpha.shape[0]):
        share[i] = exp(share[i])
    for a in range(0, alpha.shape[0], block_weights):
        b = min(a + block_weights, alpha.shape[0])
        total = _f4(0.0)
        for i in range(a, b):
            total += share[i]
        inverse = _f4(1.0) / total
        for i in range(a, b):
            share[i] *= inverse


@_jit
def _pack(eps, width, block_weights, n):
    """Move the noise of blocks together: what lies between a block's weights and its width is not used."""
    if width != block_weights:
        for i in range(n):
            eps[i] = eps[i // block_weights * width + i % block_weights]


@_jit
def _mean_kl(tau, rate, share, eps, kl2, scale, w):
    for i in range(tau.shape[0]):
        tanh, sech = _tanh_sech(rate * tau[i])
        reach = np.sqrt(kl2 * share[i])
        std, _ = _solve(_f4(1.4142135) * reach * sech)
        w[i] = scale * (reach * tanh + std * eps[i])


@_jit
def _mean_kl_backward(grad_w, tau, rate, share, eps, kl2, scale, grad_tau):
    """Gradient of tau; eps becomes that of log κ over grad_w / 2; returns the gradient of log scale.

    LLVM vectorizes loops over few arrays only: it must compare the addresses of all that are written.
    """
    by_scale = _f4(0.0)
    for i in range(tau.shape[0]):
        tanh, sech = _tanh_sech(rate * tau[i])
        reach = np.sqrt(kl2 * share[i])
        std, h = _solve(_f4(1.4142135) * reach * sech)
        grad, drawn = scale * grad_w[i], std * eps[i]
        grad_tau[i] = rate * grad * (reach * sech * sech - drawn * h * tanh)
        by_scale += grad * (reach * tanh + drawn)
        eps[i] = scale * (reach * tanh + drawn * h)
    return by_scale


@_jit
def _touched(grad):
    """From where to where a gradient is not 0; 0 and 0 if it is nowhere."""
    low, high = 0, grad.shape[0]
    while high and grad[high - 1] == _f4(0.0):
        high -= 1
    while low < high and grad[low] == _f4(0.0):
        low += 1
    return low, high


@_jit
def _softmax_backward(grad_w, rate, share, by_kappa, block_weights, grad_alpha):
    """Gradient of alpha from that of log κ, by_kappa · grad_w / 2."""
    for i in range(grad_w.shape[0]):
        grad_alpha[i] = _f4(0.5) * rate * grad_w[i] * by_kappa[i]
    for a in range(0, grad_w.shape[0], block_weights):
        b = min(a + block_weights, grad_w.shape[0])
        total = _f4(0.0)
        for i in range(a, b):
            total += grad_alpha[i]
        for i in range(a, b):
            grad_alpha[i] -= share[i] * total


@_jit
def mean_kl(tau, alpha, rate, table, key, block_weights, width, kl2, scale, first, stop, w):
    """w of blocks [first, stop); first is a multiple of the blocks of a chunk, and kl2 twice a block's KL."""
    words, eps = np.empty((4, _CHUNK // 8), np.uint64), np.empty(_CHUNK, np.float32)
    share, n_chunk = np.empty(_CHUNK, np.float32), _CHUNK // width
    for block in range(first, stop, n_chunk):
        a, b = block * block_weights, min(min(block + n_chunk, stop) * block_weights, tau.shape[0])
        fill_noise(block * width // 8, table, key, words, eps)
        _pack(eps, width, block_weights, b - a)
        _shares(alpha[a:b], rate, block_weights, share)
        _mean_kl(tau[a:b], rate, share, eps, kl2, scale, w[a:b])


@_jit
def mean_kl_backward(
    grad_w, tau, alpha, rate, table, key, block_weights, width, kl2, scale, first, stop, grad_tau, grad_alpha
):
    """The mirror of `mean_kl`; returns the gradient of log scale.

    Blocks without a gradient, as most of an embedding's are, are passed over at both ends of a chunk.
    """
    words, eps = np.empty((4, _CHUNK // 8), np.uint64), np.empty(_CHUNK, np.float32)
    share, n_chunk, by_scale = np.empty(_CHUNK, np.float32), _CHUNK // width, np.float64(0.0)
    aligned = max(1, 8 // width)  # blocks that share a call of Philox
    for chunk in range(first, stop, n_chunk):
        start, end = chunk * block_weights, min(min(chunk + n_chunk, stop) * block_weights, tau.shape[0])
        grad_tau[start:end], grad_alpha[start:end] = _f4(0.0), _f4(0.0)
        low, high = _touched(grad_w[start:end])
        if not high:
            continue
        block = chunk + low // block_weights // aligned * aligned
        a, b = block * block_weights, min(start - (-high // block_weights) * block_weights, end)
        fill_noise(block * width // 8, table, key, words, eps)
        _pack(eps, width, block_weights, b - a)
        _shares(alpha[a:b], rate, block_weights, share)
        by_scale += _mean_kl_backward(grad_w[a:b], tau[a:b], rate, share, eps, kl2, scale, grad_tau[a:b])
        _softmax_backward(grad_w[a:b], rate, share, eps, block_weights, grad_alpha[a:b])
    return by_scale


@_jit
def mean_var(mean, log_std, table, key, first, stop, w):
    """w of weights [first, stop); first is a multiple of a chunk."""
    words, eps = np.empty((4, _CHUNK // 8), np.uint64), np.empty(_CHUNK, np.float32)
    for a in range(first, stop, _CHUNK):
        fill_noise(a // 8, table, key, words, eps)
        for i in range(a, min(a + _CHUNK, stop)):
            w[i] = mean[i] + exp(log_std[i]) * eps[i - a]


@_jit
def mean_var_backward(grad_w, log_std, table, key, first, stop, grad_log_std):
    """The mirror of `mean_var`; the gradient of the mean is that of w."""
    words, eps = np.empty((4, _CHUNK // 8), np.uint64), np.empty(_CHUNK, np.float32)
    for a in range(first, stop, _CHUNK):
        fill_noise(a // 8, table, key, words, eps)
        for i in range(a, min(a + _CHUNK, stop)):
            grad_log_std[i] = grad_w[i] * exp(log_std[i]) * eps[i - a]


def table() -> np.ndarray:
    """The quantile table, as the compiled functions take it."""
    return quantiles_float32()


def tasks(n_blocks: int, block_width: int, weights_per_task: int = 1 << 17) -> list[tuple[int, int]]:
    """Runs of blocks for threads, each a whole number of chunks."""
    step = max(1, weights_per_task // _CHUNK) * (_CHUNK // block_width)
    return [(first, min(first + step, n_blocks)) for first in range(0, n_blocks, step)]
