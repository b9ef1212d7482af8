"""Two processes that write one output at once: the result is that of one of them, whole."""

import random
import shutil
from collections import Counter
from functools import cache
from pathlib import Path

from .children import KILLED, Child
from .environment import WORK
from .kills import beside, reference
from .verbs import Tree, code, compress, is_hidden, output, put_older


@cache
def wanted(write_name: str, seed: int) -> Tree:
    """What a process makes that is alone."""
    folder = WORK / "alone"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    _WRITES[write_name](folder, seed)
    return output(folder)


def _save(folder: Path, seed: int) -> None:
    """A network's file, coded elsewhere: only the file is written by both."""
    own = folder / f"own-{seed}"
    own.mkdir()
    code(own, seed, out=folder / "out")


_WRITES = {
    "compress": lambda folder, seed: compress(folder, seed),
    "overwrite": lambda folder, seed: compress(folder, seed, overwrite=True),
    "save": _save,
}


def one_race(seed: int, number: int, ends: Counter[str]) -> None:
    """Two processes with different seeds, and now and then the end of one of them.

    Raises:
        AssertionError: the result is that of none, or something else is left.
    """
    rng = random.Random(f"race {seed} {number}")
    name, folder = list(_WRITES)[number % len(_WRITES)], WORK / "raced"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    if name == "overwrite":
        put_older(folder)
    expected = [wanted(name, 0), wanted(name, 1)]
    children = [Child(lambda: _WRITES[name](folder, 0)), Child(lambda: _WRITES[name](folder, 1))]
    fatal = rng.uniform(0, 1.5 * reference("compress").seconds) if rng.random() < 0.3 else None
    said = [children[0].ended(fatal), children[1].ended()]
    kinds = [text.partition(":")[0] for text in said]
    ends[f"{name}: {' and '.join(sorted(kind or 'done' for kind in kinds))}"] += 1
    found = output(folder)
    where = f"race {number} of seed {seed}, {name}, {said}, {folder}"
    assert found in expected, where
    if name == "compress":
        winner = expected.index(found)
        assert kinds[winner] in ("", KILLED) and kinds[1 - winner] in ("OutputExistsError", KILLED), where
    else:
        assert set(kinds) <= {"", KILLED}, where
    hidden = {path for path in beside(folder) if is_hidden(path)}
    assert not hidden or KILLED in kinds, f"{where}: {hidden}"
