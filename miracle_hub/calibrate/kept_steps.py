"""Steps of an optimizer that go on where a killed run was: they are kept every few minutes."""

import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from miracle_hub.codec.kept import Kept, Saved

# A choice: writing three floats for each weight takes seconds.
_EVERY_SECONDS = 300.0


def kept_steps(
    kept: Kept,
    name: str,
    numbers: Sequence[int],
    optimizer: Optimizer,
    schedule: LRScheduler,
    fitted: Sequence[Tensor],
    then: Callable[[], None] = lambda: None,
) -> Iterator[int]:
    """The numbers of the steps that are left, each of which is done before the next one is asked for.

    Args:
        name: of these steps, in the work folder.
        numbers: of all steps.
        optimizer, schedule: as they are before the first step.
        fitted: what steps change.
        then: done once `fitted` are what they were.

    Raises:
        OutputWriteError: they cannot be kept.
    """
    found = kept.load(name)
    first = 0 if found is None else _go_on(found, optimizer, schedule, fitted)
    if first:
        then()
    saved_at = time.monotonic()
    for step, number in enumerate(numbers[first:], first + 1):
        yield number
        if step < len(numbers) and time.monotonic() - saved_at >= _EVERY_SECONDS:
            _keep(kept, name, step, optimizer, fitted)
            saved_at = time.monotonic()


def _keep(kept: Kept, name: str, step: int, optimizer: Optimizer, fitted: Sequence[Tensor]) -> None:
    tensors = {f"fitted.{i}": values for i, values in enumerate(fitted)}
    for i, state in optimizer.state_dict()["state"].items():
        tensors |= {f"state.{i}.{key}": torch.as_tensor(value) for key, value in state.items()}
    rates = [group["lr"] for group in optimizer.param_groups]
    kept.save(name, tensors, step=step, rates=rates)


@torch.no_grad()
def _go_on(found: Saved, optimizer: Optimizer, schedule: LRScheduler, fitted: Sequence[Tensor]) -> int:
    """Be where `_keep` was; returns how many steps were done."""
    for i, values in enumerate(fitted):
        values.copy_(found.tensors[f"fitted.{i}"])
    state: dict[int, dict[str, Tensor]] = {}
    for name, values in found.tensors.items():
        kind, number, *key = name.split(".", 2)
        if kind == "state":
            state.setdefault(int(number), {})[key[0]] = values
    rates = zip(optimizer.state_dict()["param_groups"], found.facts["rates"], strict=True)
    groups = [group | {"lr": rate} for group, rate in rates]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    schedule.load_state_dict(schedule.state_dict() | {"last_epoch": found.facts["step"]})
    return found.facts["step"]
