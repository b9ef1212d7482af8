"""All of tests/kernels on compiled code, without a GPU: `make test-compiled`, minutes.

    python -m tests.kernels.device                 # everything, for every architecture, in two orders
    python -m tests.kernels.device --smoke         # a part of it, in a minute
    python -m tests.kernels.device --if-changed    # the part if passed.json is of these sources

What passed is recorded in passed.json, to be committed: the sources and the compiler. Each architecture is a
process of its own, at most as many at a time as there are processors. Where the machine cannot be built,
nothing runs, and the last line says so.
"""

import argparse
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tests.kernels.device.build import ROOT, NoCompiler, library
from tests.kernels.scripts import script

PASSED = Path(__file__).with_name("passed.json")
# GPUs whose PTX the machine executes. Newer ones and AMD's are compiled ahead of time only.
ARCHITECTURES = ("sm_80", "sm_90")
ORDERS = "forward shuffled"
_TESTS = Path("tests") / "kernels"
# One op on one architecture, and the machine itself.
_SMOKE = [_TESTS / "device", _TESTS / "test_codebook.py", _TESTS / "test_launching.py"]


def identity(root: Path = ROOT) -> dict[str, Any]:
    """What a run is of: the kernels, their tests and the machine; the compiler; what is run."""
    digest = hashlib.sha256(script("sources").source_digest(root / "kernels").encode())
    for path in sorted((root / _TESTS).rglob("*")):
        if path.suffix in (".py", ".cpp", ".h"):
            content = path.read_bytes()
            digest.update(f"{path.relative_to(root).as_posix()}\0{len(content)}\0".encode() + content)
    return {
        "sources": digest.hexdigest(),
        "triton": version("triton"),
        "architectures": list(ARCHITECTURES),
        "orders": ORDERS,
    }


def tested(architecture: str, paths: list[Path], arguments: list[str]) -> int:
    """The exit status of pytest on one architecture."""
    start = time.monotonic()
    environment = os.environ | {
        "MIRACLE_DEVICE": architecture,
        "MIRACLE_ORDERS": ORDERS,
        "OMP_NUM_THREADS": "1",
    }
    plugins = ["-p", "tests.kernels.device.plugin", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", "-q", *plugins, *map(str, paths), *arguments]
    status = subprocess.run(command, cwd=ROOT, env=environment).returncode
    verdict = "passed" if status == 0 else "FAILED"
    print(f"{architecture}: {verdict} in {time.monotonic() - start:.0f} s", flush=True)
    return status


def why_not() -> str:
    """Why nothing can run here, or ""."""
    if importlib.util.find_spec("triton") is None:
        return "expected the Python package triton, found none"
    try:
        library()
    except NoCompiler as error:
        return str(error)
    return ""


def arguments() -> tuple[argparse.Namespace, list[str]]:
    """The command line; what it does not know is pytest's."""
    parser = argparse.ArgumentParser(description="Run tests/kernels on compiled code, without a GPU.")
    parser.add_argument("--smoke", action="store_true", help="a part of it")
    parser.add_argument(
        "--if-changed", action="store_true", help="only the part if passed.json is of these sources"
    )
    return parser.parse_known_args()


def main() -> int:
    """Run what is asked for, and record it where that was everything and passed."""
    chosen, others = arguments()
    reason = why_not()
    if reason:
        print(f"SKIPPED: compiled kernels were not tested: {reason}")
        return 0
    now = identity()
    before = json.loads(PASSED.read_text()) if PASSED.exists() else {}
    if chosen.smoke or (chosen.if_changed and before == now):
        return tested(ARCHITECTURES[-1], _SMOKE, others)
    with ThreadPoolExecutor(min(len(ARCHITECTURES), len(os.sched_getaffinity(0)))) as pool:
        statuses = list(pool.map(lambda name: tested(name, [_TESTS], others), ARCHITECTURES))
    if not any(statuses) and not others and before != now:
        PASSED.write_text(json.dumps(now, indent=2) + "\n")
        print(f"wrote {PASSED}: commit it, so that nobody runs everything for the same again")
    return max(statuses)


if __name__ == "__main__":
    sys.exit(main())
