"""What a run that may be killed keeps in its work folder: every step in a file of its own, whole or not."""

import hashlib
import json
import logging
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from miracle_hub.codec.report import CALIBRATION_LOGGER
from miracle_hub.errors import FormatError
from miracle_hub.files.sealed import read_sealed, write_sealed

_LOGGER = logging.getLogger(CALIBRATION_LOGGER)
_ENDING = ".safetensors"
# A step's file: its name, and the beginning of the digest of all that it depends on.
_NAME = re.compile(rf"([a-z0-9-]+)-[0-9a-f]{{16}}{re.escape(_ENDING)}")


@dataclass(frozen=True)
class Saved:
    """What a step made.

    Attributes:
        facts: beside tensors, as JSON has them.
    """

    tensors: dict[str, Tensor]
    facts: dict[str, Any]


@dataclass(frozen=True)
class Kept:
    """Steps of one run. Without a folder nothing is kept, and nothing found.

    Attributes:
        digest: of all that the steps depend on, SHA-256 in hexadecimal. What was kept under another one is
            never found.
    """

    folder: Path | None = None
    digest: str = ""

    def given(self, *facts: str) -> "Kept":
        """The same folder for steps that depend on more."""
        found = hashlib.sha256(json.dumps([self.digest, *facts]).encode())
        return replace(self, digest=found.hexdigest())

    def load(self, step: str) -> Saved | None:
        """What a step made before the run was killed; None if it is to be made (again).

        A file that is damaged, or of a step with other inputs, is none: a warning says so.
        """
        if self.folder is None:
            return None
        path = self._path(step)
        if not path.exists():
            for other in _files_of(self.folder, step):
                _warn(other, "found one that was made of other inputs")
            return None
        try:
            tensors, metadata = read_sealed(path)
        except FormatError:
            _warn(path, "found a damaged file")
            return None
        if metadata.get("digest") != self.digest:
            _warn(path, "found the file of another one")
            return None
        _LOGGER.info("%s: goes on with what an interrupted run kept: %s", self.folder, step)
        # Copies lie in memory as tensors do that were just made: sums of floats depend on it.
        return Saved({n: t.clone() for n, t in tensors.items()}, json.loads(metadata["facts"]))

    def save(self, step: str, tensors: Mapping[str, Tensor] | None = None, /, **facts: Any) -> None:
        """Keep what a step made, in place of what it made before.

        Raises:
            OutputWriteError: it cannot be written; what was there before still is.
        """
        if self.folder is None:
            return
        path = self._path(step)
        write_sealed(path, _apart(tensors or {}), {"digest": self.digest, "facts": json.dumps(facts)})
        for other in _files_of(self.folder, step):
            if other != path:
                other.unlink(missing_ok=True)

    def drop(self, step: str) -> None:
        """Remove what a step and its parts ("step-3") have kept, since a later one holds it."""
        for path in [] if self.folder is None else self.folder.iterdir():
            if (found := step_of(path)) is not None and f"{found}-".startswith(f"{step}-"):
                path.unlink(missing_ok=True)

    def _path(self, step: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{step}-{self.digest[:16]}{_ENDING}"


def step_of(path: Path) -> str | None:
    """The step that a file of a work folder is of; None if it is no such file."""
    found = _NAME.fullmatch(path.name)
    return found[1] if found else None


def _files_of(folder: Path, step: str) -> list[Path]:
    return [path for path in folder.iterdir() if step_of(path) == step]


def _warn(path: Path, found: str) -> None:
    warnings.warn(
        f"{path}: expected what an interrupted run kept of this step, {found}; it is made again",
        stacklevel=4,
    )


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous ones on the CPU, of which no two share their memory, as a file has them."""
    found, seen = dict[str, Tensor](), set[int]()
    for name, tensor in tensors.items():
        own = tensor.detach().cpu().contiguous()
        place = own.untyped_storage().data_ptr()
        found[name] = own.clone() if place in seen else own
        seen.add(place)
    return found
