"""Blocks of a model: modules in a row, of which each takes what the one before it made, and little else."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from miracle_hub.calibrate.outputs import answers

Batch = Mapping[str, Tensor]
_FEWEST = 2
_TOKENS_OF_ROWS = 3  # dimensions of states
# Arguments in which a block keeps what later tokens need: it could not be called twice.
_CACHES = ("past_key_values", "past_key_value", "cache_params")


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
    """Blocks of a model, in the order in which they run.

    Attributes:
        key: of the states among a block's arguments.
        is_uniform: whether all blocks are called with the same but for the states.
    """

    path: str
    blocks: Sequence[nn.Module]
    key: int | str
    is_uniform: bool

    def record(self, model: nn.Module, batches: Sequence[Batch]) -> tuple[list[Tensor], list[list[Call]]]:
        """What the first block is given by every batch, and every block's call, by block and batch.

        Blocks run only where calls differ.
        """
        starts, calls = list[Tensor](), [list[Call]() for _ in self.blocks]
        last = self.blocks[0] if self.is_uniform else self.blocks[-1]
        with _recording(self.blocks, last) as seen, _without_cache(model), torch.no_grad():
            for batch in batches:
                seen.clear()
                with suppress(_Stopped):
                    answers(model, batch)
                starts.append(seen[0].values[self.key])
                own = seen * len(self.blocks) if self.is_uniform else seen
                for known, one in zip(calls, own, strict=True):
                    known.append(Call({**one.values, self.key: None}, self.key))
        return starts, calls


def chains_of(model: nn.Module, batch: Batch) -> list[Chain]:
    """Lists of modules of one class that hand states from one to the next, as a batch shows.

    None is inside another. Lists of whose modules any is called twice, not at all, or with what others
    changed in between are none, nor are those of filters: states are `[rows, tokens, d]`.
    """
    found = list[Chain]()
    for path, module in model.named_modules():
        is_inside = any(path.startswith(f"{chain.path}.") for chain in found)
        if not is_inside and isinstance(module, nn.ModuleList) and len(module) >= _FEWEST:
            chain = _chain_of(model, path, list(module), batch)
            found += [] if chain is None else [chain]
    return found


def _chain_of(model: nn.Module, path: str, blocks: Sequence[nn.Module], batch: Batch) -> Chain | None:
    if len({type(block) for block in blocks}) > 1:
        return None
    with _recording(blocks, None) as seen, _without_cache(model), torch.no_grad():
        answers(model, batch)
    if [one.block for one in seen] != list(blocks) or (key := _key_of(seen)) is None:
        return None
    if any(one.output.dim() != _TOKENS_OF_ROWS for one in seen):
        return None
    first, *others = ({k: v for k, v in one.values.items() if k != key} for one in seen)
    is_uniform = all(own.keys() == first.keys() and all(own[k] is first[k] for k in own) for own in others)
    return Chain(path, blocks, key, is_uniform)


@dataclass
class _Seen:
    block: nn.Module
    values: dict[int | str, Any]
    output: Any = None


class _Stopped(Exception):
    """Nothing after this block is wanted."""


@contextmanager
def _recording(blocks: Sequence[nn.Module], last: nn.Module | None) -> Iterator[list[_Seen]]:
    """What blocks are called with and return, in the order of the calls, until the last is called."""
    seen: list[_Seen] = []

    def before(block: nn.Module, args: tuple, kwargs: dict) -> None:
        seen.append(_Seen(block, {**dict(enumerate(args)), **kwargs}))
        if block is last:
            raise _Stopped

    def after(_: nn.Module, _args: tuple, output: Any) -> None:
        seen[-1].output = _states(output)

    handles = [block.register_forward_pre_hook(before, with_kwargs=True) for block in blocks]
    handles += [block.register_forward_hook(after) for block in blocks]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _key_of(seen: Sequence[_Seen]) -> int | str | None:
    """Where states are among the arguments: each block takes what the one before it returned."""
    pairs = list(zip(seen, seen[1:], strict=False))
    given = [value for one in seen for name, value in one.values.items() if name in _CACHES]
    keys = {key for one, after in pairs for key, value in after.values.items() if value is one.output}
    if len(keys) != 1 or any(value is not None for value in given):
        return None
    (key,) = keys
    return key if all(after.values.get(key) is one.output for one, after in pairs) else None


def _states(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


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
