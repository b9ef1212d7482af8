"""Kills −9 at random moments, and what must hold after each.

Every verb is run once, as a reference. Then a forked child runs it and is killed: after a random share of the
reference's time, at a random one of its calls that change files, or at a random one of its requests to the
Hub. Its output must be absent, what was there before, or whole; and the next run must end as the reference
did and leave nothing else behind.
"""

import random
import shutil
import time
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from miracle_hub.errors import OutputExistsError

from ..hub.loopback_parts import Answer, Fault
from .children import CALLS, KILLED, Child
from .environment import HUB, WORK
from .verbs import VERBS, Tree, Verb, compress, is_hidden, tree


@dataclass(frozen=True)
class Reference:
    """A run that nobody disturbed."""

    before: Tree
    made: Tree
    written: Tree
    beside: set[str]
    seconds: float
    calls: int
    requests: int


@cache
def reference(name: str) -> Reference:
    _undisturbed(VERBS[name])  # compiles
    return _undisturbed(VERBS[name])


def _undisturbed(verb: Verb) -> Reference:
    folder = WORK / "reference"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    verb.prepare(folder)
    before, n_requests, CALLS.count = verb.made(folder), len(HUB.requests), 0
    started = time.monotonic()
    verb.run(folder)
    seconds, calls = time.monotonic() - started, CALLS.count
    made = verb.made(folder)
    assert made and made != before
    n_requests = len(HUB.requests) - n_requests
    return Reference(before, made, tree(folder), beside(folder), seconds, calls, n_requests)


def beside(folder: Path) -> set[str]:
    """What there is at the top, and everything that is hidden."""
    return {path for path in tree(folder) if is_hidden(path)} | {path.name for path in folder.iterdir()}


@dataclass(frozen=True)
class Moment:
    """When a child is killed; one of the three."""

    seconds: float | None = None
    call: int = 0
    request: int = 0


def draw_moment(verb: Verb, number: int, rng: random.Random) -> Moment:
    """Any moment, or, for every other kill of a verb, one call after the other from the last on."""
    whole, turn = reference(verb.name), number // len(VERBS)
    if turn % 2:  # outputs are moved into place there
        return Moment(call=max(1, whole.calls - turn // 2 % 20))
    share = rng.random() / (2 if verb.lives > 1 else 1)  # of several lives, most are to see more than the end
    kinds = [Moment(share * whole.seconds), Moment(call=1 + int(share * whole.calls))]
    if whole.requests:
        kinds += [Moment(request=1 + int(share * whole.requests))] * 2
    return rng.choice(kinds)


def run_and_kill(verb: Verb, folder: Path, moment: Moment) -> bool:
    """Run in a child that is killed at a moment, if it lives so long; whether it was."""
    child = Child(lambda: verb.run(folder), moment.call)
    left = moment.request

    def count(answer: Answer) -> Answer:
        nonlocal left
        left -= 1
        if not left:
            child.kill()
        return answer

    HUB.faults = {"": Fault(count, method=None)}
    said = child.ended(moment.seconds)
    HUB.faults = {}
    assert said in (KILLED, ""), said
    return said == KILLED


def check_left(verb: Verb, folder: Path) -> str:
    """What a kill has left of the output, in a word.

    Raises:
        AssertionError: it is none of what it may be.
    """
    whole, found = reference(verb.name), verb.made(folder)
    if found == whole.made:
        return "whole"
    if found == whole.before:
        return "as before" if found else "absent"
    assert verb.may_vanish and not found, f"expected nothing or everything, found {sorted(found)}"
    return "hidden"


def check_next_run(verb: Verb, folder: Path, left: str) -> None:
    """
    Raises:
        AssertionError: it does not end as the reference did, or leaves something behind.
    """
    whole = reference(verb.name)
    if left == "hidden":
        try:
            compress(folder)
        except OutputExistsError:
            assert verb.made(folder) == whole.before
        else:
            raise AssertionError("what was there before has not come back")
    try:
        verb.run(folder)
    except OutputExistsError:
        assert left == "whole" and not verb.overwrites
    found = verb.made(folder)
    assert found == whole.made, f"the next run made other bytes: {different(found, whole.made)}"
    assert (extra := beside(folder) - whole.beside) == set() or left == "whole", f"left behind: {extra}"


def different(found: Tree, expected: Tree) -> list[str]:
    return sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))


def one_kill(seed: int, number: int, kills: Counter[str]) -> int:
    """Kill a verb, more than once where it goes on from where it was, and check what is left each time.

    Returns:
        How often it was killed.
    """
    rng = random.Random(f"{seed} {number}")
    verb = list(VERBS.values())[number % len(VERBS)]
    folder = WORK / "killed"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    verb.prepare(folder)
    moments, left = [], ""
    try:
        for _ in range(verb.lives):
            moments.append(draw_moment(verb, number, rng))
            if not run_and_kill(verb, folder, moments[-1]):
                moments.pop()
                break
            left = check_left(verb, folder)
            kills[f"{verb.name}: {left}"] += 1
            if left == "whole":
                break
        check_next_run(verb, folder, check_left(verb, folder))
    except BaseException:
        print(f"seed {seed}, number {number}: {verb.name}, killed at {moments}, left {left}; {folder}")
        raise
    return len(moments)
