"""Which parameters of a module become variational, in the manner of PEFT's target_modules."""

from collections.abc import Iterator, Set
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from miracle_hub.errors import NonFiniteWeightError, OptionError
from miracle_hub.names import check_taken, is_named, matches, near_selection
from miracle_hub.training.config import VariationalConfig

KEYWORDS = ("all", "all-matrices", "all-linear")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


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


def find_targets(
    model: nn.Module, config: VariationalConfig, of_base: Set[str] | None = None
) -> list[Target]:
    """Parameters to convert, in the model's order.

    Args:
        of_base: names of those that a base has too, if there is one: no others are coded.

    Raises:
        OptionError: there is none, or one that cannot be converted.
    """
    wanted = config.target_modules or ("all" if config.streams == "network" else "all-matrices")
    _check_names(model, config)
    kept = [names for names in (config.exclude_modules, config.modules_to_save) if names]
    targets = [
        target
        for target in _parameters(model)
        if _is_wanted(target, wanted, model, config.streams)
        and not any(matches(target.name, names) for names in kept)
    ]
    if not targets:
        names = [name for name, _ in model.named_parameters()]
        modules = dict.fromkeys(name.rpartition(".")[0] or name for name in names)
        close = near_selection(wanted, names, KEYWORDS)
        raise OptionError(
            f"target_modules: expected modules with weights to code, found none for {wanted!r} (excluded: "
            f"{kept}) in {type(model).__name__}; choose one of {', '.join(KEYWORDS)}, or of its modules with "
            f"parameters: {', '.join(list(modules)[:12]) or 'it has none'}{f' ({close})' if close else ''}"
        )
    if of_base is not None:
        targets = _those_of_base(targets, of_base)
    for target in targets:
        _check(target)
    return targets


def _those_of_base(targets: list[Target], of_base: Set[str]) -> list[Target]:
    """
    Raises:
        OptionError: there is none.
    """
    found = [target for target in targets if target.name in of_base]
    if not found:
        raise OptionError(
            "base: expected weights to code that the base has, found none of "
            f"{', '.join(target.name for target in targets[:4])}, … in it, of their shapes; give the model "
            "that this one was made from, or other target_modules"
        )
    return found


def _check_names(model: nn.Module, config: VariationalConfig) -> None:
    """
    Raises:
        OptionError: a name takes nothing of the model, or, of what is coded, nothing that can be.
    """
    held = (model.named_modules, model.named_parameters, model.named_buffers)
    names, where = [n for named in held for n, _ in named(remove_duplicate=False) if n], type(model).__name__
    for option in ("exclude_modules", "modules_to_save"):
        check_taken(getattr(config, option), names, option, where)
    wanted = config.target_modules
    if not isinstance(wanted, list):
        return  # one expression that takes nothing is told by what there is
    check_taken(wanted, names, "target_modules", where)
    targets = list(_parameters(model))
    for name in wanted:
        if not any(_is_wanted(target, [name], model, config.streams) for target in targets):
            vectors = [target.name for target in targets if matches(target.name, [name])]
            raise OptionError(
                f"target_modules: expected modules of {where} with matrices to code, found {name!r}, which "
                f"takes {f'vectors alone, such as {vectors[0]}' if vectors else 'no weights'}; name what is "
                "to be coded in full, or leave it out"
            )


def _parameters(model: nn.Module) -> Iterator[Target]:
    """Every floating-point parameter once, with all its owners."""
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    names: dict[int, tuple[str, nn.Parameter]] = {}
    for prefix, module in model.named_modules():
        for name, parameter in _own_parameters(prefix, module):
            if parameter.is_floating_point():
                owners.setdefault(id(parameter), []).append((module, name))
                names.setdefault(id(parameter), (f"{prefix}.{name}".lstrip("."), parameter))
    for key, (name, parameter) in names.items():
        yield Target(name, parameter, tuple(owners[key]))


def _own_parameters(prefix: str, module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters by the names that their module uses, also where torch put them aside to parametrize."""
    if "parametrizations" in prefix.split("."):
        return
    yield from module.named_parameters(recurse=False, remove_duplicate=False)
    parametrized: Any = getattr(module, "parametrizations", {})
    for name, aside in parametrized.items():
        for parameter in aside.parameters(recurse=False):
            yield name, parameter


def _is_wanted(target: Target, wanted: str | list[str], model: nn.Module, streams: str) -> bool:
    if wanted == "all":
        return True
    is_matrix = is_lazy(target.parameter) or target.parameter.ndim >= 2
    if wanted == "all-matrices":
        return is_matrix
    if wanted == "all-linear":
        head = _output_layer(model)
        is_linear = any(_is_linear(module) and name == "weight" for module, name in target.owners)
        return is_linear and not any(module is head for module, _ in target.owners)
    # Vectors of a hub model are stored plainly unless they are named or all is asked for.
    return matches(target.name, wanted) and (
        streams == "network" or is_matrix or is_named(target.name, wanted)
    )


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _output_layer(model: nn.Module) -> nn.Module | None:
    """What PEFT's "all-linear" leaves out: the head of a language model."""
    get: Any = getattr(model, "get_output_embeddings", None)
    return None if get is None else get()


def check_weights(model: nn.Module) -> None:
    """Refuse what no training mends, in what is coded and in what is not.

    Raises:
        NonFiniteWeightError: a parameter is NaN or infinite, or a buffer NaN (a mask may be infinite).
    """
    named = chain(model.named_parameters(), model.named_buffers())
    for name, tensor in named:
        if is_lazy(tensor) or tensor.is_meta or tensor.dtype not in DTYPES:
            continue
        bad = tensor.isnan() if not isinstance(tensor, nn.Parameter) else ~torch.isfinite(tensor)
        if n_bad := int(bad.sum()):
            raise NonFiniteWeightError(
                f"{name}: expected finite weights, found {n_bad} of {tensor.numel()} that are NaN or "
                "infinite; repair the model first"
            )


def _check(target: Target) -> None:
    for module, name in target.owners:
        if is_parametrized(module, name):
            raise OptionError(
                f"{target.name}: expected a plain parameter, found one that is parametrized already; remove "
                "that first, or exclude the module"
            )
        if getattr(module, "sparse", False):
            raise OptionError(
                f"{target.name}: expected dense gradients, found sparse=True; make the embedding dense, or "
                "exclude the module"
            )
        if getattr(module, "max_norm", None) is not None:
            raise OptionError(
                f"{target.name}: expected weights that nobody writes to in a forward pass, found max_norm="
                f"{module.max_norm}; make the embedding without it, or exclude the module"
            )
    parameter = target.parameter
    if is_lazy(parameter) or parameter.is_meta:
        raise OptionError(
            f"{target.name}: expected weights to start from, found none; run the model once, or load its "
            "weights"
        )
    if parameter.dtype not in DTYPES:
        raise OptionError(
            f"{target.name}: expected one of {', '.join(map(str, DTYPES))}, found {parameter.dtype}; exclude "
            "the module, or cast it"
        )
    if parameter.numel() == 0:
        raise OptionError(f"{target.name}: expected weights, found none; exclude the module")
    if n_bad := int((~torch.isfinite(parameter)).sum()):
        raise OptionError(
            f"{target.name}: expected finite weights, found {n_bad} of {parameter.numel()} that are NaN or "
            "infinite; repair the model first"
        )
