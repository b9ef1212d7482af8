"""Which files of a folder travel beside its weights, copied as they are, and why all others stay behind."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from miracle_hub.codec import purpose
from miracle_hub.codec.naming import CARD, INDEX, WEIGHTS_ENDING, is_variant, is_weights
from miracle_hub.codec.source import SourceTensor, is_adapter, list_tensors, weight_files
from miracle_hub.errors import FormatError, SourceError
from miracle_hub.files.folders import entries, is_hidden, refuse_leaving
from miracle_hub.files.whole import writing

_POINTER, _LONGEST_POINTER = b"version https://git-lfs", 1024


@dataclass(frozen=True)
class Companions:
    """All files of a folder but the weights that were taken.

    Attributes:
        travel: paths relative to the folder.
        left_out: why the others stay behind, by paths with slashes.
    """

    folder: Path
    travel: tuple[Path, ...]
    left_out: Mapping[str, str]

    @property
    def weights(self) -> list[Path]:
        """The safetensors files that travel, as they lie in the folder."""
        return [self.folder / path for path in self.travel if path.suffix == WEIGHTS_ENDING]

    @property
    def carried(self) -> dict[str, str]:
        """What to say of files that travel uncoded though they hold, or may hold, weights."""
        sizes = {path.as_posix(): (self.folder / path).stat().st_size for path in self.travel}
        said = {name: purpose.how_carried(name, n_bytes) for name, n_bytes in sizes.items()}
        return {name: how for name, how in said.items() if how}

    def copy(self, target: Path) -> None:
        """
        Raises:
            OutputWriteError: a copy cannot be written.
        """
        for relative in self.travel:
            with writing(target / relative):
                (target / relative).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(self.folder / relative, target / relative)


def of_source(folder: Path, weights: Sequence[Path]) -> Companions:
    """The companions of a dense model.

    Raises:
        SourceError: what would travel is a link that leaves the folder, no file, or not downloaded.
    """
    travel, left_out = [], {}
    for path in entries(folder):
        relative = path.relative_to(folder)
        if path in weights:
            continue
        if why := _why_staying(path, folder, weights):
            left_out[relative.as_posix()] = why
            continue
        _refuse_pointer(path)
        travel.append(relative)
    return Companions(folder, tuple(travel), left_out)


def of_repository(folder: Path) -> Companions:
    """The companions of what `compress` wrote: all but weights, their indices, the card and hidden files.

    Raises:
        SourceError: a file is a link that leaves the folder, or none.
    """
    travel, left_out = [], {}
    weights = weight_files(folder) if is_adapter(folder) else []
    for path in entries(folder):
        relative = path.relative_to(folder)
        if path in weights:
            continue
        why = purpose.HIDDEN if is_hidden(relative) else _why_of_own_name(relative)
        if why:
            left_out[relative.as_posix()] = why
            continue
        refuse_leaving(path, folder)
        travel.append(relative)
    return Companions(folder, tuple(travel), left_out)


def _why_staying(path: Path, folder: Path, weights: Sequence[Path]) -> str:
    """
    Raises:
        SourceError: it would travel, but is a link that leaves the folder, or no file.
    """
    relative = path.relative_to(folder)
    name = relative.as_posix()
    why = _why_of_own_name(relative) or (purpose.VARIANT if is_variant(name) else purpose.why_staying(name))
    if why or (path.is_dir() and (why := purpose.why_staying(f"{name}/"))):
        return why
    refuse_leaving(path, folder)
    is_beside_them = path.parent == folder and path.suffix == WEIGHTS_ENDING
    return _why_of_tensors(path, weights) if is_beside_them else ""


def _why_of_own_name(relative: Path) -> str:
    """Why files stay behind whose names the output has for its own."""
    name = relative.as_posix()
    if name == CARD:
        return purpose.CARD_ANEW
    if name == INDEX:
        return purpose.INDEX_ANEW
    return purpose.OTHER_SHARDS if is_weights(name) else ""


def _why_of_tensors(file: Path, weights: Sequence[Path]) -> str:
    """Why a safetensors file beside the weights stays behind: they hold all of it, or nobody can read it.

    Raises:
        SourceError: it is no file but the promise of one.
    """
    _refuse_pointer(file)
    try:
        others = {tensor.name: tensor for tensor in list_tensors([file])}
    except FormatError:
        return purpose.UNSOUND
    taken = {tensor.name: tensor for tensor in list_tensors(list(weights))}
    is_copy = others.keys() == taken.keys() and all(_is_same(taken[n], others[n]) for n in taken)
    return purpose.SAME_TENSORS if is_copy and taken else ""


def _is_same(one: SourceTensor, other: SourceTensor) -> bool:
    """Whether two tensors are equal, or one is the other rounded to fewer bits."""
    if one.shape != other.shape:
        return False
    try:
        a, b = one.load(), other.load()
    except SourceError:
        return False
    return _is_rounded(a, b) or _is_rounded(b, a)


def _is_rounded(fine: Tensor, coarse: Tensor) -> bool:
    return torch.equal(fine.to(coarse.dtype), coarse)


def _refuse_pointer(path: Path) -> None:
    """
    Raises:
        SourceError: a clone without Git LFS has a pointer in place of the file.
    """
    if path.stat().st_size > _LONGEST_POINTER:
        return
    if path.read_bytes().startswith(_POINTER):
        raise SourceError(
            f"{path}: expected the file, found a pointer of Git LFS to it; run git lfs pull in the clone, or "
            "download the model with hf download"
        )
