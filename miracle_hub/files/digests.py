"""Hashes of files. What is checked by content is read once: whoever reads a file hashes it on the way."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

PIECE_BYTES = 1 << 20  # a piece of a file that is in memory at a time; a choice


class Hashes:
    """SHA-256, and git's hash of a blob, of one file whose bytes come piece by piece."""

    def __init__(self, n_bytes: int) -> None:
        """
        Args:
            n_bytes: of the whole file, with which git's hash begins.
        """
        self.n_bytes = n_bytes
        self._sha256 = hashlib.sha256()
        self._blob = hashlib.sha1(b"blob %d\0" % n_bytes, usedforsecurity=False)

    def update(self, piece: bytes | memoryview) -> None:
        """Take the next bytes of the file."""
        self._sha256.update(piece)
        self._blob.update(piece)

    @property
    def sha256(self) -> str:
        """Of what has come so far, hexadecimal."""
        return self._sha256.hexdigest()

    @property
    def git_blob(self) -> str:
        """The name that git gives to a file of these bytes, hexadecimal."""
        return self._blob.hexdigest()


def hashes_of(path: Path) -> Hashes:
    """The hashes of a file, of which a piece is in memory at a time."""
    found = Hashes(path.stat().st_size)
    for piece in pieces(path):
        found.update(piece)
    return found


def sha256_of(*paths: Path) -> str:
    """SHA-256 of files, one after the other, hexadecimal; a piece of them is in memory at a time."""
    checksum = hashlib.sha256()
    for path in paths:
        for piece in pieces(path):
            checksum.update(piece)
    return checksum.hexdigest()


def pieces(path: Path) -> Iterator[bytes]:
    """The bytes of a file, some at a time."""
    with path.open("rb") as file:
        while chunk := file.read(PIECE_BYTES):
            yield chunk
