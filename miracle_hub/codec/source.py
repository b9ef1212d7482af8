"""What a model folder holds: its safetensors files, their tensors, and what else to copy."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from miracle_hub.errors import FormatError, MissingWeightsError, PickleRefusedError
from miracle_hub.format.container import opened

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
# Other copies of the same weights; a compressed repository carries only one.
_OTHER_WEIGHTS = (
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".pkl",
    ".h5",
    ".msgpack",
    ".onnx",
    ".gguf",
    ".ot",
)
_ITEM_BYTES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "C64": 8}
_ITEM_BYTES |= {"F16": 2, "BF16": 2, "I16": 2, "U16": 2, "I8": 1, "U8": 1, "BOOL": 1}


@dataclass(frozen=True)
class SourceTensor:
    """One tensor as its file's header describes it."""

    name: str
    path: Path
    dtype: str
    shape: tuple[int, ...]

    @property
    def n_weights(self) -> int:
        return torch.Size(self.shape).numel()

    @property
    def n_bytes(self) -> int:
        return self.n_weights * _ITEM_BYTES.get(self.dtype, 1)

    def load(self) -> Tensor:
        with opened(self.path) as file:
            return file.get_tensor(self.name)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that transformers would load from a folder.

    Raises:
        PickleRefusedError: there are only pickle weights.
        MissingWeightsError: there are none, or a shard is missing.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if index.is_file():
        return _shards(folder, index)
    found = sorted(folder.glob("*.safetensors"))
    if found:
        return found
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles:
        raise PickleRefusedError(
            f"{folder}: expected model.safetensors, found only pickle weights ({', '.join(pickles)}), "
            "which can run code when opened; convert them once where you trust them: "
            "AutoModel.from_pretrained(source).save_pretrained(folder)"
        )
    raise MissingWeightsError(
        f"{folder}: expected model.safetensors or model.safetensors.index.json, found neither; "
        "pass a folder written by save_pretrained, or a Hub id"
    )


def _shards(folder: Path, index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise FormatError(
            f"{index}: expected a JSON object with a weight_map, found {error!r}; download it again"
        ) from None
    for name in names:
        if Path(name).name != name:
            raise FormatError(
                f"{index}: expected file names without folders, found {name!r}; "
                "the index is hostile or damaged"
            )
        if not (folder / name).is_file():
            raise MissingWeightsError(
                f"{folder}: {index.name} names {name}, which is missing; download the folder again"
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
                if name in tensors:
                    raise FormatError(
                        f"{path}: tensor {name} is also in {tensors[name].path}; "
                        "expected each tensor once: save the model again"
                    )
                tensors[name] = SourceTensor(name, path, view.get_dtype(), tuple(view.get_shape()))
    return list(tensors.values())


def file_metadata(path: Path) -> dict[str, str]:
    """The `__metadata__` of a safetensors file."""
    with opened(path) as file:
        return file.metadata() or {}


def companion_files(folder: Path, weights: list[Path]) -> Iterator[Path]:
    """Relative paths of the files to copy: all but weights, hidden folders and the model card."""
    skipped = {path.name for path in weights} | {"model.safetensors.index.json", "README.md"}
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        hidden = any(part.startswith(".") for part in relative.parts)
        top_weight = len(relative.parts) == 1 and (
            relative.name in skipped or relative.name.endswith((".safetensors", ".index.json"))
        )
        if path.is_file() and not hidden and not top_weight and path.suffix not in _OTHER_WEIGHTS:
            yield relative
