"""Plots of a compressed repository, from what its files and a coding journal beside them say."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from miracle_hub.codec.inspection import Inspection, Plot, TensorReport
from miracle_hub.files.whole import writing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# More names than this cannot be read.
_MOST_NAMES = 60
_JOURNAL = "coding.json"


def write_plots(inspection: Inspection, journal: list[dict[str, Any]], folder: Path) -> tuple[Plot, ...]:
    """The plots of a repository, as far as there are data for them.

    Args:
        journal: rows of a coding run, see `read_journal`.

    Raises:
        OutputWriteError: a file cannot be written.
    """
    coded = [tensor for tensor in inspection.tensors if not tensor.reason and tensor.n_weights]
    known = [tensor for tensor in coded if tensor.relative_error > 0]
    wanted: list[tuple[str, list, Callable[[Axes, list], None], str]] = [
        ("bits_per_tensor", coded, _bits, "no tensor is a payload of its own"),
        ("squared_error_per_tensor", known, _errors, "no payload states an error: training coded them"),
        ("kl_per_group", _groups(journal), _kl, f"there is no {_JOURNAL} of a coding run beside the files"),
        ("rate_distortion", known, _rate_distortion, "no payload states an error: training coded them"),
    ]
    plots = []
    for name, rows, draw, reason in wanted:
        path = folder / f"{name}.png"
        if rows:
            _save(path, lambda axes, rows=rows, draw=draw: draw(axes, rows), _height(name, rows))
        plots.append(Plot(path, "" if rows else reason))
    return tuple(plots)


def read_journal(source: Path) -> list[dict[str, Any]]:
    """Rows of the coding journal in a folder, or in that of the fit that wrote it; empty if there is none."""
    for path in (source / _JOURNAL, source.parent / f"{source.name}-fit" / _JOURNAL):
        if path.is_file():
            try:
                rows = json.loads(path.read_text(encoding="utf-8"))
            except (ValueError, RecursionError):
                rows = None
            return rows if isinstance(rows, list) and all(isinstance(row, dict) for row in rows) else []
    return []


def _groups(journal: list[dict[str, Any]]) -> list[tuple[float, float]]:
    """Values coded so far, and KL per value in bits, of every group."""
    found, before = [], 0.0
    for row in journal:
        values, kl_bits = _number(row.get("coded_values")), _number(row.get("kl_bits"))
        if not values > before or math.isnan(kl_bits):
            return []
        found.append((values, kl_bits / (values - before)))
        before = values
    return found


def _number(value: object) -> float:
    """NaN for what is none."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else math.nan


def _height(name: str, rows: list) -> float:
    """Inches: a line of text for every name."""
    named = name.endswith("_tensor") and len(rows) <= _MOST_NAMES
    return max(4.0, 1.2 + 0.19 * len(rows)) if named else 4.5


def _save(path: Path, draw: "Callable[[Axes], None]", height: float) -> None:
    # Late: it takes half a second. Without pyplot there is no window system and nothing to close.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, height), layout="constrained")
    FigureCanvasAgg(figure)
    draw(figure.subplots())
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=100, metadata={"Software": None})  # equal plots are equal files


def _bars(axes: "Axes", tensors: list[TensorReport], values: list[float], label: str) -> None:
    """A bar per tensor, with its name where there is room, else a point."""
    if len(tensors) <= _MOST_NAMES:
        axes.barh(range(len(tensors)), values, height=0.7)
        # As they are: a $ begins no formula.
        names = [tensor.name if len(tensor.name) <= 60 else f"…{tensor.name[-59:]}" for tensor in tensors]
        axes.set_yticks(range(len(tensors)), names, fontsize=7, parse_math=False)
        axes.invert_yaxis()
        axes.set_xlabel(label)
    else:
        axes.plot(values, ".", markersize=3)
        axes.set_xlabel("tensor, in order of the files")
        axes.set_ylabel(label)


def _bits(axes: "Axes", tensors: list[TensorReport]) -> None:
    _bars(axes, tensors, [tensor.rate for tensor in tensors], "bits per weight, with scales")


def _errors(axes: "Axes", tensors: list[TensorReport]) -> None:
    _bars(axes, tensors, [tensor.relative_error for tensor in tensors], "relative squared error")


def _kl(axes: "Axes", groups: list[tuple[float, float]]) -> None:
    last = groups[-1][0]
    axes.plot([values / last for values, _ in groups], [kl for _, kl in groups], ".-", markersize=4)
    axes.set_xlabel("share of the values that is coded")
    axes.set_ylabel("KL of the group of blocks, bits per value")


def _rate_distortion(axes: "Axes", tensors: list[TensorReport]) -> None:
    """Every tensor as a point whose area grows with its weights, above Shannon's bound."""
    rates = [tensor.rate for tensor in tensors]
    most = max(tensor.n_weights for tensor in tensors)
    areas = [6 + 120 * tensor.n_weights / most for tensor in tensors]
    axes.scatter(rates, [tensor.relative_error for tensor in tensors], s=areas, alpha=0.5, label="a tensor")
    grid = [max(rates) * 1.05 * i / 100 for i in range(101)]
    bound = [4.0**-rate for rate in grid]
    axes.plot(grid, bound, "k", linewidth=1, label="$4^{-R}$, Shannon's bound (Gaussian)")
    axes.set_yscale("log")
    axes.set_xlabel("R, bits per weight")
    axes.set_ylabel("relative squared error")
    axes.legend()
