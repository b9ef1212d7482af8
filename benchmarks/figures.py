"""The figures of README.md and docs/results.md as SVG, from benchmarks/results/*.json.

A figure's file begins with the SHA-256 of what it shows, so that a test can tell whether it is current
whatever version of matplotlib draws it.
"""

import hashlib
import io
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from record import RESULTS, ROOT
from zoo_report import SHOWN, curves, drawn, figure

FIGURES = ROOT / "docs" / "figures"
PEERS = ("nncodec", "hqq", "round-to-nearest", "nf4")
_LABELS = {
    "nncodec": "NNCodec 2.1.3",
    "hqq": "HQQ, groups of 64",
    "round-to-nearest": "round to nearest, groups of 64",
    "nf4": "bitsandbytes NF4",
}
_LEAST_SPEARMAN = 45


@dataclass(frozen=True)
class Curve:
    """Points (x, y) under one label."""

    label: str
    points: list[tuple[float, float]]


def load(name: str) -> dict[str, Any]:
    """The results of one benchmark."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def rate_quality() -> list[Curve]:
    """STS-B Spearman over bits of the whole file, ours and every peer's that was measured."""
    rows = load("minilm")["results"]["compressed"]
    curves = [Curve("miracle-hub", [(r["bits_per_weight"], r["spearman"]["test"]) for r in rows])]
    for name in PEERS:
        rows = load(f"peers/{name}")["results"]["rows"]
        points = [(r["bits_per_weight"], r["spearman"]["test"]) for r in rows]
        curves.append(Curve(_LABELS[name], sorted(p for p in points if p[1] >= _LEAST_SPEARMAN)))
    return curves


def lenet() -> list[Curve]:
    """Test errors of LeNet-5 over bytes of the file, every seed."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for row in load("lenet")["results"]["coded"]:
        points = curves.setdefault(row["parametrization"], [])
        points += [(row["file_bytes"], error) for error in row["test_errors"]]
    return [Curve(label, sorted(points)) for label, points in sorted(curves.items())]


def rate_distortion() -> list[Curve]:
    """Distance to Shannon's bound in dB over the rate, by window."""
    rows = load("rate_distortion")["results"]["codes"]
    curves = []
    for window in (8, 12, 14, 16):
        best: dict[float, float] = {}
        for r in rows:
            if r["window_bits"] == window and r["step_bits"] < window:
                best[r["bits_per_weight"]] = min(r["gap_db"], best.get(r["bits_per_weight"], 99.0))
        curves.append(Curve(f"windows of {window} bits", sorted(p for p in best.items() if p[0] <= 4)))
    blocks = [r for r in rows if r["step_bits"] == r["window_bits"] == 16]
    curves.append(Curve("blocks of 16 bits", sorted((r["bits_per_weight"], r["gap_db"]) for r in blocks)))
    return curves


def draw_rate_quality(axes: Axes, curves: list[Curve]) -> None:
    """Lines, and the dense model's score."""
    dense = load("minilm")["results"]["dense"]["spearman"]["test"]
    axes.axhline(dense, color="black", linewidth=0.8, linestyle=":", label=f"dense, 32 bits: {dense:.2f}")
    for curve, style in zip(curves, ("o-", "s--", "^--", "v--", "D"), strict=True):
        _plot(axes, curve, style, 2.0 if style == "o-" else 1.0)
    axes.set_ylim(_LEAST_SPEARMAN, 84)
    axes.set_xlabel("bits per weight, whole file")
    axes.set_ylabel("STS-B test, Spearman × 100")
    axes.legend(fontsize=8, loc="lower right")


def draw_lenet(axes: Axes, curves: list[Curve]) -> None:
    """A point per seed."""
    for curve, style in zip(curves, ("o", "x"), strict=True):
        _plot(axes, curve, style, 1.0)
    axes.set_ylim(0, None)
    axes.set_xlim(0, None)
    axes.set_xlabel("bytes of the file (dense: 1,724,320)")
    axes.set_ylabel("MNIST test error, %")
    axes.legend(fontsize=8, loc="lower right")


def draw_rate_distortion(axes: Axes, curves: list[Curve]) -> None:
    """Lines above 0, which is the bound."""
    for curve in curves:
        _plot(axes, curve, "o-" if "windows" in curve.label else "s--", 1.0)
    axes.set_ylim(0, None)
    axes.set_xlabel("bits per weight of the code")
    axes.set_ylabel("dB above Shannon's bound")
    axes.legend(fontsize=8)


def _plot(axes: Axes, curve: Curve, style: str, width: float) -> None:
    xs, ys = [x for x, _ in curve.points], [y for _, y in curve.points]
    axes.plot(xs, ys, style, label=curve.label, linewidth=width, markersize=4)


def zoo(name: str) -> list[Curve]:
    """How far from dense a model of the zoo is over bytes of the whole file, method by method."""
    return [Curve(label, points) for label, points in curves(name)]


def draw_zoo(name: str, axes: Axes, curves: list[Curve]) -> None:
    """A line per method; distances on a logarithmic scale."""
    column = SHOWN[name].drawn
    for curve, marker in zip(curves, "oD*s^vXP", strict=False):
        ours = marker in "oD*"
        _plot(axes, curve, f"{marker}-" if ours else f"{marker}--", 2.0 if ours else 1.0)
    if column.falls:
        axes.set_yscale("log")
    axes.set_xlabel(f"bytes of the whole file, {SHOWN[name].title}")
    axes.set_ylabel(column.heading)
    axes.legend(fontsize=8)


DRAWN: dict[str, tuple[Callable[[], list[Curve]], Callable[[Axes, list[Curve]], None]]] = {
    "rate_quality": (rate_quality, draw_rate_quality),
    "lenet": (lenet, draw_lenet),
    "rate_distortion": (rate_distortion, draw_rate_distortion),
    **{figure(name): (partial(zoo, name), partial(draw_zoo, name)) for name in drawn()},
}


def shown(name: str) -> str:
    """SHA-256 of what a figure shows."""
    curves = DRAWN[name][0]()
    return hashlib.sha256(json.dumps([[c.label, c.points] for c in curves]).encode()).hexdigest()


def svg(name: str) -> str:
    """A figure's file; equal results give equal text under one version of matplotlib."""
    data, draw = DRAWN[name]
    with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "path", "font.size": 9}):
        figure = Figure(figsize=(7, 3.6), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.subplots()
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        draw(axes, data())
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    # Spaces at the ends of lines are matplotlib's.
    drawn = re.sub(r" +$", "", text.getvalue(), flags=re.MULTILINE)
    head, rest = drawn.split("\n", 1)
    return f"{head}\n<!-- {shown(name)} -->\n{rest}"


def write_figures() -> None:
    """Write those that are not current."""
    FIGURES.mkdir(parents=True, exist_ok=True)
    for name in DRAWN:
        path = FIGURES / f"{name}.svg"
        if not path.exists() or shown(name) not in path.read_text(encoding="utf-8"):
            path.write_text(svg(name), encoding="utf-8")
            print(f"wrote {path.relative_to(ROOT)}")
