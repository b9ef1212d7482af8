"""What a model folder holds: its safetensors files and their tensors."""

import json
import os
from collections.abc import Iterable, Set
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from torch import Tensor

from miracle_hub.codec.kinds import is_adapter_by_names, is_other_kind, kind_of_names, refusal
from miracle_hub.codec.naming import ADAPTER, ADAPTER_STEM, INDEX, SINGLE, WEIGHTS_ENDING, stem_of
from miracle_hub.errors import FormatError, MissingWeightsError, SourceError
from miracle_hub.files.container import opened
from miracle_hub.files.folders import entries
from miracle_hub.format.spec import TensorSpec

NARROWED = "narrowed_from_F32"  # in the metadata of a file


@dataclass(frozen=True)
class SourceTensor(TensorSpec):
    """One tensor of a file, as its header describes it."""

    path: Path

    def load(self) -> Tensor:
        """The tensor as the file holds it.

        Raises:
            SourceError: its dtype is unknown to torch.
        """
        with opened(self.path) as file:
            try:
                return file.get_tensor(self.name)
            except SafetensorError as error:
                raise SourceError(
                    f"{self.path}: {self.name}: expected a dtype that torch knows, found {self.dtype} "
                    f"({error}); upgrade torch and safetensors, or convert the tensor"
                ) from None

    def head(self, n_items: int) -> Tensor:
        """The first elements of a vector; the rest is not read."""
        with opened(self.path) as file:
            return file.get_slice(self.name)[:n_items]


def weight_files(folder: Path, index: str = INDEX) -> list[Path]:
    """The safetensors files that transformers would load from a folder.

    Args:
        index: its name, where there is no single file.

    Raises:
        PickleRefusedError: there are only pickle weights. SourceKindError: there is another kind of model.
        MissingWeightsError: there are none, a shard is missing, or it is no folder.
    """
    if folder.is_file():
        raise MissingWeightsError(
            f"{folder}: expected a folder with model.safetensors, found a file; give the folder that it is in"
        )
    if is_adapter(folder):
        return [folder / ADAPTER]
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if used := used_index(folder, index):
        return indexed_files(folder, used)
    found = [path for path in files_of_weights(folder) if not is_other_kind(path.name)]
    if found:
        return found
    raise refusal("model.safetensors", kind_of_names(str(folder), names_in(folder)))


def is_adapter(folder: Path) -> bool:
    """Whether a folder is an adapter of PEFT, without a model."""
    return folder.is_dir() and is_adapter_by_names(os.listdir(folder))


def stem_in(folder: Path, n_stages: int = 1) -> str:
    """What the name of the file begins with that a folder's weights, or those of its first stage, become."""
    return ADAPTER_STEM if is_adapter(folder) else stem_of(1, n_stages)


def names_in(folder: Path) -> list[str]:
    """Paths of everything in a folder, relative to it, with slashes."""
    return [path.relative_to(folder).as_posix() for path in entries(folder)]


def used_index(folder: Path, index: str = INDEX) -> Path | None:
    """The index that names the weights of a folder; None where a single file holds them, or nothing names
    them.
    """
    return folder / index if not (folder / SINGLE).is_file() and (folder / index).is_file() else None


def files_of_weights(folder: Path) -> list[Path]:
    """Every safetensors file right in a folder, in order of name."""
    return sorted(path for path in folder.glob(f"*{WEIGHTS_ENDING}") if path.is_file())


def indexed_files(folder: Path, index: Path) -> list[Path]:
    """The files of a folder that an index names.

    Raises:
        FormatError: it is no index, or names what is no file name.
        MissingWeightsError: it names no file, or one that is missing.
    """
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise FormatError(
            f"{index}: expected a JSON object with a weight_map, found {error!r}; download it again"
        ) from None
    if not names:
        raise MissingWeightsError(
            f"{index}: expected a weight_map that names files, found an empty one; download it again"
        )
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or name in ("", ".."):
            raise FormatError(
                f"{index}: expected file names without folders, found {name!r}; "
                "the index is hostile or damaged"
            )
        if not os.path.isfile(folder / name):  # unlike Path.is_file, False for names that no file can have
            raise MissingWeightsError(
                f"{folder}: {index.name} names {name[:100]}, which is missing; download the folder again"
            )
    return [folder / name for name in names]


def list_tensors(files: list[Path]) -> list[SourceTensor]:
    """Every tensor of the files, by the headers alone.

    Raises:
        FormatError: a file is unsound, or two files hold a tensor of the same name.
    """
    tensors: dict[str, SourceTensor] = {}
    for path in files:
        with opened(path) as file:
            for name in file.keys():  # noqa: SIM118 (safe_open is not a dict)
                view = file.get_slice(name)
                shape = tuple(view.get_shape())
                if max(shape, default=0) >= 2**63:  # possible for safetensors beside a dimension of 0
                    raise FormatError(
                        f"{path}: {name}: expected dimensions below 2^63, found shape {list(shape)}; the "
                        "file is hostile or damaged"
                    )
                if name in tensors:
                    raise FormatError(
                        f"{path}: tensor {name} is also in {tensors[name].path}; "
                        "expected each tensor once: save the model again"
                    )
                tensors[name] = SourceTensor(name, view.get_dtype(), shape, path)
    return list(tensors.values())


def narrowing_metadata(entries: Iterable[TensorSpec], narrowed: Set[str]) -> dict[str, str]:
    """The metadata that say which F16 tensors of a file were F32 in the source."""
    half = [entry.name for entry in entries if entry.dtype == "F16"]
    found = [name for name in half if name in narrowed]
    if not found:
        return {}
    return {NARROWED: "*" if found == half else json.dumps(found)}


def narrowed_names(path: Path) -> set[str] | None:
    """The F16 tensors of a file that were F32; None means all of them.

    Raises:
        FormatError: its metadata do not say.
    """
    with opened(path) as file:
        text = (file.metadata() or {}).get(NARROWED, "[]")
    if text == "*":
        return None
    try:
        names = json.loads(text)
    except (ValueError, RecursionError):
        names = None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise FormatError(
            f"{path}: metadata {NARROWED}: expected '*' or a JSON list of names, found {text[:80]!r}; the "
            "file is damaged: download it again"
        )
    return set(names)
