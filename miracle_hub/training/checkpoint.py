"""The state of a coding run in one file, so that a killed run goes on and ends with the same bytes."""

import dataclasses
import json
import logging
import shutil
import time
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from miracle_hub.errors import FormatError, OptionError, OutputWriteError
from miracle_hub.training.journal import Row
from miracle_hub.training.stream import CODING_BUFFERS

_LOGGER = logging.getLogger("miracle_hub")

if TYPE_CHECKING:
    from miracle_hub.training.coder import _Coder


class Checkpoint:
    """Keeps the state of a coding run in a file, which is replaced as a whole or not at all."""

    def __init__(self, path: str | Path, every_seconds: float = 60.0, loss: str = "") -> None:
        """
        Args:
            every_seconds: at least so long between two writings; 0 writes after every step.
            loss: what refits have; a run goes on with the same only.
        """
        self.path, self.every_seconds, self.loss = Path(path), every_seconds, loss
        self.saved_at = time.monotonic()

    def save_if_due(self, coder: "_Coder", now: bool = False) -> None:
        if now or time.monotonic() - self.saved_at >= self.every_seconds:
            self.save(coder)
            self.saved_at = time.monotonic()

    def save(self, coder: "_Coder") -> None:
        """Write the state of a run.

        Raises:
            OutputWriteError: it could not be written; the last one is still there.
        """
        tensors = {f"model.{name}": tensor for name, tensor in _model_state(coder).items()}
        for i, state in coder.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{i}.{k}": torch.as_tensor(v) for k, v in state.items()}
        tensors |= {f"rng.{name}": state for name, state in _random_states(coder).items()}
        tensors = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
        rows = [dataclasses.asdict(row) for row in coder.journal.rows]
        position = {"group": coder.group, "step": coder.step, "last_loss": coder.last_loss, "rows": rows}
        position["learning_rate"] = coder.options.rate()
        metadata = {"options": _options(coder), "position": json.dumps(position)}
        write_sealed(self.path, tensors, metadata)

    def read(self, coder: "_Coder") -> "Saved | None":
        """What was saved, if anything was, checked to be of this run, which is not changed.

        Raises:
            FormatError: the file is damaged, or none of ours.
            OptionError: it is that of another model, or of a run with other options.
        """
        _clear_up(self.path)
        if not self.path.exists():
            return None
        tensors, metadata = read_sealed(self.path)
        if metadata["options"] != (expected := _options(coder)):
            raise OptionError(
                f"{self.path}: expected the checkpoint of a run with {expected}, found one with "
                f"{metadata['options']}; use the options of that run, or another file"
            )
        saved = Saved(tensors, json.loads(metadata["position"]))
        found, wanted = _signature(saved.part("model")), _signature(_model_state(coder))
        if different := sorted(name for name, _ in found ^ wanted):
            raise OptionError(
                f"{self.path}: expected the checkpoint of this model, found one that differs in "
                f"{', '.join(dict.fromkeys(different[:4]))}; use the model of that run, or another file"
            )
        return saved


@dataclass(frozen=True)
class Saved:
    """The contents of a checkpoint."""

    tensors: dict[str, Tensor]
    position: dict[str, Any]

    def part(self, prefix: str) -> dict[str, Tensor]:
        start = f"{prefix}."
        return {k.removeprefix(start): t for k, t in self.tensors.items() if k.startswith(start)}

    def restore(self, coder: "_Coder") -> None:
        """Put a run, whose streams are being coded, where it was.

        Its refits may go on at another learning rate, which is what a loss that was not finite asks for.
        """
        if (before := self.position["learning_rate"]) != (rate := coder.options.rate()):
            _LOGGER.warning("refits go on at a learning rate of %g, after %g until now", rate, before)
        coder.model.load_state_dict(self.part("model"))
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in self.part("optimizer").items():
            number, key = name.split(".", 1)
            state.setdefault(int(number), {})[key] = tensor
        groups = coder.optimizer.state_dict()["param_groups"]
        coder.optimizer.load_state_dict({"state": state, "param_groups": groups})
        random = self.part("rng")
        torch.set_rng_state(random["torch"])
        coder.generator.set_state(random["encoder"])
        if "cuda" in random:
            torch.cuda.set_rng_state(random["cuda"])
        coder.group, coder.step = self.position["group"], self.position["step"]
        coder.last_loss = self.position["last_loss"]
        coder.journal.rows = [Row(**row) for row in self.position["rows"]]


def _model_state(coder: "_Coder") -> dict[str, Tensor]:
    return {name: t for name, t in coder.model.state_dict().items() if isinstance(t, Tensor)}


def _random_states(coder: "_Coder") -> dict[str, Tensor]:
    states = {"torch": torch.get_rng_state(), "encoder": coder.generator.get_state()}
    if next(coder.model.parameters()).is_cuda:
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _options(coder: "_Coder") -> str:
    """What must be equal for a run to go on: the options but for the learning rate, and what is coded."""
    members = [[member.name, list(member.shape)] for stream in coder.streams for member in stream.members]
    config = dataclasses.asdict(coder.variational.config)
    coding = dataclasses.asdict(coder.options)
    del coding["learning_rate"]
    if coder.checkpoint is not None and coder.checkpoint.loss:
        coding["loss"] = coder.checkpoint.loss
    return json.dumps({"config": config, "coding": coding, "tensors": members})


def _signature(state: dict[str, Tensor]) -> set[tuple[str, str]]:
    """Names, shapes and dtypes; without what there is only once coding has begun."""
    begun = (*CODING_BUFFERS, "curvature")
    kept = {name: t for name, t in state.items() if name.rpartition(".")[2] not in begun}
    return {(name, f"{tuple(t.shape)} {t.dtype}") for name, t in kept.items()}


def write_sealed(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a checkpoint with the CRC-32 of all of it, in one step.

    Raises:
        OutputWriteError: it could not be written; the one before is still there.
    """
    try:
        _clear_up(path)
        _partial(path).mkdir(parents=True)
        save_file(tensors, _partial(path) / "state", {**metadata, "crc": crc_of(tensors, metadata)})
        (_partial(path) / "state").replace(path)
    except (OSError, SafetensorError) as error:
        raise OutputWriteError(
            f"{path}: the checkpoint could not be written ({error}); the one before is still there: "
            "make room, see that no other run uses it, and run again"
        ) from error
    finally:
        _clear_up(path)


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


def _partial(path: Path) -> Path:
    """A folder, for safetensors writes to another name first: what a kill leaves is found again."""
    return path.with_name(f".{path.name}.partial")


def _clear_up(path: Path) -> None:
    shutil.rmtree(_partial(path), ignore_errors=True)


def crc_of(tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
    """CRC-32 of everything in a checkpoint, since safetensors files have none."""
    crc = zlib.crc32(json.dumps(sorted(metadata.items())).encode())
    for name, tensor in sorted(tensors.items()):
        crc = zlib.crc32(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode(), crc)
        crc = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, crc)
    return f"{crc:08x}"
