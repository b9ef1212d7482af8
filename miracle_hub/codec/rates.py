"""Rate control: the least error for a budget, over tensors that each have options of known size and error.

The error that is minimized is a sum over tensors of what their codecs measured; `ladder` says in which unit.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

# The codec of an option by which nothing is stored of a difference to a base.
LEFT_OUT = "left out"


@dataclass(frozen=True)
class Option:
    """One way to code a whole tensor.

    Attributes:
        recipe: what the codec needs to know to do so.
        n_bytes: of the payload without its header.
        error: weighted, in the unit that all options of a model share.
        codec: its name.
        splits: whether the first rows may have a recipe of more bytes, and the others this one.
    """

    recipe: Any
    n_bytes: int
    error: float
    codec: str = "trellis"
    splits: bool = True


@dataclass(frozen=True)
class Curve:
    """What one tensor may become, or, where several have its name, its next rows."""

    name: str
    rows: int
    options: tuple[Option, ...]


@dataclass(frozen=True)
class Choice:
    """What a tensor gets: one option, or two with a boundary between rows."""

    rows: int
    option: Option
    upgrade: Option | None = None
    upgraded_rows: int = 0

    def parts(self) -> list[tuple[int, Any]]:
        """Rows and their recipe, from the top."""
        found = [(self.upgraded_rows, self.upgrade), (self.rows - self.upgraded_rows, self.option)]
        return [(rows, option.recipe) for rows, option in found if option and rows]

    @property
    def n_bytes(self) -> int:
        """Bytes by linear interpolation; the exact figure is the header's business."""
        extra = self.upgrade.n_bytes - self.option.n_bytes if self.upgrade else 0
        return self.option.n_bytes + math.ceil(extra * self.upgraded_rows / self.rows)


@dataclass(frozen=True)
class Ranges:
    """What a tensor gets of which several ranges of rows have curves of their own, from the top."""

    choices: tuple[Choice, ...]

    @property
    def option(self) -> Option:
        """One of them: all are of one codec, of one matrix view."""
        return self.choices[0].option

    @property
    def n_bytes(self) -> int:
        """See `Choice.n_bytes`."""
        return sum(choice.n_bytes for choice in self.choices)

    def parts(self) -> list[tuple[int, Any]]:
        """Rows and their recipe, from the top; neighbors of one recipe are one part."""
        found: list[tuple[int, Any]] = []
        for rows, recipe in (part for choice in self.choices for part in choice.parts()):
            if found and found[-1][1] == recipe:
                rows += found.pop()[0]
            found.append((rows, recipe))
        return found


Chosen = Choice | Ranges


def _joined(curves: Sequence[Curve], choices: Sequence[Choice]) -> dict[str, Chosen]:
    """Choices by name of the tensor."""
    found: dict[str, list[Choice]] = {}
    for curve, choice in zip(curves, choices, strict=True):
        found.setdefault(curve.name, []).append(choice)
    return {name: own[0] if len(own) == 1 else Ranges(tuple(own)) for name, own in found.items()}


def lower_hull(options: Sequence[Option]) -> list[Option]:
    """The options that no mixture of two others beats, by rising bytes and falling error."""
    hull: list[Option] = []
    for option in sorted(options, key=lambda o: (o.n_bytes, o.error)):
        if hull and option.error >= hull[-1].error:
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) <= _slope(hull[-2], option):
            hull.pop()
        hull.append(option)
    return hull


def _slope(cheap: Option, dear: Option) -> float:
    """Error saved per byte; equal sizes count as infinitely steep."""
    extra = dear.n_bytes - cheap.n_bytes
    return (cheap.error - dear.error) / extra if extra else math.inf


def allocate(curves: Sequence[Curve], payload_bytes: int) -> dict[str, Chosen]:
    """The choice per tensor that minimizes the total error within `payload_bytes`.

    Walks down the lower hulls of all curves together, steepest step first; a step that does not fit is taken
    for as many rows as fit.
    """
    hulls = [lower_hull(curve.options) for curve in curves]
    choices = [Choice(curve.rows, hull[0]) for curve, hull in zip(curves, hulls, strict=True)]
    left = payload_bytes - sum(choice.n_bytes for choice in choices)
    steps = [
        (-_slope(cheap, dear), i, curves[at].name, at, dear)
        for at, hull in enumerate(hulls)
        for i, (cheap, dear) in enumerate(zip(hull, hull[1:], strict=False))
    ]
    closed = set()
    for *_, at, dear in sorted(steps, key=lambda step: step[:4]):
        if at in closed:
            continue
        raised, is_whole = _raised(choices[at], dear, left)
        left -= raised.n_bytes - choices[at].n_bytes
        choices[at] = raised
        if not is_whole:
            closed.add(at)
    return _joined(curves, choices)


def _raised(choice: Choice, dear: Option, left: int) -> tuple[Choice, bool]:
    """A choice with the next option for all of its rows, or for those that `left` bytes pay for."""
    extra = dear.n_bytes - choice.option.n_bytes
    if extra <= left:
        return replace(choice, option=dear), True
    rows = max(0, left) * choice.rows // extra
    if not rows or not (dear.splits and choice.option.splits and dear.codec == choice.option.codec):
        return choice, False
    return replace(choice, upgrade=dear, upgraded_rows=rows), False


def extreme_choices(curves: Sequence[Curve], most: bool) -> dict[str, Chosen]:
    """The largest or the smallest files that the options allow."""
    pick = max if most else min
    chosen = [Choice(c.rows, pick(lower_hull(c.options), key=lambda o: o.n_bytes)) for c in curves]
    return _joined(curves, chosen)
