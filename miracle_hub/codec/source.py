"""What a model folder holds: its safetensors files, their tensors, and what else to copy."""

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from torch import Tensor

from miracle_hub.codec.naming import CARD, INDEX, SINGLE, WEIGHTS_ENDING
from miracle_hub.errors import FormatError, MissingWeightsError, PickleRefusedError, SourceError
from miracle_hub.files.container import opened
from miracle_hub.files.folders import is_hidden, refuse_leaving
from miracle_hub.files.whole import writing
from miracle_hub.format.spec import TensorSpec

NARROWED = "narrowed_from_F32"  # in the metadata of a file
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# Other copies of the same weights; a compressed repository carries only one.
_OTHER_WEIGHTS = (*_PICKLES, ".h5", ".msgpack", ".onnx", ".gguf", ".ot")


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
        PickleRefusedError: there are only pickle weights.
        MissingWeightsError: there are none, a shard is missing, or it is no folder.
    """
    if folder.is_file():
        raise MissingWeightsError(
            f"{folder}: expected a folder with model.safetensors, found a file; give the folder that it is in"
        )
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if used := used_index(folder, index):
        return indexed_files(folder, used)
    found = files_of_weights(folder)
    if found:
        return found
    raise missing_weights(str(folder), [path.name for path in folder.glob("*")])


def used_index(folder: Path, index: str = INDEX) -> Path | None:
    """The index that names the weights of a folder; None where a single file holds them, or nothing names
    them.
    """
    return folder / index if not (folder / SINGLE).is_file() and (folder / index).is_file() else None


def files_of_weights(folder: Path) -> list[Path]:
    """Every safetensors file right in a folder, in order of name."""
    return sorted(path for path in folder.glob(f"*{WEIGHTS_ENDING}") if path.is_file())


def missing_weights(source: str, names: list[str]) -> SourceError:
    """What to raise for a folder or repository without safetensors that holds these files."""
    pickles = sorted(name for name in names if Path(name).suffix in _PICKLES)
    if pickles:
        return PickleRefusedError(
            f"{source}: expected model.safetensors, found only pickle weights ({', '.join(pickles)}), "
            "which can run code when opened; convert them once where you trust them: "
            "AutoModel.from_pretrained(source).save_pretrained(folder)"
        )
    return MissingWeightsError(
        f"{source}: expected model.safetensors or model.safetensors.index.json, found neither; "
        "pass a folder written by save_pretrained, or a Hub id"
    )


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


def companion_files(folder: Path, weights: list[Path]) -> Iterator[Path]:
    """Relative paths of the files to copy: all but weights, hidden folders and the model card.

    Raises:
        SourceError: a file is a link that leaves the folder.
    """
    skipped = {path.name for path in weights} | {INDEX, CARD}
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        top_weight = len(relative.parts) == 1 and (
            relative.name in skipped or relative.name.endswith((WEIGHTS_ENDING, ".index.json"))
        )
        if (
            path.is_file()
            and not is_hidden(relative)
            and not top_weight
            and path.suffix not in _OTHER_WEIGHTS
        ):
            refuse_leaving(path, folder)
            yield relative


def copy_companions(source: Path, target: Path, weights: list[Path]) -> list[Path]:
    """Copy `companion_files`; returns the copies.

    Raises:
        SourceError: a file is a link that leaves the folder.
        OutputWriteError: a copy cannot be written.
    """
    copies = []
    for relative in companion_files(source, weights):
        copies.append(target / relative)
        with writing(copies[-1]):
            copies[-1].parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / relative, copies[-1])
    return copies
