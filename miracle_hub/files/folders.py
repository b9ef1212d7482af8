"""What is in a folder, whose links may lead anywhere."""

import os
from collections.abc import Iterator
from pathlib import Path

from miracle_hub.errors import SourceError


def entries(folder: Path) -> Iterator[Path]:
    """Everything in a folder and its subfolders but these: files, links, and what is neither, in order.

    Raises:
        SourceError: a subfolder cannot be read.
    """
    found: list[Path] = []
    for here, subfolders, files in os.walk(folder, onerror=_refuse_unreadable):
        links = [name for name in subfolders if os.path.islink(os.path.join(here, name))]
        found += [Path(here, name) for name in (*files, *links)]
    return iter(sorted(found))


def visible_files(folder: Path) -> Iterator[Path]:
    """Every file of a folder but hidden ones, in order.

    Raises:
        SourceError: one is a link that leaves the folder, or no file.
    """
    for path in entries(folder):
        if not is_hidden(path.relative_to(folder)):
            refuse_leaving(path, folder)
            yield path


def is_hidden(relative: Path) -> bool:
    """Whether a path goes through a name that begins with a dot."""
    return any(part.startswith(".") for part in relative.parts)


def refuse_leaving(path: Path, folder: Path) -> None:
    """Raise if an entry is no file, or a link to elsewhere: a copy would publish what a stranger links to.

    Raises:
        SourceError: it is.
    """
    root, target = folder.resolve(), Path(os.path.realpath(path))  # which does not mind links in a circle
    # In the Hub's cache a repository's files are links to its blobs.
    if root not in target.parents and root.parent.parent / "blobs" != target.parent:
        raise SourceError(
            f"{path}: expected a file of the folder, found a link that leaves it, to {target}; replace the "
            "link by the file if it is to be copied, or else remove it"
        )
    if not path.is_file():
        raise SourceError(f"{path}: expected a file, found {_kind(path)}; replace or remove it")


def _kind(path: Path) -> str:
    """What is there instead of a file."""
    if path.is_dir():
        return "a link to a folder, which nobody follows"
    return "a link to a file that does not exist" if path.is_symlink() else "no regular file"


def _refuse_unreadable(error: OSError) -> None:
    if isinstance(error, FileNotFoundError):  # whoever asks for the weights says so
        return
    raise SourceError(
        f"{error.filename}: expected a folder that can be read, found {error.strerror}; change its "
        "permissions, or remove it"
    ) from error
