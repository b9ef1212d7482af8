"""A process that has imported torch and little else, and becomes whatever program it is sent: see forks.py.

A line of standard input is a program as JSON. It runs in a fork, which no longer knows of the others; a
second fork waits for it and leaves its exit status in a file.
"""

import builtins
import importlib
import json
import os
import sys
import types
import warnings
from pathlib import Path
from typing import Any

# What every program here imports sooner or later: 3.5 of the 4.9 seconds that a model of transformers takes.
# Nothing of it reads the settings of a Hub's client, and none of it is ours.
PRELOADED = (
    "numba",
    "safetensors.torch",
    "sympy",
    "torch._dynamo",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
)


def become(job: dict[str, Any]) -> None:
    """Be a process that was started with the program of a job."""
    os.chdir(job["folder"])
    os.environ.clear()
    os.environ.update(job["environment"])
    for number, name in enumerate(("input", "output", "errors")):
        flags = os.O_RDONLY if name == "input" else os.O_WRONLY
        os.dup2(os.open(job[name], flags), number)
    sys.stdin = os.fdopen(0, encoding="utf-8", closefd=False)
    sys.argv, sys.path[0] = ["-c", *job["arguments"]], ""
    if job["refused"]:
        warnings.simplefilter("error", getattr(builtins, job["refused"]))
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    exec(compile(job["code"], "<string>", "exec"), vars(main))


def leave(number: int, path: str) -> None:
    """Write a number into a file, in one step."""
    new = Path(f"{path}.new")
    new.write_text(str(number))
    new.rename(path)


def main() -> None:
    """Serve until the input ends; in a fork, return for the interpreter to end as ever."""
    for name in PRELOADED:
        importlib.import_module(name)
    assert not {"huggingface_hub", "transformers"} & sys.modules.keys()
    while line := sys.stdin.readline():
        job = json.loads(line)
        if watcher := os.fork():
            os.waitpid(watcher, 0)
            continue
        if os.fork():
            os._exit(0)  # the server waits for this alone
        if not (pid := os.fork()):
            return become(job)
        leave(pid, job["pid"])
        leave(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), job["status"])
        os._exit(0)


if __name__ == "__main__":
    main()
