"""What calibration takes in time and memory, in docs/results.md."""

import json
from pathlib import Path
from typing import Any

import record
from zoo_report import SHOWN

_HEAD = """## What calibration takes

Compressions one after the other, each in a process of its own that has the machine for itself
(`benchmarks/calibration_time.py`); "said" is what is said before the work begins. Texts of its own are in
the time. Each row names its commit; in 7fb06f2 texts, trials and answers to fit to were in float32.
Times are over the data-free run of the last commit; MiniLM's compiled its kernels, without which it took
13.5 s."""
_MEMORY = """Most memory that is resident while each part of it runs, in MB, and, after a slash, its seconds
(`benchmarks/calibration_memory.py`); coding is with windows of 8 bits here, which take less time and about
as much memory as those of 14."""


def section() -> str:
    """Both tables, of every model that was measured."""
    times = [_times(path.stem.split("-", 2)[2], _results(path)) for path in _found("time")]
    parts = [_parts(path.stem.split("-", 2)[2], _results(path)) for path in _found("memory")]
    return "\n\n".join([_HEAD, *times, *([_MEMORY] if parts else []), *parts])


def _found(what: str) -> list[Path]:
    return sorted(record.RESULTS.glob(f"calibration-{what}-*.json"))


def _results(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())["results"]


def _times(name: str, found: dict[str, Any]) -> str:
    runs = found["runs"]
    first = runs["data-free"]["seconds"]
    what = f"{SHOWN[name].title}, {found['bits_per_weight']:g} bits"
    lines = [
        f"| {what} | seconds | times | said | peak MB | commit |",
        "|---|---|---|---|---|---|",
    ]
    for how, run in runs.items():
        said = f"{run['said_seconds']:,}" if "said_seconds" in run else ""
        ratio = run["seconds"] / first
        figures = [f"{run['seconds']:.0f}", f"{ratio:.2f}", said, f"{run['peak_mb']:,}", run["commit"][:7]]
        lines.append(f"| {how} | {' | '.join(figures)} |")
    return "\n".join(lines)


def _parts(name: str, found: dict[str, Any]) -> str:
    runs = found["runs"]
    names = dict.fromkeys(part for run in runs.values() for part in run["parts_mb"])
    parts = [part for part in names if max(run["parts_seconds"].get(part, 0) for run in runs.values()) >= 1]
    lines = [
        f"| {SHOWN[name].title} | {' | '.join(runs)} |",
        "|---" * (1 + len(runs)) + "|",
        f"| when all is imported | {' | '.join(str(run['imported_mb']) for run in runs.values())} |",
    ]
    for part in parts:
        cells = [_cell(run, part) for run in runs.values()]
        lines.append(f"| {part} | {' | '.join(cells)} |")
    wanted = next(iter(runs.values()))["dense_and_two_blocks_mb"]
    said = f"The dense model in float32 with gradients and two moments of two blocks has {wanted:,} MB."
    return "\n".join([*lines, "", said])


def _cell(run: dict[str, Any], part: str) -> str:
    if part not in run["parts_mb"]:
        return ""
    return f"{run['parts_mb'][part]:,.0f} / {run['parts_seconds'][part]:.0f}"
