"""Peak resident memory of compressing a 1 GB checkpoint in five shards, and of decompressing it.

The checkpoint is 256 M float32 weights of 8 MB matrices, made on the spot. Windows of 8 bits keep
the run short; memory does not depend on them.
"""

import json
import multiprocessing
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from record import record

_SHARDS, _PER_SHARD, _ROWS, _COLUMNS = 5, 25, 2048, 1024
_COMPRESS = """
import sys, miracle_hub
options = dict(bits_per_weight=2.0, window_bits=8, calibrate=None, progress=False)
miracle_hub.compress(sys.argv[1], sys.argv[2], **options)
"""
_DECOMPRESS = """
import sys, miracle_hub
miracle_hub.decompress(sys.argv[1], sys.argv[2], progress=False, max_shard_size="250MB")
"""


def make_checkpoint(folder: Path) -> int:
    """Five shards and their index; returns the bytes."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir()
    weight_map = {}
    generator = torch.Generator().manual_seed(0)
    for shard in range(1, _SHARDS + 1):
        name = f"model-{shard:05}-of-{_SHARDS:05}.safetensors"
        tensors = {
            f"layers.{shard}.{i}.weight": torch.randn(_ROWS, _COLUMNS, generator=generator) * 0.02
            for i in range(_PER_SHARD)
        }
        save_file(tensors, folder / name, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
    (folder / "config.json").write_text('{"model_type": "bert"}')
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def measure(program: str, *arguments: Path) -> dict[str, Any]:
    """Peak resident set and seconds of one process."""
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-c", program, *map(str, arguments)])
    _, status, usage = _wait(process)
    assert status == 0, f"the process ended with status {status}"
    return {"peak_rss_mb": round(usage.ru_maxrss / 1e3), "seconds": round(time.perf_counter() - started, 1)}


def _wait(process: subprocess.Popen) -> tuple[int, int, resource.struct_rusage]:
    return os.wait4(process.pid, 0)


def main() -> None:
    """Measure a gigabyte's way to a compressed folder and back, and record it."""
    with tempfile.TemporaryDirectory() as folder:
        dense, out, back = (Path(folder) / name for name in ("dense", "compressed", "back"))
        # In a process of its own: a child's peak counts what its parent held when it was forked.
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            n_bytes = pool.apply(make_checkpoint, (dense,))
        results: dict[str, Any] = {"checkpoint_bytes": n_bytes, "shards": _SHARDS}
        results["import_only"] = measure("import miracle_hub; miracle_hub.compress")
        results["compress"] = measure(_COMPRESS, dense, out)
        results["decompress"] = measure(_DECOMPRESS, out, back)
    print(results)
    record("memory", results)


if __name__ == "__main__":
    main()
