"""Outputs that exist whole or not at all.

What is written first goes to a hidden folder beside the output, which is moved into place at the end. A run
holds a lock (flock) on its folder for as long as it lives: a folder that nobody holds was left by a killed
run, and the next one for the same output removes it.
"""

import ctypes
import errno
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from miracle_hub.errors import MiracleError, OptionError, OutputExistsError, OutputWriteError

# What does not fit a disk is an error of the system's, of safetensors' or, by torch.save, of no special kind.
WRITE_ERRORS = (OSError, SafetensorError, RuntimeError)
_TEMPORARY, _ASIDE = ".miracle.tmp", ".miracle.old"
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn the operating system's refusals into errors that name the file."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if isinstance(error, MiracleError):
            raise
        reason = getattr(error, "strerror", None) or str(error)
        room = "; free some space and run it again" if os.strerror(errno.ENOSPC) in reason else ""
        raise OutputWriteError(f"{path}: cannot be written: {reason}{room}") from error


@contextmanager
def output_folder(out: Path, overwrite: bool) -> Iterator[Path]:
    """A temporary folder beside `out` that becomes `out` when the block ends without an error.

    A kill leaves at most the hidden temporary folder, which the next run for `out` removes.

    Raises:
        OutputExistsError: `out` exists and `overwrite` is false.
        OutputWriteError: the parent cannot be written.
    """
    out = Path(os.path.abspath(out))
    refuse_existing(out, overwrite)
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    with temporary_beside(out) as temporary:
        refuse_existing(out, overwrite)  # what a killed run had set aside may have come back
        yield temporary
        with writing(out):
            # mkdtemp is private to its owner; a repository has the permissions of any new folder.
            temporary.chmod(0o777 & ~_umask())
            _move_into_place(temporary, out, overwrite)


@contextmanager
def temporary_beside(out: Path) -> Iterator[Path]:
    """An empty hidden folder beside `out`, on the same disk; it is gone when the block ends.

    Raises:
        OutputWriteError: it cannot be made.
    """
    out = Path(os.path.abspath(out))
    with writing(out):
        clear_up(out)
        temporary, lock = _locked_folder(out)
    try:
        yield temporary
    finally:
        _remove(temporary)
        if lock is not None:
            os.close(lock)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A file to write that replaces `path` when the block ends without an error; what was there stays else.

    A kill leaves at most a hidden folder, which the next writing of `path`, or `clear_up`, removes.

    Raises:
        OutputWriteError: there is no room beside it.
    """
    with temporary_beside(path) as temporary:
        yield temporary / path.name
        (temporary / path.name).replace(path)


@contextmanager
def alone_in(folder: Path, instead: str = "another output") -> Iterator[None]:
    """Make a folder, if there is none, that no other run may use until the block ends.

    Args:
        instead: what to choose where another run uses it.

    Raises:
        OutputExistsError: another run uses it.
        OutputWriteError: it cannot be made.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    try:
        lock = _lock(folder)
    except BlockingIOError:
        raise OutputExistsError(
            f"{folder}: expected no other run that uses this folder, found one; wait for its end, or choose "
            f"{instead}"
        ) from None
    except OSError:  # there are no locks here
        lock = None
    try:
        yield
    finally:
        if lock is not None:
            os.close(lock)


def refuse_overlap(
    folder: Path, other: Path, role: str = "an output folder", others: str = "the source"
) -> None:
    """Raise if writing a folder could touch another.

    Args:
        role: of the folder. others: role of the other one.

    Raises:
        OptionError: one is the other, or inside it.
    """
    wanted, found = folder.resolve(), other.resolve()
    if found == wanted or found in wanted.parents or wanted in found.parents:
        raise OptionError(
            f"{folder}: expected {role} apart from {others} {other}, found one that is it, is inside it or "
            "holds it; choose another"
        )


def refuse_existing(out: Path, overwrite: bool) -> None:
    """
    Raises:
        OutputExistsError: `out` exists and `overwrite` is false.
    """
    if os.path.lexists(out) and not overwrite:
        raise OutputExistsError(
            f"{out}: the output folder exists; choose another, or pass --overwrite (overwrite=True) "
            "to replace it"
        )


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _locked_folder(out: Path) -> tuple[Path, int | None]:
    """A new temporary folder and the lock on it; no lock where the file system has none."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=_TEMPORARY, dir=out.parent))
        try:
            return folder, _lock(folder)
        except (BlockingIOError, FileNotFoundError):
            continue  # before it was locked, another run took it for a dead one's, and removes it
        except OSError:
            return folder, None


def _lock(folder: Path) -> int:
    """The descriptor that locks a folder until it is closed, by the end of the process at the latest.

    Raises:
        BlockingIOError: somebody else has the lock.
        OSError: there is no such folder, or no lock on this system.
    """
    descriptor = os.open(folder, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
    try:
        import fcntl  # not on Windows, which does not open folders either

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(descriptor), os.stat(folder)):
            raise BlockingIOError
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def clear_up(out: Path) -> None:
    """Remove what killed runs for `out` have left; what one set aside and did not replace comes back."""
    for folder in _left_beside(out, _TEMPORARY):
        try:
            lock = _lock(folder)
        except OSError:  # its run is alive, or there is no telling
            continue
        aside = folder.with_suffix(".old")
        if os.path.lexists(aside) and not os.path.lexists(out):
            os.rename(aside, out)
        _remove(folder)
        os.close(lock)
    for aside in _left_beside(out, _ASIDE):
        if not aside.with_suffix(".tmp").exists():
            _remove(aside)


def _left_beside(out: Path, suffix: str) -> list[Path]:
    """Hidden folders with names as runs for `out` give them."""
    name = re.compile(rf"\.{re.escape(out.name)}\.[a-z0-9_]{{8}}{re.escape(suffix)}")
    return [out.parent / found for found in os.listdir(out.parent) if name.fullmatch(found)]


def _move_into_place(temporary: Path, out: Path, overwrite: bool) -> None:
    """Exchange with what was there before, which goes with the temporary folder; or else rename.

    Where names cannot be exchanged, what was there is set aside first and deleted last.
    """
    refuse_existing(out, overwrite)
    if os.path.lexists(out) and _exchange(temporary, out):
        return
    aside = temporary.with_suffix(".old")
    if os.path.lexists(out):
        os.rename(out, aside)
    try:
        os.rename(temporary, out)
    except BaseException as error:
        if not os.path.lexists(out):
            with suppress(FileNotFoundError):
                os.rename(aside, out)
            raise
        _remove(aside)
        if not isinstance(error, OSError):
            raise
        raise OutputExistsError(
            f"{out}: expected no such folder, found one that another process has just written; it was "
            "left as it is: run one of the two at a time"
        ) from None
    _remove(aside)


def _exchange(one: Path, other: Path) -> bool:
    """Swap what two names name, in one step; False where the system cannot (all but Linux, some disks)."""
    if sys.platform != "linux":
        return False
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    if rename is None:
        return False
    return not rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
