"""Forked processes: run something there, end it in the middle, and hear how it ended."""

import os
import select
import signal
import sys
import traceback
from collections.abc import Callable

from miracle_hub.errors import MiracleError
from tests.limits import HANG_SECONDS

KILLED = "killed"
# What changes a file system, as Python's audit events name it; each is told before it is done.
_EVENTS = ("os.", "shutil.", "tempfile.", "ctypes.dlsym")
_WRITING = os.O_WRONLY | os.O_RDWR


class Calls:
    """Counts a process's calls that change files, and can kill the process at one of them."""

    def __init__(self) -> None:
        self.count, self.fatal = 0, 0
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple) -> None:
        # An open has mode and flags; the latter are all that os.open has.
        opens = event == "open" and isinstance(arguments[2], int) and arguments[2] & _WRITING
        if opens or (event.startswith(_EVENTS) and event != "os.listdir"):
            self.count += 1
            if self.count == self.fatal:
                os.kill(os.getpid(), signal.SIGKILL)


CALLS = Calls()


class Child:
    """A function that runs in a forked process from now on."""

    def __init__(self, run: Callable[[], object], fatal_call: int = 0) -> None:
        """
        Args:
            fatal_call: the number of the call that the process does not survive, from 1; 0 for none.
        """
        self._reading, writing = os.pipe()
        self._id = os.fork()
        if not self._id:
            CALLS.count, CALLS.fatal = 0, fatal_call
            os._exit(_told(run, writing))
        os.close(writing)

    def kill(self) -> None:
        os.kill(self._id, signal.SIGKILL)

    def ended(self, kill_after: float | None = None) -> str:
        """Wait for its end, or kill it; "" for success, KILLED, or the named error it ended with.

        Raises:
            AssertionError: it ended in any other way.
        """
        patience = HANG_SECONDS if kill_after is None else kill_after
        if not select.select([self._reading], [], [], patience)[0]:
            self.kill()
            assert kill_after is not None, f"a process did not end within {HANG_SECONDS} seconds"
        with os.fdopen(self._reading) as pipe:
            said = pipe.read()
        status = os.waitstatus_to_exitcode(os.waitpid(self._id, 0)[1])
        if status == -signal.SIGKILL:
            return KILLED
        assert status == 0, f"a process ended with status {status}:\n{said}"
        return said


def _told(run: Callable[[], object], writing: int) -> int:
    """Run, write the error's name and text, and return the exit status: 0 for success or a named error."""
    status, text = 0, ""
    try:
        run()
    except MiracleError as error:
        text = f"{type(error).__name__}: {error}"
    except BaseException:
        status, text = 1, traceback.format_exc()
    os.write(writing, text.encode())
    return status


def forked(run: Callable[[], object]) -> str:
    """Run in a process of its own; "" for success, or the named error it ended with."""
    return Child(run).ended()
