"""Two things timed in fresh processes, one after the other in every round, and the medians of both."""

import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROUNDS = 7

Seconds = dict[str, float]


def probe(code: str, folder: str | Path) -> Seconds:
    """What a fresh process that gets a folder prints as JSON in the end."""
    command = [sys.executable, "-c", code, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def side_by_side(
    names: tuple[str, str], first: Callable[[], Seconds], second: Callable[[], Seconds]
) -> dict[str, Any]:
    """Medians of both, and of the second over the first."""
    for each in (first, second):
        each()  # fills the cache of pages, and numba's
    pairs = [(first(), second()) for _ in range(ROUNDS)]
    results: dict[str, Any] = {"rounds": ROUNDS}
    for key in pairs[0][0]:
        results[key] = {
            f"{names[0]}_seconds": round(statistics.median(one[key] for one, _ in pairs), 3),
            f"{names[1]}_seconds": round(statistics.median(other[key] for _, other in pairs), 3),
            "ratio": round(statistics.median(other[key] / one[key] for one, other in pairs), 3),
        }
        print(key, results[key], flush=True)
    return results
