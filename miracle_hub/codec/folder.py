"""Output folders that exist whole or not at all."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from miracle_hub.errors import OutputExistsError
from miracle_hub.format.container import writing


@contextmanager
def output_folder(out: Path, overwrite: bool) -> Iterator[Path]:
    """A temporary folder beside `out` that becomes `out` when the block ends without an error.

    A crash leaves at most the hidden temporary folder; Ctrl-C and errors remove that too.

    Raises:
        OutputExistsError: `out` exists and `overwrite` is false.
        OutputWriteError: the parent cannot be written.
    """
    _refuse_existing(out, overwrite)
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


def _refuse_existing(out: Path, overwrite: bool) -> None:
    if out.exists() and not overwrite:
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
    _refuse_existing(out, overwrite)
    if not out.exists():
        os.rename(temporary, out)
        return
    aside = temporary.with_suffix(".old")
    os.rename(out, aside)
    try:
        os.rename(temporary, out)
    except BaseException:
        os.rename(aside, out)
        raise
    if aside.is_dir():
        shutil.rmtree(aside)
    else:
        aside.unlink()
