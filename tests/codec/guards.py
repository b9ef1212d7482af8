"""A guarded file as writers write it, and the config.json that goes with it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from miracle_hub.codec.guard import GUARD, Contents, Sealing, placeholder
from miracle_hub.files.container import write_file
from miracle_hub.format.spec import TensorSpec

PAYLOAD = b"MRCL" + bytes([1]) + bytes(range(40))
RAW = {"a.weight": b"\x00\x3c" * 6, 'größe."b"': bytes(8), "coded": PAYLOAD, "empty": b""}
ENTRIES = [
    TensorSpec("a.weight", "F16", (2, 3)),
    TensorSpec('größe."b"', "I64", ()),
    TensorSpec("coded", "U8", (len(PAYLOAD),)),
    TensorSpec("empty", "F32", (0, 4)),
]
METADATA = {"format": "pt", "narrowed_from_F32": "*"}
CONFIG: dict[str, Any] = {
    "model_type": "bert",
    "layer_norm_eps": 1e-12,
    "lone": "\ud800",
    "quantization_config": {"quant_method": "miracle", "format_version": 1, "digest": "0" * 64},
}


def write(path: Path, key: str = GUARD, entries: list[TensorSpec] = ENTRIES) -> Contents:
    """A guarded file, as writers write it."""
    sealing = Sealing(METADATA, key)
    data = sealing.noting(lambda entry: RAW[entry.name])
    write_file(path, entries, METADATA | placeholder(key), data, lambda: sealing.metadata)
    return sealing.contents(path)


def with_line(contents: Contents, number: int, **changes: Any) -> Contents:
    lines = list(contents.lines)
    lines[number] = replace(lines[number], **changes)
    return replace(contents, lines=tuple(lines))
