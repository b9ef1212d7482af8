"""Damaged files: every reader raises a named error, or gives what was there before."""

from ..codec.flips import quiet, sweep
from ..codec.subjects import subjects
from .environment import WORK


def damage(seed: int, n_cases: int) -> str:
    """Read repositories of every kind with one file damaged at a time; a table of what came of it.

    Raises:
        AssertionError: damage was silent, or an error had no name.
    """
    if not n_cases:
        return ""
    with quiet():
        made = subjects(WORK / "damaged")
    counts = sweep(made, range(n_cases), seed)
    faults = "\n".join(counts.faults[:20])
    assert not counts.faults, f"{counts.table()}\n{len(counts.faults)} of {n_cases}, the first:\n{faults}"
    return counts.table()
