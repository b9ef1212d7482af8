"""Fuzzes the readers, guided by coverage: python tests/fuzz/fuzz.py SECONDS (make fuzz FUZZ_SECONDS=600).

Ends with an error at the first exception that is no MiracleError, input that takes 20 seconds, or 3 GB of
memory; the input is then in .fuzz/, and goes to tests/fuzz/regressions once it is mended. What was found to
reach new code stays in .fuzz/corpus for the next run.
"""

import hashlib
import sys
import warnings
from pathlib import Path

import atheris

ROOT = Path(__file__).parents[2]
# numba cannot compile what is instrumented.
COMPILED = [f"miracle_hub.coding.{path.stem}" for path in (ROOT / "miracle_hub" / "coding").glob("*.py")]

with atheris.instrument_imports(include=["miracle_hub", "reader"], exclude=COMPILED):
    import reader

LIMITS = ["-timeout=20", "-rss_limit_mb=3072", "-max_len=4096", "-print_final_stats=1"]


def main() -> None:
    corpus = ROOT / ".fuzz" / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    for seed in reader.seeds():
        (corpus / hashlib.sha1(seed).hexdigest()).write_bytes(seed)
    warnings.simplefilter("error")
    options = [f"-max_total_time={sys.argv[1]}", f"-artifact_prefix={ROOT / '.fuzz'}/"]
    atheris.Setup([sys.argv[0], *LIMITS, *options, str(corpus)], reader.one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
