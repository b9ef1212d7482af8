"""Blocks of a model: modules in a row, of which each takes what the one before it made, and little else."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from miracle_hub.calibrate.outputs import answers

Batch = Mapping[str, Tensor]
_FEWEST = 2


@dataclass(frozen=True)
class Call:
    """What a block was called with; its states are `values[key]`, of positions or names."""

    values: dict[int | str, Any]
    key: int | str

    def __call__(self, block: nn.Module, states: Tensor) -> Tensor:
        """What the block makes of other states."""
        values = {**self.values, self.key: states}
        positions = [values[i] for i in range(len(values)) if i in values]
        return _states(block(*positions, **{k: v for k, v in values.items() if isinstance(k, str)}))


@dataclass(frozen=True)
class Chain:
    """Blocks of a model, in the order in which they run."""

    path: str
    blocks: Sequence[nn.Module]

    def record(self, model: nn.Module, batches: Sequence[Batch]) -> tuple[list[Tensor], list[list[Call]]]:
        """What the first block is given by every batch, and every block's call, by block and batch."""
        calls: list[list[Call]] = [[] for _ in self.blocks]
        with _recording(self.blocks, stop=True) as seen, _without_cache(model), torch.no_grad():
            for batch in batches:
                seen.clear()
                try:
                    answers(model, batch)
                except _Stopped:
                    pass
                for own, call in zip(calls, _chained(seen), strict=True):
                    own.append(call)
        starts = [call.values[call.key] for call in calls[0]]
        return starts, [[_without_states(call) for call in own] for own in calls]


def chains_of(model: nn.Module, batch: Batch) -> list[Chain]:
    """Lists of modules of one class that hand states from one to the next, as a batch shows.

    Lists of whose modules any is called twice, not at all, or with what others changed in between are none.
    """
    found = []
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) >= _FEWEST and len({type(m) for m in module}) == 1:
            with _recording(module, stop=False) as seen, _without_cache(model), torch.no_grad():
                answers(model, batch)
            if len(seen) == len(module) and _chained(seen):
                found.append(Chain(path, list(module)))
    return found


@dataclass
class _Seen:
    values: dict[int | str, Any]
    output: Any = None


class _Stopped(Exception):
    """Nothing after the last block is wanted."""


@contextmanager
def _recording(blocks: Sequence[nn.Module], stop: bool) -> Iterator[list[_Seen]]:
    """What blocks are called with and return, in the order of the calls."""
    seen: list[_Seen] = []

    def before(_: nn.Module, args: tuple, kwargs: dict) -> None:
        seen.append(_Seen({**dict(enumerate(args)), **kwargs}))

    def after(block: nn.Module, _args: tuple, output: Any) -> None:
        seen[-1].output = _states(output)
        if stop and block is blocks[-1]:
            raise _Stopped

    handles = [block.register_forward_pre_hook(before, with_kwargs=True) for block in blocks]
    handles += [block.register_forward_hook(after) for block in blocks]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _chained(seen: Sequence[_Seen]) -> list[Call]:
    """The calls of blocks of which each takes what the one before returned; none if they are no chain."""
    keys = set()
    for one, after in zip(seen, seen[1:], strict=False):
        keys |= {key for key, value in after.values.items() if value is one.output and value is not None}
    if len(keys) != 1 or any(after.values.get(*keys) is not one.output for one, after in zip(seen, seen[1:])):
        return []
    (key,) = keys
    has_cache = any(value is not None for one in seen for name, value in one.values.items() if name in _CACHES)
    return [] if has_cache else [Call(one.values, key) for one in seen]


_CACHES = ("past_key_values", "past_key_value", "cache_params")


def _states(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _without_states(call: Call) -> Call:
    return Call({**call.values, call.key: None}, call.key)


@contextmanager
def _without_cache(model: nn.Module) -> Iterator[None]:
    """Within it transformers' models keep no keys and values of earlier tokens."""
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    changed = [config for config in configs.values() if getattr(config, "use_cache", False)]
    for config in changed:
        config.use_cache = False
    try:
        yield
    finally:
        for config in changed:
            config.use_cache = True
