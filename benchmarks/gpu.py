"""Every kernel on one GPU: checked against its reference, then measured against what the machine can do.

    python benchmarks/gpu.py                  # checks, floors, measurements, tuning: about seven minutes
    python benchmarks/gpu.py --tune           # floors and the sweeps of tile sizes only
    python benchmarks/gpu.py --floors-only    # what an H200 should reach, computed; needs no GPU
    python benchmarks/gpu.py --out DIR --budget-s 420

Needs torch and triton; this package need not be installed. Writes benchmarks/results/<device>.json, and
miracle_kernels/tuning/<device>.json where other tiles beat the defaults; --out DIR moves both. Exit status:
1 after a failed check (a missed target is no failure), 2 without a GPU. Changes no setting of the machine.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import gpu_checks
import gpu_ops
import gpu_tune
import torch
from floors import H200, Chip, predictions
from gpu_problems import PROBLEMS, Problem
from gpu_timing import time_calls

from miracle_kernels._triton import HAS_TRITON
from miracle_kernels.tuning import device_name

RESULTS = gpu_ops.ROOT / "benchmarks" / "results"
NEED_GPU = (
    "benchmarks/gpu.py: expected a CUDA GPU and triton, found {}; run it on a machine with an NVIDIA GPU, or "
    "pass --floors-only for the computed floors"
)
DEVICE = torch.device("cuda")
QUERIED = "name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu"
PREBUILD_SECONDS, MAX_WORKERS = 150, 12
RESERVE_SECONDS = 15  # at the end, for writing and for whatever runs when the budget is used up

Task = tuple[str, Any, Any]


@dataclass
class Clock:
    """The time that this run may take."""

    budget_s: float
    started: float

    def left(self) -> float:
        """Seconds, less the reserve."""
        return self.budget_s - RESERVE_SECONDS - (time.monotonic() - self.started)


def query_gpu() -> dict[str, str]:
    """What nvidia-smi says, where it is there; reads only."""
    command = ["nvidia-smi", f"--query-gpu={QUERIED}", "--format=csv,noheader,nounits", "-i", "0"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(QUERIED.split(","), (value.strip() for value in found.split(",")), strict=False))


def package_version(name: str) -> str | None:
    """The installed version; none where a package runs from its folder, or is not there."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def commit() -> str:
    """The commit that runs, marked when the tree has changes; unknown without git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        found = subprocess.run(command, cwd=gpu_ops.ROOT, capture_output=True, text=True)
    except OSError:
        return "unknown"
    return found.stdout.strip() or "unknown"


def machine() -> dict[str, Any]:
    """Processor, GPU and versions."""
    packages = ("miracle-hub", "torch", "triton", "numpy")
    found: dict[str, Any] = {
        "cpu": platform.processor() or platform.machine(), "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(), "versions": {name: package_version(name) for name in packages},
    }  # fmt: skip
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found |= {"gpu": properties.name, "processors": properties.multi_processor_count}
        found |= {"gpu_memory_gb": round(properties.total_memory / 1e9, 1), "nvidia_smi": query_gpu()}
        found |= {"l2_bytes": getattr(properties, "L2_cache_size", None), "cuda": torch.version.cuda}
    return found


def matrix_rate(dtype: torch.dtype, device: torch.device, side: int = 8192) -> float:
    """FLOP/s of a large product of random matrices."""
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return 2 * side**3 / (time_calls([lambda: torch.mm(a, b)], device).median_ms / 1e3)


def measure_floors(device: torch.device) -> tuple[Chip, dict[str, float]]:
    """The chip as measured now: bandwidth of a 4 GiB copy, rates of matrix products; its clock."""
    source = torch.randint(256, (1 << 32,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copied = time_calls([lambda: target.copy_(source)], device).median_ms / 1e3
    found = {"copy_bytes": 2 * source.numel() / copied, "bf16_flops": matrix_rate(torch.bfloat16, device)}
    found["f16_flops"] = matrix_rate(torch.float16, device)
    # The highest clock that the card may take makes the floors of instructions hardest.
    clock = query_gpu().get("clocks.max.sm", "")
    found["clock_hz"] = float(clock) * 1e6 if clock.replace(".", "").isdigit() else H200.clock_hz
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    chip = replace(H200, name=device_name(device), processors=processors, clock_hz=found["clock_hz"],
                   copy_bytes=found["copy_bytes"], bf16_flops=found["bf16_flops"])  # fmt: skip
    return chip, found


def build(task: Task) -> str | None:
    """In a process of its own: run a check or a problem once, so that its kernels lie in Triton's cache."""
    kind, what, tiles = task
    torch.set_num_threads(1)
    try:
        if kind == "check":
            gpu_checks.run_check(gpu_checks.checks(DEVICE)[what], DEVICE)
        else:
            problem = gpu_ops.small(what)
            with gpu_tune.use(tiles):
                gpu_ops.PREPARE[problem.op](problem, DEVICE).calls[0]()
        torch.cuda.synchronize()
    except Exception as error:  # the measuring process meets it again, and records it
        return f"{type(error).__name__}: {error}"[:200]
    finally:
        torch.cuda.empty_cache()
    return None


def prebuild(tasks: list[Task], seconds: float) -> dict[str, Any]:
    """Compile in parallel processes; one after another takes minutes. Whatever is not done is done later."""
    started, workers = time.monotonic(), max(1, min(MAX_WORKERS, len(os.sched_getaffinity(0)) - 2))
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"))
    futures = [pool.submit(build, task) for task in tasks]
    done, late = wait(futures, timeout=max(1.0, min(seconds, PREBUILD_SECONDS)))
    processes = list((pool._processes or {}).values())
    pool.shutdown(wait=not late, cancel_futures=True)
    for process in processes if late else ():
        process.terminate()
    errors = [str(f.exception() or f.result()) for f in done if f.exception() or f.result()]
    return {"tasks": len(tasks), "late": len(late), "workers": workers, "errors": sorted(set(errors)),
            "seconds": round(time.monotonic() - started, 1)}  # fmt: skip


def measure_all(
    problems: list[Problem], chip: Chip, clock: Clock, results: dict[str, Any], tuned: bool = False
) -> None:
    """Append a row per problem; a crash is recorded as a failed check, a problem without time as skipped."""
    for problem in problems:
        name = f"{problem.op} {problem.label}"
        if clock.left() < 5:
            results["skipped"].append(name)
            continue
        torch.manual_seed(5)
        try:
            row = asdict(gpu_ops.measure(problem, chip, DEVICE, tuned))
        except Exception as error:  # of a compiler or a launch
            text = f"{type(error).__name__}: {error}"[:600]
            results["failures"].append({"problem": name, "error": text})
            print(f"FAILED {name}: {text[:200]}", flush=True)
            continue
        finally:
            torch.cuda.empty_cache()
        if "wrong" in row["details"]:
            results["failures"].append({"problem": name, "error": row["details"]["wrong"]})
        results["rows"].append(row)
        print(f"{name}: {row['ms']:.4f} ms, ratio {row['ratio']:.3f}", flush=True)


def check_all(results: dict[str, Any], note: str = "") -> None:
    """Run the checks; failures go to the results, and the run goes on."""
    for check in gpu_checks.checks(DEVICE):
        found = gpu_checks.run_check(check, DEVICE) | ({"with": note} if note else {})
        results["checks"].append(found)
        if not found["passed"]:
            results["failures"].append({"problem": check.name, "error": found["error"]})
            print(f"FAILED {check.name}: {found['error'][:200]}", flush=True)


def tune(results: dict[str, Any], clock: Clock, folder: Path) -> gpu_tune.Tiles:
    """Sweep while there is time; write the file when something beats its default."""
    chosen: gpu_tune.Tiles = {}
    tasks = [("problem", *task) for task in gpu_tune.tasks()]
    results["prebuild_tuning"] = prebuild(tasks, clock.left() / 2)
    for sweep in gpu_tune.SWEEPS:
        if clock.left() < 30:
            results["skipped"].append(f"tuning {sweep.key}")
            continue
        try:
            found = gpu_tune.run_sweep(sweep, DEVICE, lambda: clock.left() < 20)
        except Exception as error:  # a wrong result with the best tiles, or a problem that cannot be set up
            results["failures"].append({"problem": f"tuning {sweep.key}", "error": str(error)[:600]})
            continue
        finally:
            torch.cuda.empty_cache()
        results["tuning"].append(found)
        if "best" in found:
            chosen[sweep.key] = found["best"]
        print(f"tuning {sweep.key}: {found.get('best', 'default kept')}", flush=True)
    if chosen:
        results["tuning_file"] = str(gpu_tune.write(folder, chosen, results["tuning"]))
    return chosen


def remeasure(chosen: gpu_tune.Tiles, chip: Chip, clock: Clock, results: dict[str, Any]) -> None:
    """The required problems of the tuned ops again, and the checks, with the tuned tiles."""
    ops = {key.split("[")[0].removesuffix("_backward") for key in chosen}
    with gpu_tune.use(chosen):
        again = [problem for problem in PROBLEMS if problem.op in ops and problem.target is not None]
        measure_all(again, chip, clock, results, tuned=True)
        if clock.left() > 10:
            check_all(results, "tuned tiles")


def table(results: dict[str, Any]) -> str:
    """Op, problem, measured time, floor, ratio, target, met: the rows with a target last."""
    lines = [f"{'op':22} {'problem':46} {'ms':>10} {'floor ms':>10} {'ratio':>7} {'target':>7} met"]
    for row in sorted(results["rows"], key=lambda row: row["target"] is not None):
        said = {True: "yes", False: "NO", None: ""}[row["met"]] + " tuned" * row["tuned"]
        target = "" if row["target"] is None else f"{row['target']:g}"
        lines.append(f"{row['op']:22} {row['problem']:46} {row['ms']:10.4f} {row['floor_ms']:10.4f} "
                     f"{row['ratio']:7.3f} {target:>7} {said}")  # fmt: skip
    failed, skipped = len(results["failures"]), len(results["skipped"])
    return "\n".join([*lines, f"{failed} failures, {skipped} skipped for lack of time"])


def predicted_table(rows: list[dict[str, Any]]) -> str:
    """The computed floors and ratios: all units overlapped, and one after the other."""
    lines = [f"{'op':22} {'problem':46} {'floor us':>11} binding  overlapped serial target"]
    for row in rows:
        ratios = f"{row['predicted_ratio_overlapped']:10.2f} {row['predicted_ratio_serial']:6.2f}"
        lines.append(f"{row['op']:22} {row['problem']:46} {row['floor_microseconds']:11.1f} "
                     f"{row['binding_unit']:8} {ratios} {row['target'] or '':>6}")  # fmt: skip
    return "\n".join(lines)


def write(folder: Path, name: str, results: dict[str, Any]) -> Path:
    """<folder>/<name>.json, replaced at once."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {"benchmark": "gpu", "commit": commit(), "machine": machine(), "results": results}
    path, partial = folder / f"{name}.json", folder / f"{name}.partial"
    partial.write_text(json.dumps(content, indent=2) + "\n")
    partial.replace(path)
    return path


def run(chosen: argparse.Namespace) -> int:
    """The whole benchmark; 1 after a failure."""
    clock = Clock(chosen.budget_s, time.monotonic())
    results: dict[str, Any] = {"budget_s": chosen.budget_s, "skipped": [], "failures": [], "checks": []}
    results |= {"rows": [], "tuning": []}
    folder, name = chosen.out or RESULTS, device_name(DEVICE)
    save: Callable[[], Path] = lambda: write(folder, name, results)  # noqa: E731
    listed = [p for p in PROBLEMS if p.target is not None] if chosen.tune else PROBLEMS
    tasks: list[Task] = [("problem", problem, {}) for problem in listed]
    if not chosen.tune:
        tasks = [("check", index, None) for index in range(len(gpu_checks.checks(DEVICE)))] + tasks
        results["prebuild"] = prebuild(tasks, clock.left() / 2)
        print(f"compiled: {results['prebuild']}", flush=True)
    chip, results["floors"] = measure_floors(DEVICE)
    print(f"floors: {results['floors']}", flush=True)
    if not chosen.tune:
        check_all(results)
        measure_all([p for p in listed if not p.optional], chip, clock, results)
        save()
    if not chosen.no_tune:
        best = tune(results, clock, chosen.out / "tuning" if chosen.out else gpu_tune.TUNING)
        save()
        remeasure(best, chip, clock, results)
    if not chosen.tune:
        measure_all([p for p in listed if p.optional], chip, clock, results)
    results["seconds"] = round(time.monotonic() - clock.started, 1)
    print(table(results))
    print(f"wrote {save()}")
    return int(bool(results["failures"]))


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Check, measure and tune every kernel on one GPU.")
    parser.add_argument("--budget-s", type=float, default=420, help="seconds; what does not fit is skipped")
    parser.add_argument("--out", type=Path, help="folder of the results, and of tuning/<device>.json")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--tune", action="store_true", help="the floors and the sweeps only")
    kind.add_argument("--no-tune", action="store_true", help="no sweeps")
    kind.add_argument("--floors-only", action="store_true", help="the computed floors; needs no GPU")
    return parser.parse_args()


def main() -> int:
    """Exit status: 0, 1 after a failed check, 2 without a GPU."""
    chosen = arguments()
    if chosen.floors_only:
        found = predictions()
        print(predicted_table(found["problems"]))
        print(f"wrote {write(chosen.out or RESULTS, 'gpu-floors', found)}")
        return 0
    if not (torch.cuda.is_available() and HAS_TRITON):
        missing = "no triton" if torch.cuda.is_available() else "no GPU"
        print(NEED_GPU.format(missing), file=sys.stderr)
        return 2
    return run(chosen)


if __name__ == "__main__":
    sys.exit(main())
