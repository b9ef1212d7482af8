"""Output folders that exist whole or not at all."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from miracle_hub.errors import OptionError, OutputExistsError
from miracle_hub.format.container import writing


@contextmanager
def output_folder(out: Path, overwrite: bool) -> Iterator[Path]:
    """A temporary folder beside `out` that becomes `out` when the block ends without an error.

    A crash leaves at most the hidden temporary folder; Ctrl-C and errors remove that too.

    Raises:
        OutputExistsError: `out` exists and `overwrite` is false.
        OutputWriteError: the parent cannot be written.
    """
    out = Path(os.path.abspath(out))
    refuse_existing(out, overwrite)
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".tmp", dir=out.parent))
    try:
        yield temporary
        with writing(out):
            # mkdtemp is private to its owner; a repository has the permissions of any new folder.
            temporary.chmod(0o777 & ~_umask())
            _move_into_place(temporary, out, overwrite)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def refuse_overlap(source: Path, out: Path) -> None:
    """Raise if writing `out` could touch `source`.

    Raises:
        OptionError: one is the other, or inside it.
    """
    found, wanted = source.resolve(), out.resolve()
    if found == wanted or found in wanted.parents or wanted in found.parents:
        raise OptionError(
            f"{out}: expected an output folder apart from the source {source}, found one that is it, is "
            "inside it or holds it; choose another"
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


def _move_into_place(temporary: Path, out: Path, overwrite: bool) -> None:
    """Rename; what was there before is set aside first and deleted last."""
    refuse_existing(out, overwrite)
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


def _remove(aside: Path) -> None:
    if aside.is_dir() and not aside.is_symlink():
        shutil.rmtree(aside, ignore_errors=True)
    else:
        aside.unlink(missing_ok=True)
