"""The work folder of a run that may be killed: whose it is, who may use it, and when it is emptied.

It holds `run.json`, which says of which run it is, and a file for each step (`kept.py`). A run holds a lock
on it as long as it lives.
"""

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from miracle_hub.codec.companions import of_source
from miracle_hub.codec.detector import TO_COMPRESS, require
from miracle_hub.codec.jobs import ENCODER
from miracle_hub.codec.kept import Kept, step_of
from miracle_hub.codec.source import list_tensors, weight_files
from miracle_hub.coding.backend import choose
from miracle_hub.errors import OptionError, ResumeError
from miracle_hub.files.digests import sha256_of
from miracle_hub.files.whole import alone_in, refuse_existing, refuse_overlap, whole_file, writing
from miracle_hub.options import CompressOptions

_RUN = "run.json"
# Of the folder's files: another number where steps keep other things.
_FORMAT = 1
_TEMPORARY = re.compile(r"\..+\.miracle\.(tmp|old)")
# Options that say what is known of a model, and those that say what is made of it.
_OF_MODEL = ("seed", "calibrate", "effort", "base", "base_revision")
_OF_FILE = (
    *("bits_per_weight", "size", "window_bits", "rotation", "modules_to_not_convert"),
    *("max_shard_size", "stages"),
)
# Steps that depend on the former alone.
_STEPS_OF_MODEL = ("inputs", "sensitivity")


@dataclass(frozen=True)
class Run:
    """Which run a folder is of, as far as it decides about bytes; values by name, for people.

    Attributes:
        model: what inputs and sensitivity depend on.
        file: what all other steps depend on besides.
        machine: what changes the last bits of sums of floats.
    """

    model: dict[str, str]
    file: dict[str, str]
    machine: dict[str, str]

    @classmethod
    def of(cls, source: Path, options: CompressOptions, model: nn.Module | None) -> "Run":
        """
        Args:
            model: that the user gave, where transformers has no class for it.

        Raises:
            SourceError: the source cannot be read.
        """
        weights = weight_files(source)
        files = [*weights, *(source / path for path in of_source(source, weights).travel)]
        stated: dict[str, str] = {"format of the folder": str(_FORMAT), "miracle-hub": version("miracle-hub")}
        stated |= {str(path.relative_to(source)): _short(sha256_of(path)) for path in files}
        stated |= {name: _said(getattr(options, name)) for name in _OF_MODEL}
        if model is not None:
            stated["model"] = _short(_module_digest(model, weights))
        of_file = {name: _said(getattr(options, name)) for name in _OF_FILE}
        excluded = options.modules_to_not_convert
        of_file |= {"modules_to_not_convert": json.dumps(excluded)} if isinstance(excluded, list) else {}
        of_file |= {"backend": choose(options.backend).name, "encoder": str(ENCODER)}
        machine = {name: version(name) for name in ("torch", "transformers")}
        machine |= {"threads": str(torch.get_num_threads()), "CPU": torch.backends.cpu.get_cpu_capability()}
        return cls(stated, of_file, machine)


@contextmanager
def work_folder(
    source: Path, out: Path, options: CompressOptions, model: nn.Module | None = None
) -> Iterator[Kept]:
    """What the run of these arguments keeps, and has kept; all of it is removed when the block ends well.

    Without the option `work` nothing is kept.

    Raises:
        ResumeError: the folder is of another run, or holds what no run wrote.
        OptionError: it is a file, or is, holds or lies in the source or the output.
        OutputExistsError: another run uses it; or the output exists. OutputWriteError: it is not writable.
        SourceError: the source cannot be read.
    """
    if options.work is None:
        yield Kept()
        return
    folder = Path(options.work)
    refuse_existing(out, options.overwrite)
    require(source, TO_COMPRESS)
    refuse_overlap(folder, source, "a work folder")
    refuse_overlap(folder, out, "a work folder", "the output")
    if folder.exists() and not folder.is_dir():
        raise OptionError(
            f"{folder}: expected a folder to keep work in, found a file; give another path as work"
        )
    run = Run.of(source, options, model)
    with alone_in(folder, "another folder"):
        _begin(folder, run)
        yield Kept(folder).given(json.dumps(run.model))
        _clear(folder)


def _begin(folder: Path, run: Run) -> None:
    """Say of which run the folder is, after having seen that it is of no other.

    Raises:
        ResumeError: it is. OutputWriteError: the folder cannot be written.
    """
    path, steps = folder / _RUN, _steps(folder)
    if path.exists():
        found = _read(path)
        if steps:
            _require_same(folder, run, found, steps)
    with writing(path), whole_file(path) as whole:
        whole.write_text(json.dumps(asdict(run), indent=1) + "\n", encoding="utf-8")


def _steps(folder: Path) -> set[str]:
    """Steps that are kept.

    Raises:
        ResumeError: there is something else.
    """
    names = [path for path in sorted(folder.iterdir()) if path.name != _RUN and path.name[0] != "."]
    steps = {path: step_of(path) for path in names}
    for path, step in steps.items():
        if step is None:
            raise ResumeError(
                f"{folder}: expected an empty folder, or one of an interrupted run, found {path.name}; give "
                "another folder as work"
            )
    return {step for step in steps.values() if step is not None}


def _read(path: Path) -> Run:
    """
    Raises:
        ResumeError: it is none of ours.
    """
    try:
        found: Any = json.loads(path.read_text(encoding="utf-8"))
        return Run(**{field.name: dict(found[field.name]) for field in fields(Run)})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ResumeError(
            f"{path}: expected what an interrupted run says of itself, found a damaged file "
            f"({type(error).__name__}); give another folder as work, or remove this one to start anew"
        ) from error


def _require_same(folder: Path, run: Run, found: Run, steps: set[str]) -> None:
    """
    Raises:
        ResumeError: something was kept that this run does not go on from.
    """
    changed = _differences(run.model, found.model)
    if steps - set(_STEPS_OF_MODEL):
        changed += _differences(run.file, found.file)
    if changed:
        raise ResumeError(
            f"{folder}: expected the work of this run, found that of one with {', '.join(changed)}; run it "
            "with what that one had, give another folder as work, or remove this one to start anew"
        )
    if other := _differences(run.machine, found.machine):
        warnings.warn(
            f"{folder}: kept by a run with {', '.join(other)}: it goes on, but the last bits of sums may be "
            "others, and with them the file",
            stacklevel=5,
        )


def _differences(expected: Mapping[str, str], found: Mapping[str, str]) -> list[str]:
    names = [name for name in {**expected, **found} if expected.get(name) != found.get(name)]
    return [f"{name} {found.get(name, 'none')} instead of {expected.get(name, 'none')}" for name in names]


def _clear(folder: Path) -> None:
    """Remove what runs wrote there; what says whose it is comes last.

    Raises:
        OutputWriteError: something cannot be removed.
    """
    with writing(folder):
        for path in folder.iterdir():
            if step_of(path) is not None:
                path.unlink()
            elif _TEMPORARY.fullmatch(path.name):  # of killed writings, since nobody else is here
                shutil.rmtree(path, ignore_errors=True)
        (folder / _RUN).unlink(missing_ok=True)


def _said(value: Any) -> str:
    """An option for people; of data that is in memory the kind, since its rows are compared."""
    if value is None or isinstance(value, str | int | float | os.PathLike):
        return "none" if value is None else str(value)
    return type(value).__name__


def _short(digest: str) -> str:
    return f"SHA-256 {digest[:16]}…"


def _module_digest(model: nn.Module, weights: list[Path]) -> str:
    """Of what a module is beside the weights of the files: its layers, and the tensors that these lack."""
    known = {tensor.name for tensor in list_tensors(weights)}
    found = hashlib.sha256(repr(model).encode())
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name in sorted(tensors.keys() - known):
        found.update(name.encode())
        found.update(tensors[name].detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
