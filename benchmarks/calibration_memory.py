"""Memory of a calibrated compression, taken apart: the most that is resident while each part of it runs.

    python benchmarks/calibration_memory.py          SmolLM2 at 3 bits, efforts 0 and 1

Windows are narrow: memory does not depend on them, and the run is short. So are the seconds of coding, but
not those of other parts. Beside it is the dense model in float32 with gradients and two moments of two
blocks.
"""

import argparse
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from types import FrameType
from typing import Any

import record
from zoo_models import calibration, dense_folder

_WINDOW_BITS = 8
# Modules whose work is told apart, by what it is called.
_PARTS = {
    "written": "texts of its own",
    "sensitivity": "looks",
    "survey": "survey",
    "trials": "trials of rates and damping",
    "block_refits": "refits of blocks",
    "by_blocks": "coding between refits",
    "tuning": "tuning at the end",
    "teacher": "answers, dense and coded",
    "judge": "judging the file",
    "refits": "coding",
    "writer": "coding and writing",
    "compress": "everything else",
}


def resident_mb() -> float:
    """Of this process now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def _part(frame: FrameType | None) -> str:
    """What the innermost frame that is known belongs to."""
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if "miracle_hub" in path.parts and path.stem in _PARTS:
            return _PARTS[path.stem]
        frame = frame.f_back
    return "before"


@contextmanager
def watched() -> Iterator[tuple[dict[str, float], dict[str, float]]]:
    """Most resident megabytes, and seconds, by part of what the thread that enters does."""
    most, seconds = dict[str, float](), dict[str, float]()
    done, thread = threading.Event(), threading.get_ident()

    def watch() -> None:
        last = time.perf_counter()
        while not done.wait(0.02):
            part = _part(sys._current_frames().get(thread))
            most[part] = max(most.get(part, 0.0), round(resident_mb()))
            last, before = time.perf_counter(), last
            seconds[part] = seconds.get(part, 0.0) + last - before

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield most, seconds
    finally:
        done.set()
        watcher.join()


def compressed(name: str, bits: float, data: str, effort: int) -> dict[str, Any]:
    """One compression, in a process of its own."""
    import torch
    from transformers import AutoConfig

    import miracle_hub

    folder = dense_folder(name)
    imported, begun = resident_mb(), time.perf_counter()
    options: dict[str, Any] = {"calibrate": data, "effort": effort, "window_bits": _WINDOW_BITS}
    with tempfile.TemporaryDirectory() as out, watched() as (parts, seconds):
        report = miracle_hub.compress(folder, Path(out) / "out", bits_per_weight=bits, **options)
    layers = AutoConfig.from_pretrained(folder).get_text_config().num_hidden_layers
    dense = 4 * report.n_weights / 1e6
    return {
        "imported_mb": round(imported),
        "parts_mb": parts,
        "parts_seconds": {part: round(found, 1) for part, found in seconds.items()},
        "peak_mb": max(parts.values()),
        "dense_float32_mb": round(dense),
        "dense_and_two_blocks_mb": round(dense + 2 * 3 * dense / layers),
        "seconds": round(time.perf_counter() - begun),
        "threads": torch.get_num_threads(),
    }


def main() -> None:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--bits", type=float, default=3.0)
    parser.add_argument("--effort", nargs="+", type=int, default=[0, 1])
    a = parser.parse_args()
    runs = dict[str, Any]()
    for effort in a.effort:
        for how, data in (("self", "self"), ("calibrated", str(calibration(a.model)))):
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                runs[f"{how}, effort {effort}"] = pool.submit(
                    compressed, a.model, a.bits, data, effort
                ).result()
            print(how, effort, runs[f"{how}, effort {effort}"], flush=True)
    record.record(f"calibration-memory-{a.model}", {"bits_per_weight": a.bits, "runs": runs})


if __name__ == "__main__":
    main()
