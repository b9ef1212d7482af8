"""Stand-ins: what transformers reads in place of tensors that are more than one entry of a file.

It takes every tensor from an entry, and entries from files: those of a repository with a base are sums
of which a part lies elsewhere, or all of it. A file of a few bytes per tensor says which of them an entry
stands for.
"""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from miracle_hub.codec.dtypes import is_bytes
from miracle_hub.codec.stored import StoredTensor
from miracle_hub.files.container import write_file
from miracle_hub.format.spec import TensorSpec, bytes_entry

# No file that anybody keeps begins so.
_MAGIC, _PLACE_BYTES = b"MRCS", 4


def write_stand_ins(tensors: Sequence[StoredTensor], path: Path) -> None:
    """A file with an entry for every tensor, by its place among them; `place_of` reads it back.

    Raises:
        OutputWriteError: it cannot be written.
    """
    places = {tensor.name: place for place, tensor in enumerate(tensors)}

    def data(entry: TensorSpec) -> bytes:
        return _MAGIC + places[entry.name].to_bytes(_PLACE_BYTES, "little")

    entries = [bytes_entry(name, len(_MAGIC) + _PLACE_BYTES) for name in places]
    write_file(path, entries, {"format": "pt"}, data)


def place_of(entry: Tensor) -> int | None:
    """Which tensor an entry stands for; None if it is no stand-in."""
    if not is_bytes(entry) or entry.numel() != len(_MAGIC) + _PLACE_BYTES:
        return None
    raw = bytes(entry.cpu().tolist())
    return int.from_bytes(raw[len(_MAGIC) :], "little") if raw.startswith(_MAGIC) else None
