"""What is in a folder, whose links may lead anywhere."""

from collections.abc import Iterator
from pathlib import Path

from miracle_hub.errors import SourceError


def visible_files(folder: Path) -> Iterator[Path]:
    """Every file of a folder but hidden ones, in order.

    Raises:
        SourceError: one is a link that leaves the folder.
    """
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not is_hidden(path.relative_to(folder)):
            refuse_leaving(path, folder)
            yield path


def is_hidden(relative: Path) -> bool:
    """Whether a path goes through a name that begins with a dot."""
    return any(part.startswith(".") for part in relative.parts)


def refuse_leaving(path: Path, folder: Path) -> None:
    """Raise if a file is a link to elsewhere: a copy would publish whatever a stranger's link points to.

    Raises:
        SourceError: it is.
    """
    root, target = folder.resolve(), path.resolve()
    # In the Hub's cache a repository's files are links to its blobs.
    if root not in target.parents and root.parent.parent / "blobs" != target.parent:
        raise SourceError(
            f"{path}: expected a file of the folder, found a link that leaves it, to {target}; replace the "
            "link by the file if it is to be copied, or else remove it"
        )
