"""config.json: what it says of the repository beside it, and what is written there."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from miracle_hub.code import (
    BASED_VERSION,
    EXACT_VERSION,
    FORMAT_VERSION,
    MAX_STAGES,
    QUANT_METHOD,
    STAGED_VERSION,
    check_format_version,
)
from miracle_hub.codec.guard import with_guard
from miracle_hub.codec.inherited import is_inherited
from miracle_hub.codec.naming import CONFIG
from miracle_hub.codec.parts import first_dtype, is_miracle, remove_facts, state_in_parts
from miracle_hub.errors import FormatError, SourceError
from miracle_hub.files.whole import writing
from miracle_hub.format.spec import TensorSpec

LOSSLESS = "lossless"  # in the quantization_config: true if every tensor is the source's, bit for bit
_DEEPEST_CONFIG = 100  # levels; real ones have five, and what is deeper may be impossible to write


def read_config(folder: Path, name: str = CONFIG) -> dict[str, Any]:
    """config.json, or another such file, as a dictionary; empty where there is none.

    Raises:
        SourceError: the file is no JSON object.
    """
    path = folder / name
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
            f"{folder / CONFIG}: quantization_config: expected a JSON object, found "
            f"{str(found)[:80]!r}; download it again"
        )
    return found


def read_facts(folder: Path) -> dict[str, Any]:
    """The quantization_config of a compressed repository, checked; empty where config.json has none of ours,
    or one that is of other weights than the plain ones beside it.

    Raises:
        FormatError: it lacks what it must have. UnsupportedVersionError: it is newer than this package.
        SourceError: config.json is no JSON object.
    """
    facts = read_quantization(folder)
    if not is_miracle(facts) or is_inherited(folder):
        return {}
    check_format_version(facts.get("format_version", FORMAT_VERSION), str(folder / CONFIG))
    digests_of(facts, folder / CONFIG)
    return facts


def digests_of(facts: Mapping[str, Any], where: Path) -> list[str | None]:
    """The digest of the payloads of the first n stages, for every n; one None where nobody states it.

    Args:
        where: config.json, for messages.

    Raises:
        FormatError: `stage_digests` is no such list.
    """
    digests = facts.get("stage_digests", [facts.get("digest")])
    if not isinstance(digests, list) or not 1 <= len(digests) <= MAX_STAGES:
        raise FormatError(
            f"{where}: stage_digests: expected a list of 1 to {MAX_STAGES} digests, found "
            f"{str(digests)[:80]!r}; download it again"
        )
    return digests


def excluded_names(facts: dict[str, Any], folder: Path) -> list[str]:
    """What `modules_to_not_convert` of a repository names.

    Raises:
        FormatError: it is no list of names.
    """
    names = facts.get("modules_to_not_convert") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise FormatError(
            f"{folder / CONFIG}: modules_to_not_convert: expected a list of names, found "
            f"{str(names)[:80]!r}; download it again"
        )
    return names


def write_config(
    source: Path,
    target: Path,
    facts: dict[str, Any],
    tensors: Sequence[TensorSpec],
    digests: Sequence[str],
    guards: Sequence[str],
    has_exact: bool = False,
    has_base: bool = False,
) -> None:
    """config.json with the quantization_config that makes transformers call the plug-in; none where there
    was none.

    Args:
        facts: for readers, besides method and version.
        tensors: of the source.
        digests: of the payloads of the first n stages, for every n.
        guards: of all their tensors, likewise.
        has_exact: whether one of the payloads is exact, which readers of before do not know.
        has_base: whether it is a difference to another model.

    Raises:
        OutputWriteError: it cannot be written.
    """
    if not (source / CONFIG).exists():
        return
    config = read_config(source)
    has_dtype = config.get("dtype", config.get("torch_dtype")) is not None
    if not has_dtype and (dtype := first_dtype(tensors)):
        # transformers would otherwise take the dtype of the first plain tensor, which may be narrowed.
        config["dtype"] = dtype
    if is_miracle(config.get("quantization_config")):  # inherited, and replaced
        config.pop("stages", None)
    version = EXACT_VERSION if has_exact else STAGED_VERSION if len(digests) > 1 else 1
    version = BASED_VERSION if has_base else version
    config["quantization_config"] = {"quant_method": QUANT_METHOD, "format_version": version, **facts}
    if len(digests) > 1:
        # An attribute of the config, so that from_pretrained(..., stages=1) changes it.
        config["stages"] = len(digests)
        config["quantization_config"]["stage_digests"] = list(digests)
    state_in_parts(config, tensors)
    _write(target / CONFIG, with_guard(config, guards))


def write_dense_config(source: Path, target: Path) -> None:
    """config.json without what makes it that of a compressed repository.

    Raises:
        OutputWriteError: it cannot be written.
    """
    config = read_config(source)
    if remove_facts(config):
        _write(target / CONFIG, config)


def _write(path: Path, config: dict[str, Any]) -> None:
    with writing(path):
        path.write_text(json.dumps(config, indent=2) + "\n")
