"""The state of a coding run in one file, so that a killed run goes on and ends with the same bytes."""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from miracle_hub.errors import OptionError
from miracle_hub.files.sealed import read_sealed, write_sealed
from miracle_hub.files.whole import clear_up
from miracle_hub.training.journal import Row
from miracle_hub.training.stream import BEGUN


@dataclass(frozen=True)
class RunState:
    """Where a coding run is.

    Attributes:
        options: what must be equal for a run to go on from it, as JSON.
        group: how many groups are coded.
        step: how many steps of the refit after the last of them are done.
        last_loss: of the last one.
        learning_rate: of the refits.
        rows: of the journal.
        model: its state dict, tensors alone.
        optimizer: its state, by the number of the parameter and the name: "3.exp_avg".
        random: states of the generators by name.
    """

    options: str
    group: int
    step: int
    last_loss: float
    learning_rate: float
    rows: tuple[Row, ...]
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    random: dict[str, Tensor]


# What is tensors of a state; the rest is numbers.
_PARTS = ("model", "optimizer", "random")


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

    def is_due(self) -> bool:
        """Whether the last writing was long ago."""
        return time.monotonic() - self.saved_at >= self.every_seconds

    def save_if_due(self, state: Callable[[], RunState], now: bool = False) -> None:
        """Write what a run's state is, if it was long ago, or if it must be now.

        Raises:
            OutputWriteError: it could not be written; the last one is still there.
        """
        if now or self.is_due():
            self.save(state())
            self.saved_at = time.monotonic()

    def save(self, state: RunState) -> None:
        """Write the state of a run.

        Raises:
            OutputWriteError: it could not be written; the last one is still there.
        """
        tensors = {f"{part}.{name}": t for part in _PARTS for name, t in getattr(state, part).items()}
        tensors = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
        position = {
            "group": state.group,
            "step": state.step,
            "last_loss": state.last_loss,
            "learning_rate": state.learning_rate,
            "rows": [asdict(row) for row in state.rows],
        }
        write_sealed(self.path, tensors, {"options": state.options, "position": json.dumps(position)})

    def read(self, fresh: RunState) -> RunState | None:
        """What was saved, if anything was.

        Args:
            fresh: of the run that would go on, which must be the same one.

        Raises:
            FormatError: the file is damaged, or none of ours.
            OptionError: it is that of another model, or of a run with other options.
        """
        if self.path.parent.is_dir():
            clear_up(self.path)
        if not self.path.exists():
            return None
        tensors, metadata = read_sealed(self.path)
        if metadata["options"] != fresh.options:
            raise OptionError(
                f"{self.path}: expected the checkpoint of a run with {fresh.options}, found one with "
                f"{metadata['options']}; use the options of that run, or another file"
            )
        saved = _state(tensors, metadata["options"], json.loads(metadata["position"]))
        if different := sorted(name for name, _ in _signature(saved) ^ _signature(fresh)):
            raise OptionError(
                f"{self.path}: expected the checkpoint of this model, found one that differs in "
                f"{', '.join(dict.fromkeys(different[:4]))}; use the model of that run, or another file"
            )
        return saved


def _state(tensors: dict[str, Tensor], options: str, position: dict[str, Any]) -> RunState:
    parts: dict[str, Any] = {part: {} for part in _PARTS}
    for name, tensor in tensors.items():
        part, _, rest = name.partition(".")
        parts[part][rest] = tensor
    rows = tuple(Row(**row) for row in position.pop("rows"))
    return RunState(options=options, rows=rows, **position, **parts)


def _signature(state: RunState) -> set[tuple[str, str]]:
    """Names, shapes and dtypes of the model; without what there is only once coding has begun."""
    kept = {name: t for name, t in state.model.items() if not name.endswith(BEGUN)}
    return {(name, f"{tuple(t.shape)} {t.dtype}") for name, t in kept.items()}


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The state of an optimizer as `RunState` has it."""
    states = optimizer.state_dict()["state"].items()
    return {f"{i}.{name}": torch.as_tensor(v) for i, state in states for name, v in state.items()}


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Give an optimizer a state that `optimizer_tensors` took; its options stay."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        number, key = name.split(".", 1)
        state.setdefault(int(number), {})[key] = tensor
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def of_process(name: str, rank: int) -> str:
    """Under which name a state has that of a process's generator."""
    return f"{name}.{rank}" if rank else name
