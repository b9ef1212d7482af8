"""What a module holds that its file does not: numbers that no certificate counts, and that a stranger lacks.

Whoever has the file and the code must get the same answers. So tensors beside the file are refused, wherever
a module keeps them, and so are other values that are more than a few settings. What transformers computes
from a config is code: it is built anew, and compared.
"""

import copy
import sys
import sysconfig
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from gc import get_referents
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import PreTrainedModel

from miracle_hub.codec.modules import module_tensors
from miracle_hub.errors import SourceError

_SETTINGS = 64  # numbers of an attribute, or of a constant of the code, that pass for settings: a choice
_LETTERS = 4  # of a text that count as one number: a choice
# What nn.Module keeps of itself; tensors and modules in them are looked at by name.
_OWN = {"_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"}
_LEAVES = (Tensor, np.ndarray, bool, int, float, complex, str, bytes, bytearray, np.generic, type(None))
_OUR_ROOTS = ("torch", "transformers", "miracle_hub", "miracle_kernels")
_INSTALLED = ("site-packages", "dist-packages", sysconfig.get_paths()["stdlib"])


def check_nothing_outside(model: nn.Module) -> None:
    """Refuse a module, in evaluation mode, whose answers may depend on more than its file and its code.

    Raises:
        SourceError: it keeps a tensor that is not in the file, or more than a few other values, or a layer
            that stays in training mode or always normalizes by the batch.
    """
    for name, module in model.named_modules():
        _check_layer(f"{type(model).__name__}: {name or 'itself'} ({type(module).__name__})", module)
    for where, what in outside(model):
        raise SourceError(
            f"{type(model).__name__}: {where}: expected what the module computes with to be in its file, "
            f"found {what} that the file does not hold and no certificate would count; make it a parameter "
            "or a persistent buffer (register_buffer), and save the network again"
        )


def _check_layer(where: str, module: nn.Module) -> None:
    if module.training:
        raise SourceError(
            f"{where}: expected evaluation mode after eval(), found training mode; let eval() reach it"
        )
    if isinstance(module, _BatchNorm) and (module.running_mean is None or module.running_var is None):
        raise SourceError(
            f"{where}: expected running statistics, which the file holds, found none: the layer normalizes "
            "by the rows that are asked together; use track_running_stats=True"
        )


def outside(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Where a module has numbers that its file has not, and what."""
    inside = {id(tensor) for tensor in module_tensors(model).values()}
    inside |= {id(p) for module in model.modules() for p in module.parameters(recurse=False)}
    modules = {id(module) for module in model.modules()}
    built = _Built()
    for path, module in model.named_modules():
        fresh = built.like(path, module)
        for name, buffer in module.named_buffers(recurse=False):
            is_known = id(buffer) in inside or _is_equal(buffer, getattr(fresh, name, None))
            if not is_known:
                yield f"{path}.{name}".strip("."), f"a buffer of {buffer.numel():,} numbers"
        for name, value in vars(module).items():
            if name in _OWN or (fresh is not None and name in vars(fresh) and not _has_tensor(value)):
                continue
            if _is_equal(value, getattr(fresh, name, None)):
                continue
            for what in _numbers(value, inside, modules, most_in_tensors=0):
                yield f"{path}.{name}".strip("."), what
        for where, value in _code(type(module)):
            for what in _numbers(value, inside, modules, most_in_tensors=_SETTINGS):
                yield where, what


class _Built:
    """Models of transformers inside a module, built anew from their configs."""

    def __init__(self) -> None:
        self.found: dict[str, dict[str, nn.Module]] = {}

    def like(self, path: str, module: nn.Module) -> nn.Module | None:
        """The module that stands at this place in a model that was built anew; None outside of such."""
        root = next((r for r in self.found if path == r or not r or path.startswith(f"{r}.")), None)
        if root is None:
            if not isinstance(module, PreTrainedModel) or _root(type(module)) != "transformers":
                return None
            with torch.random.fork_rng():
                fresh = type(module)(copy.deepcopy(module.config))
            self.found[root := path] = dict(fresh.named_modules())
        return self.found[root].get(path[len(root) :].strip("."))


def _is_equal(found: Any, fresh: Any) -> bool:
    if not isinstance(found, Tensor) or not isinstance(fresh, Tensor):
        return False
    is_alike = found.dtype == fresh.dtype and found.shape == fresh.shape
    return is_alike and torch.equal(found.detach().cpu(), fresh.detach().cpu())


def _has_tensor(value: Any) -> bool:
    return any(isinstance(leaf, Tensor | np.ndarray) for leaf in _leaves(value, set()))


def _numbers(value: Any, inside: set[int], modules: set[int], most_in_tensors: int) -> Iterator[str]:
    """What a value has of numbers that are neither in the file nor mere settings."""
    count = 0
    for leaf in _leaves(value, modules):
        if isinstance(leaf, Tensor):
            if id(leaf) not in inside and leaf.numel() > most_in_tensors:
                yield f"a tensor of {leaf.numel():,} numbers"
        elif isinstance(leaf, np.ndarray):
            if leaf.size > most_in_tensors:
                yield f"an array of {leaf.size:,} numbers"
        else:
            count += _size(leaf)
    if count > _SETTINGS:
        yield f"{count:,} numbers"


def _size(leaf: Any) -> int:
    """How many numbers a plain value counts as: one for every bit beyond a word's of a whole number."""
    if isinstance(leaf, str):
        return -(-len(leaf) // _LETTERS)
    if isinstance(leaf, bytes | bytearray):
        return len(leaf)
    return max(1, leaf.bit_length() - 63) if isinstance(leaf, int) else int(leaf is not None)


def _leaves(value: Any, modules: set[int]) -> Iterator[Any]:
    """Tensors, arrays and plain values that a value leads to.

    Args:
        modules: ids of those that are looked at by themselves.
    """
    seen, stack = set(modules), [value]
    while stack:
        item = stack.pop()
        if isinstance(item, _LEAVES):
            yield item
        elif id(item) not in seen:
            seen.add(id(item))
            stack += _parts(item)


def _parts(item: Any) -> Iterable[Any]:
    """What an object is made of, as far as it is no library's."""
    if isinstance(item, type | ModuleType):
        return ()
    if isinstance(item, FunctionType):
        return () if _is_installed(item.__code__.co_filename) else _function_parts(item)
    if isinstance(item, MethodType):
        return (item.__func__, item.__self__)
    if isinstance(item, partial):
        return (item.func, *item.args, *item.keywords.values())
    if isinstance(item, Mapping):
        return (*item.keys(), *item.values())
    if isinstance(item, list | tuple | set | frozenset | deque):
        return item
    if isinstance(item, nn.Module):  # one that the model does not know of
        return vars(item).values()
    if _root(type(item)) in _OUR_ROOTS:
        return ()
    return (part for part in get_referents(item) if part is not type(item))


def _function_parts(function: FunctionType) -> Iterator[Any]:
    yield from (function.__defaults__ or ())
    yield from (function.__kwdefaults__ or {}).values()
    yield from (cell.cell_contents for cell in function.__closure__ or () if _is_filled(cell))
    names = _names(function.__code__)
    yield from (value for name, value in function.__globals__.items() if name in names)


def _is_filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:
        return False


def _names(code: CodeType) -> set[str]:
    """Global names that a function and the functions inside it use."""
    inner = (_names(constant) for constant in code.co_consts if isinstance(constant, CodeType))
    return set(code.co_names).union(*inner)


def _code(kind: type) -> Iterator[tuple[str, Any]]:
    """Methods and constants of a class and its bases, as far as they are no library's.

    What __init__ makes is looked at where it is kept.
    """
    for base in kind.__mro__:
        if _root(base) in _OUR_ROOTS or _is_installed(
            getattr(sys.modules.get(base.__module__), "__file__", "")
        ):
            continue
        for name, value in vars(base).items():
            value = getattr(value, "__func__", getattr(value, "fget", value))
            if not (name.startswith("__") and (name == "__init__" or not isinstance(value, FunctionType))):
                yield f"{base.__name__}.{name}", value


def _is_installed(file: str | None) -> bool:
    """Whether code comes from a package, or from Python."""
    return not file or any(part in file for part in _INSTALLED)


def _root(kind: type) -> str:
    return kind.__module__.partition(".")[0]
