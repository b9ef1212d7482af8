"""What every string of bytes of ours begins with: magic, version, CRC-32 of the rest.

FORMAT.md, "Frame".
"""

import struct
import zlib
from dataclasses import dataclass

from miracle_hub.errors import ChecksumError, FormatError, TruncatedPayloadError, UnsupportedVersionError

_FRAME = struct.Struct("<4sBI")
SIZE = _FRAME.size


@dataclass(frozen=True)
class Frame:
    """One kind of string.

    Attributes:
        versions: that are read, ascending.
        noun: what messages call it, such as "payload".
        least_bytes: that the shortest one has behind the frame.
    """

    magic: bytes
    versions: tuple[int, ...]
    noun: str
    least_bytes: int

    def seal(self, rest: bytes, version: int = 1) -> bytes:
        """The frame and what it guards; `check` is its mirror."""
        return _FRAME.pack(self.magic, version, zlib.crc32(rest)) + rest

    def check(self, data: bytes, where: str) -> int:
        """The version of bytes that are a whole, undamaged string of this kind.

        Args:
            where: the tensor or file, for messages.

        Raises:
            FormatError: and its subclasses: they are not.
        """
        if len(data) < SIZE + self.least_bytes:
            raise TruncatedPayloadError(
                f"{where}: a {self.noun} has at least {SIZE + self.least_bytes} bytes, found {len(data)}; "
                "the file is truncated: download it again"
            )
        magic, version, crc = _FRAME.unpack_from(data)
        if magic != self.magic:
            raise self._defect(where, 0, f"the magic {self.magic!r}", magic)
        known = " or ".join(map(str, self.versions))
        if version < self.versions[0]:
            raise self._defect(where, len(magic), f"format version {known}", version)
        if version > self.versions[-1]:
            raise UnsupportedVersionError(
                f"{where}: this miracle-hub reads {self.noun} version {known}, found {version}; "
                "upgrade: pip install -U miracle-hub"
            )
        if (found := zlib.crc32(memoryview(data)[SIZE:])) != crc:
            raise ChecksumError(
                f"{where}: bytes {SIZE} to {len(data)} of the {self.noun}: expected CRC-32 {crc:08x}, found "
                f"{found:08x}; the file is truncated or damaged: download it again"
            )
        return version

    def _defect(self, where: str, position: int, expected: str, found: object) -> FormatError:
        return FormatError(
            f"{where}: byte {position} of the {self.noun} header: expected {expected}, found {found}; the "
            "file is damaged or was not written by miracle-hub"
        )


def crc_of(data: bytes) -> int:
    """The CRC-32 that a string's own frame states; the string is checked already."""
    return _FRAME.unpack_from(data)[2]
