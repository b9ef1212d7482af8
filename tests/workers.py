"""Processes of one distributed run, and what they have in common."""

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.forks import Fork

RUN = """
import runpy, sys
runpy.run_path(sys.argv.pop(1), run_name="__main__")
"""


def run_in_two(worker: Path, folder: Path) -> None:
    """Two processes with the environment that torchrun gives them; tests/training/test_processes.py has it.

    Raises:
        AssertionError: one of them fails.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    given = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    given |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in (0, 1)]
    processes = [Fork(RUN, worker, folder, environment={**os.environ, **given, **rank}) for rank in ranks]
    for done in [process.wait() for process in processes]:
        assert done.returncode == 0, done.stderr


def caught(run: Callable[[], Any]) -> str:
    """The kind and the text of the error that something raises."""
    try:
        run()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"
