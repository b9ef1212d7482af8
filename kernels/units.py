"""What a program of each kernel does per tile, in units, and how often its loops run: from the launch alone.

Where a loop's times come from stands beside it. A kernel that is not here is not counted.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from counting import Passes, UnexpectedLoops, per_unit


class Work(NamedTuple):
    """Of one program.

    Args:
        units: per tile; what a tile computes past the edges of a matrix is no unit.
        inner: the loops inside a tile, in the order of the source.
        persistent: whether the kernel loops over tiles, or is one.
    """

    unit: str
    units: float
    inner: tuple[Passes, ...] = ()
    persistent: bool = False


# The arguments and constants of a launch by name.
Launched = Mapping[str, Any]


def _parts(n: int, size: int) -> int:
    return -(-n // size)


def _codebook(given: Launched) -> Work:
    widest = 8 * given["TILE_GROUPS"]
    across = given["STEP_WEIGHTS"] / _parts(given["STEP_WEIGHTS"], widest)
    return Work("candidate", given["TILE_STATES"] * across)


def _decode(given: Launched) -> Work:
    across = given["columns"] / _parts(given["columns"], given["TILE_COLUMNS"])
    return Work("weight", given["TILE_ROWS"] * across, persistent=True)


def _linear(given: Launched) -> Work:
    """A tile is some rows of the matrix; the loop goes over its columns, TILE_COLUMNS at a time."""
    times = _parts(given["columns"], given["TILE_COLUMNS"])
    return Work("weight", given["TILE_ROWS"] * given["columns"], (Passes(times),), persistent=True)


def _rotate(given: Launched) -> Work:
    """One row: once for the largest, once to write; TILE columns at a time."""
    times = _parts(given["columns"], given["TILE"])
    return Work("element", given["columns"], (Passes(times), Passes(times)))


def _scan(given: Launched) -> Work:
    return Work("score", given["TILE_BLOCKS"] * given["TILE_CANDIDATES"], persistent=True)


def _slide(given: Launched) -> Work:
    """A tile is a step of the trellis: every transition. In it, nodes and for each of them branches."""
    bits, step_bits = given["L"], given["K"]
    branches = Passes(_parts(1 << step_bits, given["TILE_BRANCHES"]))
    nodes = _parts(1 << (bits - step_bits), given["TILE_NODES"])
    inner = (Passes(nodes, (branches,)),) if nodes > 1 else (branches,)
    return Work("transition", 1 << bits, inner, persistent=True)


def _tile(unit: str) -> Callable[[Launched], Work]:
    return lambda given: Work(unit, given["TILE"])


def _blocks(given: Launched) -> Work:
    return Work("weight", given["TILE_BLOCKS"] * given["BLOCK_WEIGHTS"])


_WORK: dict[str, Callable[[Launched], Work]] = {
    "codebook_kernel": _codebook,
    "decode_kernel": _decode,
    "vector_kernel": _linear,
    "matrix_kernel": _linear,
    "rotate_kernel": _rotate,
    "rotate_vector_kernel": _tile("element"),
    "scan_kernel": _scan,
    "choose_kernel": lambda given: Work("block", 1),
    "slide_kernel": _slide,
    "cost_kernel": _tile("weight"),
    "pack_kernel": _tile("byte"),
    "reparameterize_kernel": _tile("weight"),
    "reparameterize_backward_kernel": _tile("weight"),
    "reparameterize_mean_kl_kernel": _blocks,
    "reparameterize_mean_kl_backward_kernel": _blocks,
}


def counted(kernel: str, launched: Launched, sass: str, threads: int) -> dict[str, Any]:
    """`unit` and `per_unit` of a kernel, as resources.json has them; why not, where its loops are others.

    Args:
        kernel: its name without underscores at its ends.
        threads: of a program.
    """
    if kernel not in _WORK:
        return {}
    work = _WORK[kernel](launched)
    try:
        found = per_unit(sass, work.inner, work.persistent, threads / work.units)
    except UnexpectedLoops as error:
        return {"unit": work.unit, "uncounted": str(error)}
    return {"unit": work.unit, "per_unit": found}
