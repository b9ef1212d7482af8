"""Models that stay compressed on a CPU, in docs/results.md."""

from typing import Any

from figures import load
from zoo_report import SHOWN

from miracle_hub.coding import multiply

_MODEL = "smollm2"
_COLUMNS = ("bits per weight", "dtype", "batch", "ms per step, dense", "compressed", "times", "MB, dense")


def section() -> str:
    """Text written by the compressed model beside the dense one, and products beside decoded bands."""
    found = load(f"kept-on-cpu-{_MODEL}")
    products, cores = found["results"]["products"], found["machine"]["cores"]
    lines = [
        "## Compressed in memory, on a CPU",
        "",
        f"`generate` of {SHOWN[_MODEL].title} on {cores} cores, greedy, with `keep_compressed=True` beside a "
        "dense load of the same files (`benchmarks/kept_on_cpu.py`); word table and head are dense in both. "
        "MB are the most that the process had.",
        "",
        f"| {' | '.join(_COLUMNS)} | compressed |",
        "|---" * (len(_COLUMNS) + 1) + "|",
        *map(_row, found["results"]["generate"]),
        "",
        f"Products of one matrix straight from the message take {_ratios(products, 1)} of the time of those "
        f"by decoded bands with one row of inputs, {_ratios(products, 16)} with 16, {_ratios(products, 32)} "
        f"with 32 and {_ratios(products, 64)} with 64. With more than {multiply._MOST_ROWS}, bands are "
        "decoded.",
    ]
    return "\n".join(lines)


def _row(row: dict[str, Any]) -> str:
    dense, kept = row["dense"], row["kept"]
    cells = [f"{row['bits']:g}", row["dtype"], f"{row['batch']}"]
    cells += [f"{run['milliseconds_per_step']:.0f}" for run in (dense, kept)]
    cells += [f"{row['times']:.1f}", *(f"{run['peak_mb']:,}" for run in (dense, kept))]
    return f"| {' | '.join(cells)} |"


def _ratios(products: list[dict[str, Any]], n: int) -> str:
    """The least and the largest, of all shapes, with so many rows of inputs."""
    of_n = [row["milliseconds"] for row in products if row["rows_of_x"] == n]
    ratios = sorted(one["message"] / one["bands"] for one in of_n)
    return f"{ratios[0]:.1f} to {ratios[-1]:.1f}"
