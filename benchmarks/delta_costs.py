"""What a difference costs who loads it, and what one takes that is in few tensors.

    python benchmarks/delta_costs.py --folder FOLDER     FOLDER is that of benchmarks/deltas.py, with an `out`

Loading is timed in processes of their own, base and difference by turns; a fine-tune that changes one of a
hundred matrices is made by adding noise to it.
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

import torch
from deltas import file_bytes
from record import record
from safetensors.torch import load_file, save_file
from sst2 import source

import miracle_hub

_LOAD = """
import time, torch
torch.set_num_threads({threads})
from transformers import AutoModelForSequenceClassification as Auto
import miracle_hub
config = {{}} if {base!r} is None else {{"quantization_config": miracle_hub.MiracleConfig(base={base!r})}}
Auto.from_pretrained({folder!r}, **config)
started = time.monotonic()
Auto.from_pretrained({folder!r}, **config)
print(time.monotonic() - started)
"""


def seconds(folder: Path, base: Path | None, threads: int) -> float:
    """Of the second from_pretrained of a process, whose kernels are compiled."""
    code = _LOAD.format(folder=str(folder), base=None if base is None else str(base), threads=threads)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(done.stdout.splitlines()[-1])


def load_times(folder: Path, base: Path, repeats: int, threads: int) -> dict[str, Any]:
    """Medians, by turns."""
    found: dict[str, list[float]] = {"base": [], "difference": []}
    for _ in range(repeats):
        found["base"].append(seconds(folder / "headed", None, threads))
        found["difference"].append(seconds(folder / "out", base, threads))
    facts = {f"{name}_seconds": round(median(times), 3) for name, times in found.items()}
    n_bytes = file_bytes(folder / "out")
    return {**facts, "ratio": round(facts["difference_seconds"] / facts["base_seconds"], 2), "bytes": n_bytes}


def one_of_hundred(folder: Path, bits: float) -> dict[str, Any]:
    """A fine-tune that changes one matrix, at a rate of that matrix's own weights."""
    made, out = folder / "one", folder / "one-out"
    shutil.rmtree(made, ignore_errors=True)
    shutil.copytree(folder / "headed", made)
    tensors = load_file(made / "model.safetensors")
    name = "bert.encoder.layer.3.output.dense.weight"
    noise = torch.randn(tensors[name].shape, generator=torch.Generator().manual_seed(0))
    tensors[name] += 0.01 * tensors[name].std() * noise
    save_file(tensors, made / "model.safetensors", {"format": "pt"})
    size = round(bits * tensors[name].numel() / 8)
    options: dict[str, Any] = {"size": size, "calibrate": None, "progress": False, "overwrite": True}
    report = miracle_hub.compress(made, out, base=folder / "headed", **options)
    return {
        "tensors": report.n_same + report.n_differing,
        "differing": report.n_differing,
        "weights": report.n_weights,
        "of_these_differ": tensors[name].numel(),
        "bytes": report.compressed_bytes,
        "with_the_statement_of_the_base": file_bytes(out),
    }


def main() -> None:
    """Measure, print and record."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--folder", type=Path, required=True)
    p.add_argument("--repeats", type=int, default=5)
    p.add_argument("--threads", type=int, default=2)
    a = p.parse_args()
    found = {
        "one tensor of a hundred": one_of_hundred(a.folder, 2.0),
        "load": load_times(a.folder, Path(source()), a.repeats, a.threads),
    }
    print(json.dumps(found, indent=2))
    record("delta_costs", found)


if __name__ == "__main__":
    main()
