"""Safetensors files with a checksum of all that is in them, which are replaced as a whole or not at all."""

import json
import os
import zlib
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from miracle_hub.errors import FormatError, OutputWriteError
from miracle_hub.files.whole import whole_file


def write_sealed(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a checkpoint with the CRC-32 of all of it, in one step.

    Raises:
        OutputWriteError: it could not be written; the one before is still there.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as whole:
            save_file(tensors, whole, {**metadata, "crc": crc_of(tensors, metadata)})
            _onto_disk(whole)  # before it has its name
    except (OSError, SafetensorError) as error:
        raise OutputWriteError(
            f"{path}: the checkpoint could not be written ({error}); the one before is still there: "
            "make room, see that no other run uses it, and run again"
        ) from error


def read_sealed(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What `write_sealed` wrote.

    Raises:
        FormatError: the file is gone, damaged, or none of ours.
    """
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise FormatError(
            f"{path}: expected the checkpoint of a coding run, found a file that cannot be read "
            f"({error}); delete it to start anew (of a teacher: its checkpoint too)"
        ) from error
    crc = metadata.pop("crc", None)
    if crc != crc_of(tensors, metadata):
        raise FormatError(
            f"{path}: expected the checkpoint of a coding run with CRC-32 {crc}, found "
            f"{crc_of(tensors, metadata)}; the file is damaged or not ours: delete it to start anew"
        )
    return tensors, metadata


def _onto_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def crc_of(tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
    """CRC-32 of everything in a checkpoint, since safetensors files have none."""
    crc = zlib.crc32(json.dumps(sorted(metadata.items())).encode())
    for name, tensor in sorted(tensors.items()):
        crc = zlib.crc32(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode(), crc)
        crc = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, crc)
    return f"{crc:08x}"
