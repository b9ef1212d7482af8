"""The state of a coding run in one file, so that a killed run goes on and ends with the same bytes."""

import dataclasses
import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from miracle_hub.errors import OptionError, OutputWriteError
from miracle_hub.training.journal import Row

if TYPE_CHECKING:
    from miracle_hub.training.coder import _Coder


class Checkpoint:
    """Keeps the state of a coding run in a file, which is replaced as a whole or not at all."""

    def __init__(self, path: str | Path, every_seconds: float = 60.0) -> None:
        """
        Args:
            every_seconds: at least so long between two writings; 0 writes after every step.
        """
        self.path, self.every_seconds = Path(path), every_seconds
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
        tensors = {f"model.{k}": v for k, v in coder.model.state_dict().items() if isinstance(v, Tensor)}
        for i, state in coder.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{i}.{k}": torch.as_tensor(v) for k, v in state.items()}
        tensors["rng.torch"], tensors["rng.encoder"] = torch.get_rng_state(), coder.generator.get_state()
        tensors = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
        rows = [dataclasses.asdict(row) for row in coder.journal.rows]
        position = {"group": coder.group, "step": coder.step, "last_loss": coder.last_loss, "rows": rows}
        metadata = {"options": _options(coder), "position": json.dumps(position)}
        partial = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            save_file(tensors, partial, metadata)
            partial.replace(self.path)
        except (OSError, SafetensorError) as error:
            partial.unlink(missing_ok=True)
            raise OutputWriteError(
                f"{self.path}: the checkpoint could not be written ({error}); the one before is still there: make room "
                "and run again"
            ) from error

    def load(self, coder: "_Coder") -> None:
        """Put a run where the checkpoint was written, if there is one.

        Raises:
            OptionError: it is that of another model, or of a run with other options.
        """
        if not self.path.exists():
            return
        tensors, metadata = self._read()
        expected = _options(coder)
        if metadata.get("options") != expected:
            raise OptionError(
                f"{self.path}: expected the checkpoint of a run with {expected}, found {metadata.get('options')}; "
                "use the options of that run, or another file"
            )
        position = json.loads(metadata["position"])
        model = {name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")}
        _check_names(self.path, set(model), {k for k, v in coder.model.state_dict().items() if isinstance(v, Tensor)})
        coder.model.load_state_dict(model)
        coder.optimizer.load_state_dict(_optimizer_state(tensors, coder.optimizer.state_dict()))
        torch.set_rng_state(tensors["rng.torch"])
        coder.generator.set_state(tensors["rng.encoder"])
        coder.group, coder.step, coder.last_loss = position["group"], position["step"], position["last_loss"]
        coder.journal.rows = [Row(**row) for row in position["rows"]]

    def _read(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        try:
            with safe_open(self.path, "pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise OptionError(
                f"{self.path}: expected a checkpoint of a coding run, found {error}; delete the file to start anew"
            ) from error


def _options(coder: "_Coder") -> str:
    """What must be equal for a run to go on: the options, and what is coded."""
    members = [[member.name, list(member.shape)] for stream in coder.streams for member in stream.members]
    config = dataclasses.asdict(coder.variational.config)
    return json.dumps({"config": config, "coding": dataclasses.asdict(coder.options), "tensors": members})


def _check_names(path: Path, found: set[str], expected: set[str]) -> None:
    if different := sorted(found ^ expected):
        raise OptionError(
            f"{path}: expected the checkpoint of this model, found one that differs in {', '.join(different[:4])}; "
            "use the model of that run, or another file"
        )


def _optimizer_state(tensors: dict[str, Tensor], current: dict[str, Any]) -> dict[str, Any]:
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, number, key = name.split(".", 2)
            state.setdefault(int(number), {})[key] = tensor
    return {"state": state, "param_groups": current["param_groups"]}
