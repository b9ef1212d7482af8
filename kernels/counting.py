"""Counts the instructions of a compiled kernel per unit of its work, over whole tiles, from its SASS.

A listing says what stands in a kernel, not how often it runs. Loops are found in the graph of its branches
(back edges and what dominates them); how often a body runs comes from the launch, in units.py. Every
instruction of a body counts, whichever way the branches inside it go, and so do predicated ones: they take
an issue slot. Not counted are NOP, and what only BRA.DIV or a call reaches: fallbacks for warps that
have diverged, and the slow path of a 64-bit division.
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

_LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P[0-9T]+\s+)?([A-Z][A-Z0-9_.]*)([^;]*);", re.MULTILINE)
_TARGET = re.compile(r"^(.*?)\b0x([0-9a-f]+)\s*$")
# What the first part of an opcode does. Whatever begins with U works once per warp, in the uniform datapath.
_KINDS = {
    "integer": (
        "BFE BFI BMSK BREV FLO IABS IADD IADD3 IDP IDP4A IMAD IMNMX IMUL ISCADD ISETP LEA LOP LOP3 PLOP3 "
        "POPC PRMT SEL SGXT SHF SHL SHR VABSDIFF VIADD VIADDMNMX VIMNMX VIMNMX3"
    ),
    "float": "FADD FADD2 FCHK FFMA FFMA2 FMNMX FMNMX3 FMUL FMUL2 FSEL FSET FSETP FSWZADD",
    "half": "HADD2 HFMA2 HMNMX2 HMUL2 HSET2 HSETP2",
    "double": "DADD DFMA DMUL DSETP",
    "conversion": "F2F F2FP F2I F2IP FRND I2F I2FP I2I I2IP",
    "tensor": "BGMMA BMMA DMMA HGMMA HMMA IGMMA IMMA QGMMA QMMA UTCHMMA UTCIMMA UTCQMMA",
    "special": "MUFU",
    "shuffle": "SHFL",
    "shared": "ATOMS LDS LDSM STS STSM",
    "global": "ATOM ATOMG LD LDG LDGSTS RED ST STG",
    "local": "LDL STL",
    "constant": "LDC",
    "move": "CS2R MOV MOVM P2R R2P S2R",
    "barrier": "ARRIVES BAR DEPBAR ERRBAR FENCE LDGDEPBAR MEMBAR SYNCS WARPGROUP WARPSYNC",
    "control": "BRA BREAK BRX BSSY BSYNC CALL EXIT JMP NANOSLEEP RET WARPGROUPSET YIELD",
}
_KIND_OF = {opcode: kind for kind, opcodes in _KINDS.items() for opcode in opcodes.split()}


class Instruction(NamedTuple):
    """One line of a listing.

    Args:
        opcode: with its modifiers, as SHFL.BFLY.
        conditional: whether the next line may follow although this is a branch or an exit.
        target: of a branch that is taken by whole warps.
    """

    address: int
    opcode: str
    conditional: bool
    target: int | None


class Passes(NamedTuple):
    """How often a loop's body runs each time that what is around the loop runs once, and the loops in it."""

    times: float
    inner: tuple["Passes", ...] = ()


class Loop(NamedTuple):
    """A loop of a listing: places of its instructions, of those in inner loops too, and the inner loops."""

    places: frozenset[int]
    inner: tuple["Loop", ...]


class UnexpectedLoops(Exception):
    """The loops of a listing are not those of which the launch says how often they run."""


def base(opcode: str) -> str:
    """An opcode without its modifiers."""
    return opcode.partition(".")[0]


def kind(opcode: str) -> str:
    """What an instruction does, in a word: SHFL exchanges, SHF shifts; LDGDEPBAR waits, LDG loads."""
    first = base(opcode)
    if first not in _KIND_OF and (first.startswith("U") or first in ("R2UR", "S2UR", "VOTEU")):
        return "uniform"
    return _KIND_OF.get(first, "other")


def listed(sass: str) -> list[Instruction]:
    """The instructions of what `cuobjdump -sass` prints of one kernel."""
    found = []
    for address, guard, opcode, operands in _LINE.findall(sass):
        target, condition = None, bool(guard)
        if base(opcode) in ("BRA", "JMP") and ".DIV" not in opcode:
            where = _TARGET.match(operands.strip())
            if where:
                target, condition = int(where[2], 16), condition or bool(where[1].strip())
        found.append(Instruction(int(address, 16), opcode, condition, target))
    return found


def _successors(instructions: Sequence[Instruction]) -> list[list[int]]:
    """Places that may run after each place."""
    place = {instruction.address: i for i, instruction in enumerate(instructions)}
    found: list[list[int]] = []
    for i, (_, opcode, conditional, target) in enumerate(instructions):
        after = [] if target is None else [place[target]]
        ends = target is not None or base(opcode) in ("EXIT", "RET")
        if (conditional or not ends) and i + 1 < len(instructions):
            after.append(i + 1)
        found.append(after)
    return found


def _preorder(successors: Sequence[Sequence[int]]) -> list[int]:
    """The places that can be reached from the first, each after one that leads to it."""
    found: dict[int, None] = {}
    waiting = [0]
    while waiting:
        at = waiting.pop()
        if at not in found:
            found[at] = None
            waiting += successors[at]
    return list(found)


def _back_edges(successors: Sequence[Sequence[int]]) -> Iterator[tuple[int, int]]:
    """Edges to a place without which the edge's start cannot be reached: (start, the loop's first place).

    Only an edge that goes up can be one: compilers lay a loop's head before its body.
    """
    for start in _preorder(successors):
        for head in successors[start]:
            if head <= start and start not in _preorder_without(successors, head):
                yield start, head


def _preorder_without(successors: Sequence[Sequence[int]], closed: int) -> set[int]:
    """The places that can be reached without passing `closed`."""
    if closed == 0:
        return set()
    return set(_preorder([[j for j in after if j != closed] for after in successors]))


def _body(predecessors: Sequence[Sequence[int]], start: int, head: int) -> set[int]:
    """The places from which `start` is reached without passing `head`, and these two."""
    found, waiting = {head}, [start]
    while waiting:
        at = waiting.pop()
        if at not in found:
            found.add(at)
            waiting += predecessors[at]
    return found


def loops(instructions: Sequence[Instruction]) -> tuple[Loop, ...]:
    """The outermost loops of a listing, in its order."""
    successors = _successors(instructions)
    reached = set(_preorder(successors))
    predecessors: list[list[int]] = [[] for _ in instructions]
    for i in reached:
        for j in successors[i]:
            predecessors[j].append(i)
    bodies: dict[int, set[int]] = {}
    for start, head in _back_edges(successors):
        if start != head:  # a branch to itself ends every listing: nothing leads to it
            bodies.setdefault(head, set()).update(_body(predecessors, start, head))
    return _nested([frozenset(bodies[head]) for head in sorted(bodies)])


def _nested(bodies: Sequence[frozenset[int]]) -> tuple[Loop, ...]:
    """Loops out of their places; a loop stands in another if all its places do."""
    outermost = [body for body in bodies if not any(body < other for other in bodies)]
    return tuple(Loop(body, _nested([other for other in bodies if other < body])) for body in outermost)


def _weigh(weights: dict[int, float], found: Sequence[Loop], told: Sequence[Passes]) -> None:
    """Multiply the weight of every place in a loop by how often the loop runs.

    Loops that run once may be gone from the listing, and all of them where each was unrolled: their bodies
    then stand in it as often as they run.
    """
    if not found:
        return
    matching = told if len(told) == len(found) else [passes for passes in told if passes.times != 1]
    if len(matching) != len(found):
        raise UnexpectedLoops(f"expected {len(told)} loops, found {len(found)}")
    for loop, passes in zip(found, matching, strict=True):
        for place in loop.places:
            weights[place] *= passes.times
        _weigh(weights, loop.inner, passes.inner)


def executed(sass: str, told: Sequence[Passes], persistent: bool) -> tuple[Counter[str], int]:
    """How often a thread runs each opcode for one tile, and the instructions that it runs once besides.

    Args:
        told: the loops inside a tile, in the listing's order.
        persistent: the largest outermost loop goes over tiles, and one pass through it is a tile; what is
            outside it runs once per program. Else the whole kernel is one tile.

    Raises:
        UnexpectedLoops: the listing has other loops than `told`.
    """
    instructions = listed(sass)
    weights = dict.fromkeys(_preorder(_successors(instructions)), 1.0)
    found, n_all = loops(instructions), len(weights)
    if persistent:
        if not found:
            raise UnexpectedLoops("expected a loop over tiles, found none")
        tile = max(found, key=lambda loop: len(loop.places))
        weights, found = dict.fromkeys(tile.places, 1.0), tile.inner
    once = n_all - len(weights)
    _weigh(weights, found, told)
    counts: Counter[str] = Counter()
    for place, weight in weights.items():
        if base(instructions[place].opcode) != "NOP":
            counts[instructions[place].opcode] += weight  # pyright: ignore[reportArgumentType]
    return counts, once


def per_unit(sass: str, told: Sequence[Passes], persistent: bool, threads_per_unit: float) -> dict[str, Any]:
    """Instructions per unit of work, all kinds and by kind.

    Args:
        threads_per_unit: threads of a program over the units of its tile.
    """
    counts, once = executed(sass, told, persistent)
    kinds: Counter[str] = Counter()
    for opcode, count in counts.items():
        kinds[kind(opcode)] += count
    return {
        "instructions": round(counts.total() * threads_per_unit, 3),
        **{name: round(kinds[name] * threads_per_unit, 3) for name in sorted(kinds)},
        "once_per_program": once,
    }
