"""No two draws share their noise: of one run, of its processes, of models with other seeds."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from miracle_hub.coding import draw_cpu
from miracle_hub.coding.draw import draw_mean_var
from miracle_hub.training import model as model_room
from miracle_hub.training.noise import generator, noise_seed

from .networks import part_of, variational_net

WORDS = st.integers(0, 2**64 - 1)


def noise(seed: int, n: int = 64) -> torch.Tensor:
    """As a posterior of mean 0 and variance 1 draws it."""
    return draw_mean_var(torch.zeros(n), torch.zeros(n), torch.tensor(seed), 0)


def key(seed: int) -> tuple[int, int]:
    """Of the generator behind the noise, both words."""
    _, low, high = draw_cpu.keys(seed, 0)
    return int(low), int(high)


def test_no_two_steps_of_a_run_have_the_same_noise() -> None:
    """2^17 in a row, as the model counts them; the generator's key is the whole word."""
    words = (torch.arange(1, 2**17 + 1) + noise_seed(5, 3)).numpy().astype(np.uint64)
    assert len(np.unique(words)) == 2**17
    assert all(key(int(word)) == (word % 2**32, word // 2**32) for word in words[:: 2**12].tolist())


def test_no_two_processes_and_seeds_come_to_each_others_noise() -> None:
    """Within 2^34 steps, of 64 processes each of seeds that are equal modulo 2^16, and of neighbors."""
    seeds = (0, 1, 2, 2**16, 2**16 + 1, 2**17, 2**32, 2**48, 2**64 - 1)
    starts = sorted(noise_seed(seed, rank) % 2**64 for seed in seeds for rank in range(64))
    after = [*starts[1:], starts[0] + 2**64]
    assert min(b - a for a, b in zip(starts, after, strict=True)) > 2**34


def test_every_word_of_a_seed_has_a_noise_of_its_own() -> None:
    """All 2^16 + 1 seeds from 0 on, and single bits of 64; 4,000 processes, far more than 2^7."""
    seeds = {noise_seed(seed, 0) for seed in range(2**16 + 1)} | {noise_seed(1 << i, 0) for i in range(64)}
    assert len(seeds) == 2**16 + 1 + 64 - 17
    assert len({noise_seed(7, rank) for rank in range(4000)}) == 4000


@given(WORDS, WORDS, st.integers(0, 2**16))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_two_seeds_never_begin_at_the_same_noise(first: int, second: int, rank: int) -> None:
    assert (noise_seed(first, rank) == noise_seed(second, rank)) == (first == second)
    assert -(2**63) <= noise_seed(first, rank) < 2**63


def test_what_is_drawn_differs_where_seeds_differ() -> None:
    """The generator's key is all 64 bits of a seed."""
    given = [0, 1, 2**16, 2**32, 2**40, 2**47, 2**62, -1, -(2**63)]
    drawn = [tuple(noise(seed).tolist()) for seed in given]
    assert len(set(drawn)) == len({key(seed) for seed in given}) == len(given)


def test_the_draws_of_a_model_differ_by_seed_process_and_step(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for seed, rank in ((0, 0), (2**16, 0), (2**32, 0), (0, 1), (0, 128)):
        monkeypatch.setattr(model_room, "_rank", lambda rank=rank: rank)
        part = part_of(variational_net(seed=seed))
        for _ in range(3):
            found.append(tuple(part.streams[0].draw(part.seed()).tolist()))
            part.next_draw()
    assert len(set(found)) == len(found)


def test_a_seed_at_the_end_of_the_words_goes_on_at_the_other() -> None:
    part = part_of(variational_net())
    part.draw_number = torch.tensor(2**63 - 1)
    part.next_draw()
    assert bool(noise(int(part.seed())).isfinite().all())


def test_encoders_and_orders_have_sources_of_their_own_for_every_seed() -> None:
    """torch's generator takes the low 32 bits alone; smaller seeds are what they were."""
    seeds = (0, 5, 2**32, 2**32 + 5, 2**63, 2**64 - 1)
    drawn = [int(torch.randint(2**62, (), generator=generator(seed))) for seed in seeds]
    assert len(set(drawn)) == len(seeds)
    assert drawn[1] == int(torch.randint(2**62, (), generator=torch.Generator().manual_seed(5)))
    assert generator(2**64 - 1, 3).initial_seed() != generator(2**64 - 1, 2).initial_seed()
