"""Every composite architecture of transformers: python -m tests.sweep (make sweep). Writes passed.json."""

import json
import logging
import signal
import sys
import tempfile
import warnings
from importlib.metadata import version
from pathlib import Path

import torch
import transformers

from .composites import Result, compare, composites

_SECONDS = 300  # for one architecture
RESULTS = Path(__file__).with_name("passed.json")


class TooLong(BaseException):
    """No Exception: those are what loading may end with."""


def main() -> None:
    transformers.logging.set_verbosity(logging.CRITICAL)
    transformers.logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    signal.signal(signal.SIGALRM, _give_up)
    results = [_one(name) for name in sys.argv[1:] or composites()]
    if not sys.argv[1:]:
        _write(results)
    sys.exit(any(result.differences for result in results))


def _one(name: str) -> Result:
    with tempfile.TemporaryDirectory() as folder:
        signal.alarm(_SECONDS)
        try:
            result = compare(name, Path(folder))
        except TooLong:
            result = Result(name, f"took longer than {_SECONDS} s")
        except Exception as error:
            result = Result(name, differences={"compress": repr(error)[:500]})
        finally:
            signal.alarm(0)
    found = result.reason or f"{len(result.loaded)} classes load, {len(result.refused)} load neither"
    print(f"{name}: {found}", *(f"\n  {k}: {v}" for k, v in result.differences.items()), flush=True)
    return result


def _give_up(*_: object) -> None:
    raise TooLong


def _write(results: list[Result]) -> None:
    built = [result for result in results if not result.reason]
    found = {
        "versions": {package: version(package) for package in ("torch", "transformers")},
        "composites": len(results),
        "built": len(built),
        "loads": sum(len(result.loaded) for result in built),
        "differences": {result.name: result.differences for result in built if result.differences},
        "loaded": {result.name: result.loaded for result in built},
        "not_built": {result.name: result.reason for result in results if result.reason},
    }
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
