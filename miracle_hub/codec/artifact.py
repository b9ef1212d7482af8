"""What every repository of the project shares: file layout, index, config and digest."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from miracle_hub.errors import SourceError
from miracle_hub.files.container import Entry, encode_file_header
from miracle_hub.files.whole import writing

INDEX = "model.safetensors.index.json"
_DEEPEST_CONFIG = 100


@dataclass(frozen=True)
class OutputFile:
    """One safetensors file to write: its tensors in order, and its metadata."""

    name: str
    entries: list[Entry]
    metadata: dict[str, str]

    @property
    def n_bytes(self) -> int:
        data = sum(entry.n_bytes for entry in self.entries)
        return len(encode_file_header(self.entries, self.metadata)) + data


def shard_entries(entries: list[Entry], max_shard_bytes: int, stem: str = "model") -> list[OutputFile]:
    """Files of at most `max_shard_bytes` of data each (one tensor may exceed it), named as on the Hub."""
    shards: list[list[Entry]] = [[]]
    filled = 0
    for entry in entries:
        if shards[-1] and filled + entry.n_bytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(entry)
        filled += entry.n_bytes
    names = [f"{stem}.safetensors"]
    if len(shards) > 1:
        names = [f"{stem}-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    return [OutputFile(n, shard, {"format": "pt"}) for n, shard in zip(names, shards, strict=True)]


def write_index(folder: Path, files: list[OutputFile], name: str = INDEX) -> None:
    """The index of a sharded repository, as transformers reads it."""
    total = sum(entry.n_bytes for file in files for entry in file.entries)
    weight_map = {entry.name: file.name for file in files for entry in file.entries}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    path = folder / name
    with writing(path):
        path.write_text(json.dumps(index, indent=2) + "\n")


def read_config(folder: Path) -> dict[str, Any]:
    """config.json as a dictionary; empty where there is none.

    Raises:
        SourceError: the file is no JSON object.
    """
    path = folder / "config.json"
    if not path.exists():
        return {}
    if not path.is_file():
        raise SourceError(f"{path}: expected a file, found something else; download it again")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{path}: expected JSON, found {error}; download it again") from None
    if not isinstance(config, dict):
        found = type(config).__name__
        raise SourceError(f"{path}: expected a JSON object, found a {found}; download it again")
    if _is_nested_beyond(config, _DEEPEST_CONFIG):
        raise SourceError(
            f"{path}: expected at most {_DEEPEST_CONFIG} levels of JSON, found more; the file is hostile or "
            "damaged"
        )
    return config


def _is_nested_beyond(value: object, levels: int) -> bool:
    """Whether lists and objects of a JSON value are nested deeper; such a one may be impossible to write."""
    layer = [value]
    for _ in range(levels + 1):
        inner = [
            item.values() if isinstance(item, dict) else item
            for item in layer
            if isinstance(item, dict | list)
        ]
        layer = [item for items in inner for item in items]
    return bool(layer)


def read_quantization(folder: Path) -> dict[str, Any]:
    """The quantization_config of config.json; empty where there is none.

    Raises:
        SourceError: it is no JSON object.
    """
    found = read_config(folder).get("quantization_config") or {}
    if not isinstance(found, dict):
        raise SourceError(
            f"{folder / 'config.json'}: quantization_config: expected a JSON object, found "
            f"{str(found)[:80]!r}; download it again"
        )
    return found


def repository_digest(digests: dict[str, int]) -> str:
    """One digest for all coded tensors: SHA-256 of the lines "name digest", in order of name."""
    lines = "".join(f"{name} {digests[name]:016x}\n" for name in sorted(digests))
    return hashlib.sha256(lines.encode()).hexdigest()


def raw_bytes(tensor: Tensor) -> bytes:
    """A tensor's bytes as safetensors stores them."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
