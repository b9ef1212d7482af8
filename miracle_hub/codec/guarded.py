"""What readers require of guards before they hand anything out.

FORMAT.md, "Guard".
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from miracle_hub.code import QUANT_METHOD
from miracle_hub.codec.config import read_config, read_quantization
from miracle_hub.codec.guard import GUARD, Contents, config_guard, repository_guard
from miracle_hub.codec.inherited import are_plain
from miracle_hub.codec.naming import CONFIG
from miracle_hub.codec.parts import is_miracle
from miracle_hub.errors import ChecksumError, FormatError

_SHA256 = re.compile(r"[0-9a-f]{64}")


def stated_guard(path: Path, config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What quantization_config of a config.json at `path` states; None if it states no guard.

    Raises:
        FormatError: it is no guard.
    """
    facts = config.get("quantization_config")
    if not isinstance(facts, dict) or facts.get("quant_method") != QUANT_METHOD or "guard" not in facts:
        return None
    guard = facts["guard"]
    if not isinstance(guard, dict) or not isinstance(guard.get("tensors"), list):
        raise FormatError(
            f"{path}: quantization_config.guard: expected an object with a list of tensors, found "
            f"{str(guard)[:80]!r}; download it again"
        )
    return guard


def check_config(path: Path, config: Mapping[str, Any]) -> bool:
    """Compare config.json with the guard of its own that it states; returns whether it states one.

    Raises:
        ChecksumError: it is another. FormatError: what it states is no guard.
    """
    guard = stated_guard(path, config)
    if guard is None or "config" not in guard:
        return False
    _check_config(path, config, guard["config"], "config from quantization_config.guard")
    return True


def check_own_guard(path: Path, config: Mapping[str, Any]) -> bool:
    """The same for a config.json of a network's arguments.

    Raises:
        ChecksumError: it is another.
    """
    if GUARD in config:
        _check_config(path, config, config[GUARD], f"{GUARD} from it")
    return GUARD in config


def _check_config(path: Path, config: Mapping[str, Any], stated: object, remove: str) -> None:
    if stated != (found := config_guard(config)):
        raise ChecksumError(
            f"{path}: expected what guard {str(stated)[:64]} covers, found {found}: it is damaged or was "
            f"changed; download it again, or, if it was changed on purpose, remove {remove}"
        )


def check_together(
    folder: Path, files: Sequence[Contents], stages: int = 1, index: Path | None = None
) -> None:
    """Compare files of a repository with their guards, all together with that of config.json, and with that
    of their index, before anything of them is handed out.

    Args:
        files: that are read: those of the first `stages`.
        index: that named them, if one did.

    Raises:
        ChecksumError: something is damaged, missing or from elsewhere. FormatError: a guard is lost.
        SourceError: config.json is no JSON object.
    """
    path, facts = folder / CONFIG, read_quantization(folder)
    is_other = is_miracle(facts) and are_plain([contents.path for contents in files])
    check_files(files, path, read_config(folder) if path.exists() and not is_other else None, stages)
    if index is not None:
        check_index(index, files)


def check_files(
    files: Sequence[Contents], path: Path, config: Mapping[str, Any] | None, stages: int = 1
) -> None:
    """Compare the files of a repository with their guards, and all together with that of config.json.

    Args:
        files: of the first `stages`.
        path: of config.json, for messages.
        config: what it holds; None where there is none.

    Raises:
        ChecksumError: files are damaged, missing or from elsewhere. FormatError: config.json states no
            guard for files that were written with one.
    """
    for contents in files:
        contents.check()
    if config is None:
        return
    guard = stated_guard(path, config)
    if guard is not None:
        _check_together(files, f"{path}: quantization_config.guard", guard["tensors"], stages)
    elif parts := [contents.path.name for contents in files if contents.is_part]:
        raise FormatError(
            f"{path}: expected a quantization_config with a guard, as {parts[0]} was written with one, found "
            "none; it has lost it, or is another repository's: download the folder again"
        )


def check_index(index: Path, files: Sequence[Contents]) -> None:
    """Compare the files that an index names with the guard in its metadata.

    Raises:
        ChecksumError: they are others. FormatError: it has none, though they were written with one.
    """
    metadata = json.loads(index.read_text(encoding="utf-8")).get("metadata")
    stated = metadata.get(GUARD) if isinstance(metadata, dict) else None
    if stated is not None:
        _check_together(files, f"{index}: metadata.{GUARD}", [stated], 1)
    elif parts := [contents.path.name for contents in files if contents.is_part]:
        raise FormatError(
            f"{index}: expected {GUARD} in its metadata, as {parts[0]} was written with one, found none; "
            "download the folder again"
        )


def unguarded(contents: Contents) -> str:
    """What to say of a file without a guard: which of its tensors nothing covers; empty if there are none."""
    plain = [line.name for line in contents.lines if not line.is_framed]
    if contents.stated is not None or not plain:
        return ""
    more = f" and {len(plain) - 3} more" if len(plain) > 3 else ""
    return f"without a guard, so that these are unguarded: {', '.join(plain[:3])}{more}"


def _check_together(files: Sequence[Contents], where: str, stated: Sequence[Any], stages: int) -> None:
    if len(stated) < stages or not all(isinstance(s, str) and _SHA256.fullmatch(s) for s in stated):
        raise FormatError(
            f"{where}: expected {stages} or more SHA-256 digests, found {str(list(stated))[:80]}; download "
            "it again"
        )
    found = repository_guard(contents.digest for contents in files)
    if stated[stages - 1] != found:
        raise ChecksumError(
            f"{where}: expected files of digest {stated[stages - 1]}, found {found} in "
            f"{', '.join(contents.path.name for contents in files[:4])}; one is damaged, missing or from "
            "another version: download the folder again"
        )
