"""What makes a candidate of the zoo: ours, rounding to nearest, and peers in environments of their own.

Every method writes a folder that is evaluated as a stranger would load it, and says how many bytes its own
whole file has, how many seconds it took, and how much memory its process held at most (imports included).
"""

import json
import multiprocessing
import os
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

from record import ROOT
from zoo_models import ZOO, calibration, dense_folder, module_to_run
from zoo_rounding import copy_companions, round_folder

import miracle_hub
from miracle_hub.options import DEFAULT_WINDOW_BITS, CompressOptions

# A virtual environment per peer, made by hand: zoo_peers.py says what each needs.
PEERS = Path(os.environ.get("MIRACLE_PEERS", ROOT.parent / "peers-venv"))


class Made(NamedTuple):
    """What a method says of its file; `bytes` is None where it did not run, and `by` then says why."""

    bytes: int | None
    seconds: float
    peak_mb: int
    by: str


def measured(work: Callable[..., tuple[int, str]], *given: Any) -> Made:
    """A call that gives (bytes, by whom), in a fresh process, so that its peak of memory is its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_with_peak, work, *given).result()


def _with_peak(work: Callable[..., tuple[int, str]], *given: Any) -> Made:
    started = time.perf_counter()
    n_bytes, by = work(*given)
    return Made(n_bytes, round(time.perf_counter() - started, 1), peak_mb(), by)


def peak_mb() -> int:
    """Most resident memory that this process ever held, in MB."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line]
    return round(int(line.split()[1]) * 1024 / 1e6)


def ours(
    name: str, method: str, budget: dict[str, Any], out: Path, options: dict[str, Any]
) -> tuple[int, str]:
    """`miracle_hub.compress` within bits_per_weight or size."""
    given: dict[str, Any] = {
        "window_bits": DEFAULT_WINDOW_BITS,
        **_calibrated(name, method),
        **options,
        **budget,
    }
    model = None if method == "data-free" else module_to_run(name)
    chosen = CompressOptions(progress=False, **given)
    report = miracle_hub.compress(dense_folder(name), out, model=model, options=chosen)
    told = {key: value for key, value in given.items() if key not in ("bits_per_weight", "size", "calibrate")}
    return report.compressed_bytes, "miracle-hub " + json.dumps(told)


def _calibrated(name: str, method: str) -> dict[str, Any]:
    """What the method is called in `compress`; `data-free` is what it did before it knew of calibration."""
    if method == "data-free":
        return {"calibrate": None} if "calibrate" in {field.name for field in fields(CompressOptions)} else {}
    return {"calibrate": "self" if method == "self" else str(calibration(name))}


def round_to_nearest(name: str, bits: int, out: Path) -> tuple[int, str]:
    """The few lines of zoo_rounding.py."""
    return round_folder(dense_folder(name), bits, out), "zoo_rounding.py"


def peer(name: str, method: str, setting: str, out: Path) -> Made:
    """zoo_peers.py in the peer's own environment."""
    python = PEERS / method / "bin" / "python"
    if not python.exists():
        return Made(None, 0, 0, f"{python} is not there")
    copy_companions(dense_folder(name), out)
    script, facts = Path(__file__).with_name("zoo_peers.py"), out / "peer.json"
    command = [python, script, method, setting, dense_folder(name), out, ZOO / "peers"]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode or not facts.exists():
        last = (done.stderr.strip() or done.stdout.strip() or f"exit status {done.returncode}").splitlines()[
            -1
        ]
        print(done.stdout[-3000:], done.stderr[-6000:], flush=True)
        return Made(None, 0, 0, last)
    return Made(**json.loads(facts.read_text()))
