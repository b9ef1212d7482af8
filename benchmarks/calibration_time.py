"""How long calibration takes, side by side: no calibration, then every effort that was asked for.

    python benchmarks/calibration_time.py          SmolLM2 at 3 bits, efforts 0 and 1: half an hour
    python benchmarks/calibration_time.py --model minilm --bits 1 --effort 1 2

Efforts that are not asked for stay in the results as they were; every run names its commit.

For a machine on which nothing else runs: threads of torch wait for each other, and two that share a core with
another program take three times as long.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import record
from zoo_methods import measured, ours
from zoo_models import dense_folder, n_weights

from miracle_hub.calibrate.estimate import estimated
from miracle_hub.codec.config import read_config
from miracle_hub.codec.source import list_tensors, weight_files


def timed(name: str, method: str, bits: float, options: dict[str, Any]) -> dict[str, Any]:
    """Seconds and memory of one compression, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        made = measured(ours, name, method, {"bits_per_weight": bits}, Path(folder) / "out", options)
    return {"seconds": made.seconds, "peak_mb": made.peak_mb, "commit": record.commit()}


def said(name: str, effort: int, is_self: bool) -> dict[str, float]:
    """What is said before the work begins."""
    folder = dense_folder(name)
    found = estimated(list_tensors(weight_files(folder)), effort, read_config(folder), is_self)
    return {"said_seconds": round(60 * found.minutes), "said_mb": round(found.n_bytes / 1e6)}


def known(name: str, bits: float) -> dict[str, Any]:
    """Runs of before, of the same size."""
    path = record.RESULTS / f"calibration-time-{name}.json"
    found: Any = json.loads(path.read_text()) if path.exists() else {"results": {"bits_per_weight": None}}
    if found["results"]["bits_per_weight"] != bits:
        return {}
    runs = found["results"]["runs"]
    return {how: {"commit": found["commit"], **run} for how, run in runs.items()}


def main() -> None:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--bits", type=float, default=3.0)
    parser.add_argument("--effort", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--method", nargs="+", choices=("self", "calibrated"), default=["self", "calibrated"])
    a = parser.parse_args()
    runs = known(a.model, a.bits) | {"data-free": timed(a.model, "data-free", a.bits, {})}
    print("data-free", runs["data-free"], flush=True)
    for effort in a.effort:
        for method in a.method:
            found = timed(a.model, method, a.bits, {"effort": effort})
            runs[f"{method}, effort {effort}"] = {**found, **said(a.model, effort, method == "self")}
            print(method, effort, runs[f"{method}, effort {effort}"], flush=True)
            facts = {"bits_per_weight": a.bits, "n_weights": n_weights(a.model), "runs": runs}
            record.record(f"calibration-time-{a.model}", facts)


if __name__ == "__main__":
    main()
