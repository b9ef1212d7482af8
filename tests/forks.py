"""Programs in processes of their own that need not import torch again: forks of one that has.

Every program meets an interpreter in which nothing of ours, of transformers or of a Hub's client has run.
What a test claims of the very first import of torch needs a new interpreter instead.
"""

import atexit
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from tests.limits import HANG_SECONDS

SERVER = Path(__file__).with_name("fork_server.py")
POLL_SECONDS = 0.02


@cache
def _server() -> subprocess.Popen[str]:
    """Of this process; it ends with it."""
    command = [sys.executable, str(SERVER)]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, text=True, start_new_session=True)
    atexit.register(server.communicate)  # closes its input, and waits
    return server


class Fork:
    """A program that runs from now on; the interface of subprocess.Popen."""

    def __init__(
        self,
        code: str,
        *arguments: str | Path,
        given: str = "",
        folder: Path | None = None,
        environment: Mapping[str, str] | None = None,
        refused: type[Warning] | None = None,
    ) -> None:
        """
        Args:
            given: its standard input.
            folder: where it runs; a new one by default.
            refused: warnings that are errors.
        """
        self._files = Path(tempfile.mkdtemp(prefix="miracle-fork-"))
        names = ("input", "output", "errors")
        for name in names:
            (self._files / name).write_text(given if name == "input" else "", encoding="utf-8")
        job = {name: str(self._files / name) for name in (*names, "pid", "status")} | {
            "code": code,
            "arguments": [str(argument) for argument in arguments],
            "folder": str(folder or self._files),
            "environment": dict(os.environ if environment is None else environment),
            "refused": refused.__name__ if refused else "",
        }
        stream = _server().stdin
        assert stream is not None
        stream.write(json.dumps(job) + "\n")
        stream.flush()

    def kill(self) -> None:
        """Send SIGKILL."""
        os.kill(self._number("pid"), signal.SIGKILL)

    def has_ended(self) -> bool:
        return (self._files / "status").exists()

    def wait(self) -> subprocess.CompletedProcess[str]:
        """Its exit status and what it wrote; it is killed if it hangs."""
        try:
            status = self._number("status")
        except TimeoutError:
            self.kill()
            raise
        output, errors = ((self._files / name).read_text(encoding="utf-8") for name in ("output", "errors"))
        shutil.rmtree(self._files)
        return subprocess.CompletedProcess([], status, output, errors)

    def _number(self, name: str) -> int:
        """What is in a file that will be there soon."""
        deadline = time.monotonic() + HANG_SECONDS
        while not (self._files / name).exists():
            if time.monotonic() > deadline:
                raise TimeoutError(f"a program did not end within {HANG_SECONDS} seconds")
            assert _server().poll() is None, "the server of forks has ended"
            time.sleep(POLL_SECONDS)
        return int((self._files / name).read_text())


def run(code: str, *arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a program to its end; options as of `Fork`."""
    return Fork(code, *arguments, **options).wait()
