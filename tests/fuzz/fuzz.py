"""Fuzzes the readers, guided by coverage: python tests/fuzz/fuzz.py SECONDS (make fuzz FUZZ_SECONDS=600).

Ends with an error at the first exception that is no MiracleError, input that takes 100 seconds, or 3 GB of
memory; the input is then in .fuzz/, and goes to tests/fuzz/regressions once it is mended. What was found to
reach new code stays in .fuzz/corpus for the next run.
"""

import hashlib
import importlib
import shutil
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

atheris: Any = importlib.import_module("atheris")  # of the extra "fuzz", which not everybody installs
ROOT = Path(__file__).parents[2]
FOLDER = ROOT / ".fuzz"
# libFuzzer ends the process before it could clean up.
shutil.rmtree(FOLDER / "work", ignore_errors=True)
(FOLDER / "work").mkdir(parents=True)
tempfile.tempdir = str(FOLDER / "work")
# numba cannot compile what is instrumented.
COMPILED = [f"miracle_hub.coding.{path.stem}" for path in (ROOT / "miracle_hub" / "coding").glob("*.py")]

with atheris.instrument_imports(include=["miracle_hub", "reader"], exclude=COMPILED):
    import reader

WORDS = """quantization_config quant_method miracle format_version digest stage_digests stages null true
modules_to_not_convert __metadata__ narrowed_from_F32 weight_map dtype shape data_offsets F16 U8""".split()
# Inputs take milliseconds: what takes a hundred seconds hangs, on any machine.
LIMITS = ["-timeout=100", "-rss_limit_mb=3072", "-max_len=4096", "-print_final_stats=1"]


def main() -> None:
    corpus, words = FOLDER / "corpus", FOLDER / "words"
    corpus.mkdir(exist_ok=True)
    for seed in reader.seeds():
        (corpus / hashlib.sha1(seed).hexdigest()).write_bytes(seed)
    words.write_text("".join(f'"{word}"\n' for word in WORDS))
    warnings.simplefilter("error")
    options = [f"-max_total_time={sys.argv[1]}", f"-artifact_prefix={FOLDER}/", f"-dict={words}"]
    atheris.Setup([sys.argv[0], *LIMITS, *options, str(corpus)], reader.one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
