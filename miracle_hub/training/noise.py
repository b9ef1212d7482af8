"""Seeds of the noise of training: another one for every seed of a model, process and draw."""

import torch

_WORD = 2**64
_STEP = 0x9E3779B97F4A7C15  # 2^64 over the golden ratio, odd: neighbors are far apart, none is met twice


def noise_seed(seed: int, rank: int) -> int:
    """Where the noise of a process begins; the n-th draw has this plus n, as a signed 64-bit number.

    Output number `rank` of the generator SplitMix64 that starts at `seed`. It is a one-to-one map of 64 bits
    for every rank, so no two seeds of a model share a draw's noise, nor do two processes of a run; 0 stays 0.

    Args:
        seed: of the model, any whole number; two that are equal modulo 2^64 are the same.
        rank: number of the process.

    Source: Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators".
    """
    word = (seed + rank * _STEP) % _WORD
    word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 % _WORD
    word = (word ^ word >> 27) * 0x94D049BB133111EB % _WORD
    word ^= word >> 31
    return word - _WORD if word >= _WORD // 2 else word


def generator(seed: int, number: int = 0) -> torch.Generator:
    """The source of the choices of an encoder, or of a stream's order, by the seed of a model.

    torch takes the low 32 bits of a seed alone: all bits of larger ones are mixed into these first.
    """
    word = seed + number
    return torch.Generator().manual_seed(word if word < 2**32 else noise_seed(seed, number) % 2**32)
