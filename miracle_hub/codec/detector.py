"""The one detector of sources: what a folder, a file or a repository is, and whether a verb takes it.

Every verb asks `require` before it reads weights. What is damaged is no kind: its reader names the damage.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from miracle_hub.code import QUANT_METHOD
from miracle_hub.codec.config import read_config
from miracle_hub.codec.guard import GUARD, GUARD_ALONE
from miracle_hub.codec.inherited import is_inherited
from miracle_hub.codec.kinds import (
    Found,
    Kind,
    found,
    is_adapter_by_names,
    kind_of_names,
    refusal,
    told_by_names,
)
from miracle_hub.codec.naming import ADAPTER, CONFIG
from miracle_hub.codec.parts import remove_facts
from miracle_hub.codec.payloads import has_magic, is_stray_stream
from miracle_hub.codec.quantized import SIDECARS, method_of_config, method_of_tensors
from miracle_hub.codec.source import SourceTensor, list_tensors, names_in, weight_files
from miracle_hub.errors import FormatError, MissingWeightsError, SourceError
from miracle_hub.files.container import opened

_COMPRESS = "run miracle compress first"
_HEAD_BYTES = 64
# As PEFT, diffusers and kohya name the factors; a model that holds an adapter has mostly other tensors.
_OF_ADAPTERS = re.compile(
    r".*[._]?(lora_(A|B|down|up|embedding_A|embedding_B)|hada_w\d_[ab]|lokr_w\d\w*)(\..*)?"
)
_POINTER, _GGUF = b"version https://git-lfs", b"GGUF"


class Taken(NamedTuple):
    """What a verb takes; readers say themselves what is damaged or missing."""

    expected: str
    kinds: tuple[Kind, ...]


# Payloads are refused later, by the names of their tensors.
TO_COMPRESS = Taken("a dense model", (Kind.DENSE, Kind.TENSORS, Kind.PAYLOADS, Kind.PEFT))
TO_FINE_TUNE = Taken("a dense model", (Kind.DENSE, Kind.TENSORS, Kind.COMPRESSED))
TO_INSPECT = Taken("a compressed model", (Kind.COMPRESSED, Kind.PAYLOADS, Kind.CODED_ADAPTER))
TO_DECODE = Taken("a compressed model", (*TO_INSPECT.kinds, Kind.DENSE, Kind.TENSORS))
TO_RUN = Taken(
    "a model that transformers loads",
    (Kind.COMPRESSED, Kind.PAYLOADS, Kind.DENSE, Kind.TENSORS, Kind.QUANTIZED),
)


def require(path: Path, taken: Taken) -> None:
    """
    Raises:
        SourceKindError: a verb is given another kind of model than it takes; the message says what it is, and
            the way out. PickleRefusedError: its weights are pickle.
    """
    refuse_others(detect(path), taken)


def refuse_others(found: Found, taken: Taken) -> None:
    """The same for what was looked at before.

    Raises:
        SourceKindError, PickleRefusedError: see `require`.
    """
    if found.kind not in (*taken.kinds, Kind.NOTHING, Kind.UNSOUND):
        raise refusal(taken.expected, found)


def detect(path: Path, names: Sequence[str] | None = None) -> Found:
    """What a folder or a file is.

    Args:
        names: of the files of a repository of which the folder has some; None means those of the folder.

    Raises:
        SourceError: a folder in it cannot be read.
    """
    if path.is_file():
        return _of_file(path)
    names = names_in(path) if names is None else names
    try:
        config = read_config(path)
    except SourceError:
        return Found(Kind.UNSOUND, str(path))
    return _of_config(path, config, names) or _of_folder(path, names)


def _of_config(path: Path, config: dict[str, Any], names: Sequence[str]) -> Found | None:
    """What config.json and other JSON files tell of a folder."""
    if remove_facts(config) and not is_inherited(path):
        return _quantized(path / CONFIG, QUANT_METHOD, Kind.COMPRESSED)
    if "model_type" not in config:
        if "model_index.json" in names:
            return kind_of_names(str(path), names)
        if "_class_name" in config:  # of diffusers
            return found(Kind.COMPONENT, str(path), [CONFIG])
    if told := method_of_config(config):
        method, key = told
        return _quantized(path / CONFIG, method, key="" if key == "quantization_config" else key)
    sidecar = next((name for name in SIDECARS if name in names), None)
    return None if sidecar is None else _quantized(path / sidecar, SIDECARS[sidecar])


def _of_folder(path: Path, names: Sequence[str]) -> Found:
    if is_adapter_by_names(names):
        return _of_adapter(path)
    if told := told_by_names(str(path), names):
        return told
    try:
        files = weight_files(path)
    except (FormatError, MissingWeightsError):
        return Found(Kind.UNSOUND, str(path))
    told = _of_files(path, files)
    return told._replace(kind=Kind.TENSORS) if told.kind is Kind.DENSE and CONFIG not in names else told


def _of_adapter(path: Path) -> Found:
    """What a folder of PEFT is, whose weights may not be downloaded."""
    dense = found(Kind.PEFT, str(path), [ADAPTER])
    told = _of_files(path, [path / ADAPTER]) if (path / ADAPTER).is_file() else dense
    if told.kind is Kind.PAYLOADS:
        return found(Kind.CODED_ADAPTER, str(path), [ADAPTER])
    return dense if told.kind in (Kind.DENSE, Kind.ADAPTER) else told


def _of_file(path: Path) -> Found:
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
    if head[8:9] == b"{" or head.startswith(_POINTER):
        return _of_files(path, [path])
    if head.startswith(_GGUF):
        return found(Kind.GGUF, str(path), [path.name])
    told = kind_of_names(str(path), [path.name])
    return Found(Kind.UNSOUND, str(path)) if told.kind is Kind.NOTHING else told


def _of_files(path: Path, files: Sequence[Path]) -> Found:
    """What the headers of safetensors files tell."""
    for file in files:
        with file.open("rb") as opened_file:
            if opened_file.read(_HEAD_BYTES).startswith(_POINTER):
                return found(Kind.POINTER, str(path), [file.name])
    try:
        tensors = list_tensors(list(files))
        if any(_is_ours(file) for file in files) or any(map(_is_payload, tensors)):
            return Found(Kind.PAYLOADS, str(path), Kind.PAYLOADS.value, "decompress it first")
    except FormatError:
        return Found(Kind.UNSOUND, str(path))
    if told := method_of_tensors(tensors):
        method, name = told
        return _quantized(path, method, key=f"tensor {name}")
    if 2 * sum(_OF_ADAPTERS.fullmatch(tensor.name) is not None for tensor in tensors) > len(tensors):
        return found(Kind.ADAPTER, str(path), [file.name for file in files])
    names = tuple(file.name for file in files)
    what = f"a dense one without any payload ({', '.join(names[:4])})"
    return Found(Kind.DENSE, str(path), what, _COMPRESS, names)


def _is_ours(file: Path) -> bool:
    """Whether a file was written with a guard."""
    with opened(file) as opened_file:
        return bool({GUARD, GUARD_ALONE} & (opened_file.metadata() or {}).keys())


def _is_payload(tensor: SourceTensor) -> bool:
    if not tensor.is_bytes:
        return False
    head = tensor.head(4)
    return has_magic(tensor.name, bytes(head.tolist())) or is_stray_stream(tensor.name, head)


def _quantized(where: Path, method: str, kind: Kind = Kind.QUANTIZED, key: str = "") -> Found:
    what = f"one quantized with {method!r}" + (f" ({key})" if key else "")
    return Found(kind, str(where), what, "compress the model it was made from")
