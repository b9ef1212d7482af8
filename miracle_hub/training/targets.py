"""Which parameters of a module become variational, in the manner of PEFT's target_modules."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.utils import parametrize

from miracle_hub.errors import OptionError
from miracle_hub.training.config import VariationalConfig

KEYWORDS = ("all", "all-matrices", "all-linear")


@dataclass(frozen=True)
class Target:
    """A parameter that becomes variational.

    Attributes:
        name: of its first owner, "module.parameter".
        owners: every module that holds it, with the attribute it holds it by; more than one if it is tied.
    """

    name: str
    parameter: nn.Parameter
    owners: tuple[tuple[nn.Module, str], ...]


def find_targets(model: nn.Module, config: VariationalConfig) -> list[Target]:
    """Parameters to convert, in the model's order.

    Raises:
        OptionError: there is none, or one that cannot be converted.
    """
    wanted = config.target_modules or ("all" if config.streams == "network" else "all-matrices")
    kept = [names for names in (config.exclude_modules, config.modules_to_save) if names]
    targets = [
        target
        for target in _parameters(model)
        if _is_wanted(target, wanted, model, config.streams)
        and not any(_matches(target.name, names) for names in kept)
    ]
    if not targets:
        modules = [name for name, module in model.named_modules() if list(module.parameters(recurse=False))]
        raise OptionError(
            f"target_modules: expected modules with weights to code, found none for {wanted!r} (excluded: "
            f"{kept}) in {type(model).__name__}; it has {', '.join(modules[:12]) or 'no parameters'}"
        )
    for target in targets:
        _check(target)
    return targets


def matches_any(name: str, *selections: str | list[str] | None) -> bool:
    """Whether a parameter's name is selected by one of them."""
    return any(_matches(name, names) for names in selections if names)


def _parameters(model: nn.Module) -> Iterator[Target]:
    """Every floating-point parameter once, with all its owners."""
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    names: dict[int, tuple[str, nn.Parameter]] = {}
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_floating_point():
                owners.setdefault(id(parameter), []).append((module, name))
                names.setdefault(id(parameter), (f"{prefix}.{name}".lstrip("."), parameter))
    for key, (name, parameter) in names.items():
        yield Target(name, parameter, tuple(owners[key]))


def _is_wanted(target: Target, wanted: str | list[str], model: nn.Module, streams: str) -> bool:
    if wanted == "all":
        return True
    if wanted == "all-matrices":
        return target.parameter.ndim >= 2
    if wanted == "all-linear":
        head = _output_layer(model)
        is_linear = any(_is_linear(module) and name == "weight" for module, name in target.owners)
        return is_linear and not any(module is head for module, _ in target.owners)
    # Vectors of a hub model are stored plainly unless they are named or all is asked for.
    return _matches(target.name, wanted) and (
        streams == "network" or target.parameter.ndim >= 2 or _names(target.name, wanted)
    )


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _output_layer(model: nn.Module) -> nn.Module | None:
    """What PEFT's "all-linear" leaves out: the head of a language model."""
    get = getattr(model, "get_output_embeddings", None)
    return get() if callable(get) else None


def _matches(name: str, wanted: str | list[str]) -> bool:
    """Whether a parameter's own name, or that of its module or one above, is meant."""
    parts = name.split(".")
    prefixes = [".".join(parts[:n]) for n in range(1, len(parts) + 1)]
    if isinstance(wanted, str):
        return any(re.fullmatch(wanted, prefix) for prefix in prefixes)
    return any(prefix == end or prefix.endswith(f".{end}") for prefix in prefixes for end in wanted)


def _names(name: str, wanted: str | list[str]) -> bool:
    """Whether the parameter itself is named, not only a module."""
    if isinstance(wanted, str):
        return re.fullmatch(wanted, name) is not None
    return any(name == end or name.endswith(f".{end}") for end in wanted)


def _check(target: Target) -> None:
    for module, name in target.owners:
        if parametrize.is_parametrized(module, name):
            raise OptionError(
                f"{target.name}: expected a plain parameter, found one that is parametrized already; remove "
                "that first, or exclude the module"
            )
        if getattr(module, "sparse", False):
            raise OptionError(
                f"{target.name}: expected dense gradients, found sparse=True; make the embedding dense, or "
                "exclude the module"
            )
    if target.parameter.numel() == 0 or not bool(torch.isfinite(target.parameter).all()):
        raise OptionError(
            f"{target.name}: expected finite weights, found {target.parameter.numel()} of which some are NaN or "
            "infinite, or none; repair the model first"
        )
