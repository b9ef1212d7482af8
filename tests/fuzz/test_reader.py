"""The fuzzer's target with sound inputs, damaged ones, and whatever the fuzzer has found before."""

import random
import runpy
from pathlib import Path

import pytest

READER = runpy.run_path(str(Path(__file__).with_name("reader.py")))
REGRESSIONS = sorted(READER["REGRESSIONS"].glob("*.bin"))


@pytest.mark.parametrize("kind", range(len(READER["KINDS"])))
def test_sound_and_damaged_inputs_of_every_kind_raise_nothing_unnamed(kind: int) -> None:
    seeds = [seed for seed in READER["seeds"]() if seed[0] == kind]
    assert seeds
    rng = random.Random(kind)
    for seed in seeds:
        READER["one_input"](seed)
        for _ in range(20):
            damaged = bytearray(seed)
            damaged[rng.randrange(1, len(seed))] ^= 1 << rng.randrange(8)
            READER["one_input"](bytes(damaged))


@pytest.mark.parametrize("path", REGRESSIONS, ids=lambda path: path.stem)
def test_what_the_fuzzer_found_stays_mended(path: Path) -> None:
    READER["one_input"](path.read_bytes())
