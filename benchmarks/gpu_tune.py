"""Sweeps of tile sizes for the GPU benchmark: the best go to miracle_kernels/tuning/<device>.json."""

import importlib
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from gpu_ops import PREPARE, ROOT
from gpu_problems import Problem
from gpu_timing import device_ms

from miracle_kernels import tuning

TUNING = ROOT / "kernels" / "torch-ext" / "miracle_kernels" / "tuning"
# A configuration must beat the default by this, or by twice what the default's own timings differ by.
LEAST_GAIN = 0.02
SWEEP_MS = 60  # of timings per configuration and problem

Tiles = dict[str, dict[str, int]]


@dataclass(frozen=True)
class Sweep:
    """A grid for one entry of the tuning file.

    Args:
        key: the entry, as `tuning.tiles` looks it up.
        problems: timed with each configuration; their geometric mean decides.
        grid: values per option.
    """

    key: str
    problems: tuple[Problem, ...]
    grid: dict[str, tuple[int, ...]]

    def configurations(self) -> list[dict[str, int]]:
        """All combinations."""
        return [dict(zip(self.grid, values, strict=True)) for values in product(*self.grid.values())]


def _sweeps() -> list[Sweep]:
    passes = [("reparameterize", "forward"), ("reparameterize", "backward")]
    passes += [("reparameterize_mean_kl", "forward"), ("reparameterize_mean_kl", "backward")]
    wide: dict[str, Any] = dict(columns=8192, dtype="bfloat16")
    linear: dict[str, Any] = dict(wide, rotation=128)
    return [
        Sweep("decode_linear[batch=1]", tuple(
            Problem("decode_linear", 1 << 26, code, **linear) for code in ((12, 2, 1), (12, 4, 2))
        ), {"TILE": (8192, 16384, 32768), "num_warps": (8, 16), "programs_per_processor": (1, 2, 4)}),
        Sweep("decode[with_digest=0]", tuple(
            Problem("decode", 1 << 27, rotation=rotation, **wide) for rotation in (1, 128)
        ), {"TILE": (4096, 8192, 16384), "num_warps": (4, 8), "programs_per_processor": (2, 4, 8)}),
        Sweep("slide[window_bits=12]", (Problem("slide", 1 << 24),),
              {"TILE_NODES": (256, 512, 1024), "num_warps": (2, 4, 8), "programs_per_processor": (4, 8, 16)}),
        Sweep("select[step_weights=32]", (Problem("select", 1 << 16, (18, 18, 32)),),
              {"TILE_BLOCKS": (256, 512, 1024), "PART_BLOCKS": (128, 256), "TILE_CANDIDATES": (32, 64),
               "num_warps": (4, 8)}),
        *(Sweep(op + "_backward" * (stage == "backward"), (Problem(op, 1 << 26, stage=stage),),
                {"TILE": (512, 1024, 2048), "num_warps": (4, 8)}) for op, stage in passes),
        Sweep("decode_linear[batch=16]", (Problem("decode_linear", 1 << 26, batch=16, **linear),),
              {"TILE_ROWS": (16, 32, 64), "TILE_COLUMNS": (128, 256), "programs_per_processor": (1, 2)}),
        Sweep("codebook", (Problem("codebook", 1 << 24, (24, 24, 32)),),
              {"TILE_STATES": (64, 128, 256), "TILE_GROUPS": (1, 2, 4), "num_warps": (4, 8)}),
    ]  # fmt: skip


SWEEPS: list[Sweep] = _sweeps()


def tasks() -> list[tuple[Problem, Tiles]]:
    """What to compile ahead: each sweep's configurations, those that differ in a grid only once."""
    found: list[tuple[Problem, Tiles]] = []
    for sweep in SWEEPS:
        for chosen in sweep.configurations():
            if chosen.get("programs_per_processor", 0) == sweep.grid.get("programs_per_processor", (0,))[0]:
                found += [(problem, {sweep.key: chosen}) for problem in sweep.problems]
    return found


@contextmanager
def use(tiles: Tiles) -> Iterator[None]:
    """The device's file with these entries changed."""
    name = tuning.device_name(torch.device("cuda"))
    current = tuning._measured(name)
    merged = {key: {**current.get(key, {}), **tiles.get(key, {})} for key in {*current, *tiles}}
    with mock.patch.object(tuning, "_measured", lambda name: merged):
        yield


def compiled_kernels(op: str) -> Iterator[Any]:
    """The kernels of an op's module that this process compiled; none where Triton keeps them elsewhere."""
    for function in vars(importlib.import_module(f"miracle_kernels.{op}")).values():
        for cache in getattr(function, "device_caches", {}).values():
            yield from cache[0].values() if isinstance(cache, tuple) and isinstance(cache[0], dict) else ()


def spilled(op: str, before: set[int]) -> int:
    """Bytes spilled by the kernels that were compiled since."""
    new = [kernel for kernel in compiled_kernels(op) if id(kernel) not in before]
    return sum(getattr(kernel, "n_spills", 0) or 0 for kernel in new)


def time_tiles(
    problems: list[tuple[str, list[Callable[[], Any]], bool]], tiles: Tiles, device: torch.device
) -> dict[str, Any]:
    """Milliseconds per problem and their geometric mean, or why there are none."""
    try:
        with use(tiles):
            before = {id(kernel) for op, _, _ in problems for kernel in compiled_kernels(op)}
            found = [device_ms(calls, device, graph, SWEEP_MS) for _, calls, graph in problems]
            spills = sum(spilled(op, before) for op in {op for op, _, _ in problems})
    except Exception as error:  # out of resources, or whatever Triton's passes do
        return {"skipped": f"{type(error).__name__}: {error}"[:300]}
    if spills:
        return {"skipped": f"{spills} bytes spilled", "ms": found}
    return {"ms": found, "mean_ms": math.prod(found) ** (1 / len(found))}


def run_sweep(sweep: Sweep, device: torch.device, is_over: Callable[[], bool]) -> dict[str, Any]:
    """Every configuration's time; `best` is the one to keep, absent where the default is as good."""
    prepared = [(problem.op, PREPARE[problem.op](problem, device)) for problem in sweep.problems]
    problems = [(op, one.calls, one.graph) for op, one in prepared]
    default, rows = time_tiles(problems, {}, device), []
    for chosen in sweep.configurations():
        if is_over():
            break
        rows.append({"tiles": chosen, **time_tiles(problems, {sweep.key: chosen}, device)})
    again = time_tiles(problems, {}, device)
    timed = sorted((row for row in rows if "mean_ms" in row), key=lambda row: row["mean_ms"])
    times = [run["mean_ms"] for run in (default, again) if "mean_ms" in run]
    found = {
        "key": sweep.key,
        "problems": [problem.label for problem in sweep.problems],
        "default": [default, again],
        "configurations": rows,
        "complete": len(rows) == len(sweep.configurations()),
    }
    noise = max(LEAST_GAIN, 2 * (max(times) / min(times) - 1)) if times else 0.0
    if timed and (not times or timed[0]["mean_ms"] < min(times) * (1 - noise)):
        found["best"] = timed[0]["tiles"]
        with use({sweep.key: timed[0]["tiles"]}):
            for _, one in prepared:
                one.verify()
    return found


def write(folder: Path, chosen: Tiles, sweeps: list[dict[str, Any]]) -> Path:
    """The tuning file: what was there, with the entries that were found, and the times that chose them."""
    name = tuning.device_name(torch.device("cuda"))
    tiles = {**tuning._measured(name), **chosen}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps({"tiles": tiles, "measured": sweeps}, indent=2) + "\n")
    return path
