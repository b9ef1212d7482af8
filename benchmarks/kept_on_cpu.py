"""Text written on a CPU by a model that stays compressed, beside the dense one: time per token and memory.

python benchmarks/kept_on_cpu.py          SmolLM2 at 2 and 4 bits, batches of 1, 4 and 16
"""

import argparse
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import record
from zoo_methods import peak_mb
from zoo_models import dense_folder

import miracle_hub
from miracle_hub import MiracleConfig

_WINDOW_BITS = 12
_NEW, _GIVEN, _RUNS = 32, 16, 3


def written(folder: Path, keep_compressed: bool, batch: int, dtype: str) -> dict[str, Any]:
    """Median milliseconds per step of greedy writing, and the most memory of the process."""
    import torch
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = (
        {"quantization_config": MiracleConfig(keep_compressed=True)} if keep_compressed else {}
    )
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), **options)
    model = loaded.eval()
    ids = torch.randint(1000, 40_000, (batch, _GIVEN), generator=torch.Generator().manual_seed(0))
    seconds = []
    with torch.inference_mode():
        for _ in range(_RUNS + 1):  # the first one compiles
            begun = time.perf_counter()
            model.generate(ids, max_new_tokens=_NEW, min_new_tokens=_NEW, do_sample=False)
            seconds.append(time.perf_counter() - begun)
    milliseconds = 1000 * statistics.median(seconds[1:]) / _NEW
    return {"milliseconds_per_step": round(milliseconds, 1), "peak_mb": peak_mb()}


def apart(*given: Any) -> dict[str, Any]:
    """In a process of its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(written, *given).result()


def main() -> None:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--bits", nargs="+", type=float, default=[2.0, 4.0])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 4, 16])
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    a = parser.parse_args()
    rows = list[dict[str, Any]]()
    for bits in a.bits:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "compressed"
            options: dict[str, Any] = {"calibrate": None, "window_bits": _WINDOW_BITS, "progress": False}
            report = miracle_hub.compress(dense_folder(a.model), folder, bits_per_weight=bits, **options)
            for dtype in a.dtype:
                for batch in a.batch:
                    dense, kept = (apart(folder, is_kept, batch, dtype) for is_kept in (False, True))
                    ratio = round(kept["milliseconds_per_step"] / dense["milliseconds_per_step"], 2)
                    row = {
                        "bits": bits,
                        "file_bytes": report.compressed_bytes,
                        "dtype": dtype,
                        "batch": batch,
                    }
                    rows.append({**row, "dense": dense, "kept": kept, "times": ratio})
                    print(rows[-1], flush=True)
    record.record(f"kept-on-cpu-{a.model}", rows)


if __name__ == "__main__":
    main()
