"""A module ⇄ its variational twin, by torch's parametrizations: classes, names and forward stay."""

import copy
from collections.abc import Set
from dataclasses import replace

import torch
from torch import Tensor, nn

from miracle_hub.code import StreamCode
from miracle_hub.coding.sharing import Sharing
from miracle_hub.errors import OptionError, WrittenWeightError
from miracle_hub.names import is_named, near_selection, offer
from miracle_hub.training.based import TrainingBase
from miracle_hub.training.codes import FilePlan, Unit, codes_of
from miracle_hub.training.config import VariationalConfig
from miracle_hub.training.drawn import (
    Drawn,
    attach,
    detach,
    drawn_attributes,
    guard_wrappers,
    unguard_wrapper,
)
from miracle_hub.training.layout import Member, row_values
from miracle_hub.training.model import Variational, variational_of
from miracle_hub.training.passes import ATTRIBUTE, install, uninstall
from miracle_hub.training.start import stream_of
from miracle_hub.training.stream import Stream
from miracle_hub.training.targets import Target, check_weights, find_targets
from miracle_hub.training.wrapping import refuse_wrapped


def make_variational(
    model: nn.Module,
    config: VariationalConfig,
    plan: FilePlan | None = None,
    base: TrainingBase | None = None,
) -> nn.Module:
    """Give a model's weights Gaussian posteriors, in place, and return it.

    The optimizer must be made after this: the parameters are others. The means start at the weights.

    Args:
        model: on any device, with weights to start from.
        config: what is coded, how, and within which budget.
        plan: of the file, where the budget is that of one.
        base: whose weights are the means of priors; 0 else.

    Raises:
        OptionError: nothing matches, a parameter cannot be converted, the model is variational already, or
            something wraps or shards it for several devices.
        BudgetError: the budget is below what the code can use.
        NonFiniteWeightError: a weight that is not coded is NaN or infinite.

    Source: Havasi et al. 2019, section 3.3, with the kinds of `posteriors`.
    """
    _refuse_variational(model)
    refuse_wrapped(model)
    targets = find_targets(model, config, None if base is None else set(base.tensors))
    check_weights(model)
    groups = [targets] if config.streams == "network" else [[target] for target in targets]
    one_scale = frozenset() if plan is None else plan.one_scale
    units = units_of(targets, config, one_scale)
    codes = codes_of(units, config) if plan is None else plan.codes
    sharings = iter(sharings_of(targets, config))
    streams: list[Stream] = []
    for group, unit in zip(groups, units, strict=True):
        own, scales = [next(sharings) for _ in group], "tensor" if unit.name in one_scale else config.scales
        options = replace(config, scales=scales)
        mean = None if base is None else base.tensors[group[0].name]
        streams.append(_stream(group, own, options, codes[unit.name], len(streams), mean))
    if base is not None:
        base.freeze(model)
        base = replace(base, tensors={})
    variational = Variational(streams, config, plan, base)
    siblings = {id(module): tuple(module._parameters) for t in targets for module, _ in t.owners}
    for s, group in enumerate(groups):
        for m, target in enumerate(group):
            for i, (module, name) in enumerate(target.owners):
                drawn = Drawn(variational, s, m, siblings[id(module)])
                if not (s or m or i):
                    drawn.hold("variational")
                if not (m or i):
                    drawn.hold("own")
                attach(module, name, drawn)
    guard_wrappers(model)
    variational.tables = unsaved_tables(model)
    install(model, variational.train(model.training))
    return model


def unsaved_tables(model: nn.Module) -> dict[str, Tensor]:
    """Copies of buffers of whole numbers that state dicts do not hold, as those of positions."""
    return {
        f"{prefix}.{name}".lstrip("."): buffer.clone()
        for prefix, module in model.named_modules()
        for name, buffer in module.named_buffers(recurse=False)
        if name in module._non_persistent_buffers_set and not buffer.is_floating_point()
    }


def check_evaluated(model: nn.Module) -> Variational:
    """The variational part of a model, of which evaluation has what a file can say.

    Raises:
        OptionError: the model is not variational.
        WrittenWeightError: weights in use are not those of the posteriors, or a table that no file holds is
            not as it was.
    """
    variational = variational_of(model)
    variational.check()
    root = next(module for module in model.modules() if ATTRIBUTE in vars(module))
    found = unsaved_tables(root)
    for name, table in variational.tables.items():
        if name in found and not torch.equal(found[name].cpu(), table.cpu()):
            raise WrittenWeightError(
                f"{name}: expected a buffer as it was when the model became variational, since no file holds "
                "it, found another; average parameters alone (use_buffers=False)"
            )
    return variational


def _refuse_variational(model: nn.Module) -> None:
    """
    Raises:
        OptionError: the model, or a module of it, is variational already.
    """
    for name, module in model.named_modules():
        if isinstance(module, Variational):
            where = name.partition("parametrizations.")[0].rstrip(".") or type(model).__name__
            raise OptionError(
                f"model: expected one without posteriors, found those of {where}; call "
                "remove_variational(model) first"
            )


def remove_variational(model: nn.Module) -> nn.Module:
    """Make a variational model an ordinary one again, in place: its weights are the posterior's means, or,
    where they are coded, what the file will hold.

    Raises:
        OptionError: the model is not variational.
    """
    return _make_dense(model, {})


def posterior_mean(model: nn.Module) -> nn.Module:
    """A dense copy of a variational model, at the posterior's means.

    Raises:
        OptionError: the model is not variational.
    """
    return _make_dense(copy.deepcopy(model), {})


def posterior_samples(model: nn.Module, n: int) -> list[nn.Module]:
    """Dense copies at `n` draws of the posterior: an ensemble whose spread is the model's uncertainty.

    Raises:
        OptionError: the model is not variational.
    """
    variational, copies = variational_of(model), []
    for _ in range(n):
        variational.next_draw()
        values = {i: stream.sample(variational.seed()) for i, stream in enumerate(variational.streams)}
        copies.append(_make_dense(copy.deepcopy(model), values))
    return copies


def _make_dense(model: nn.Module, values: dict[int, Tensor]) -> nn.Module:
    """Replace posteriors by parameters, in place: given values of streams, or else their means."""
    variational = variational_of(model)
    variational.settle()
    values = {i: values.get(i, stream.mean()) for i, stream in enumerate(variational.streams)}
    dense: dict[tuple[int, int], nn.Parameter] = {}
    for module in list(model.modules()):
        for name, drawn in drawn_attributes(module):
            key = (drawn.stream, drawn.member)
            if key not in dense:
                weight = variational.streams[drawn.stream].weight(values[drawn.stream], drawn.member)
                dense[key] = nn.Parameter(weight.detach().clone())
            detach(module, name, dense[key], drawn.siblings)
    for module in model.modules():
        unguard_wrapper(module)
        if ATTRIBUTE in vars(module):
            uninstall(module)
    return model


def _stream(
    group: list[Target],
    sharings: list[Sharing],
    config: VariationalConfig,
    code: StreamCode,
    number: int,
    base: Tensor | None,
) -> Stream:
    members = [
        Member(target.name, tuple(target.parameter.shape), target.parameter.dtype, sharing)
        for target, sharing in zip(group, sharings, strict=True)
    ]
    stream = stream_of(members, [target.parameter for target in group], config, code, number, base)
    if not any(target.parameter.requires_grad for target in group):
        stream.requires_grad_(False)  # who froze a tensor wants it coded as it is
    return stream


def units_of(
    targets: list[Target], config: VariationalConfig, one_scale: Set[str] = frozenset()
) -> list[Unit]:
    """What has a stream of its own: every tensor, or the network.

    Args:
        one_scale: see `FilePlan`.
    """
    sharings = sharings_of(targets, config)
    if config.streams == "network":
        name = targets[0].name if len(targets) == 1 else f"{len(targets)} tensors"
        return [Unit(name, sum(sharing.n_values for sharing in sharings))]
    units = []
    for target in targets:
        has_row_scales = config.scales == "row" and target.name not in one_scale
        width = row_values(tuple(target.parameter.shape), has_row_scales)
        units.append(Unit(target.name, target.parameter.numel(), width))
    return units


def sharings_of(targets: list[Target], config: VariationalConfig) -> list[Sharing]:
    """How the weights of every target share values.

    Raises:
        OptionError: a name in `sharing` is that of no target.
    """
    factors = _sharing_factors(targets, config)
    return [_sharing_of(target, factors[target.name], config) for target in targets]


def _sharing_of(target: Target, factor: float, config: VariationalConfig) -> Sharing:
    """How a target's weights share values, by its factor."""
    n_weights = target.parameter.numel()
    n_values = max(1, round(n_weights / factor))
    kind = config.sharing_kind if n_values < n_weights else "none"
    return Sharing(kind, n_values, n_weights)


def _sharing_factors(targets: list[Target], config: VariationalConfig) -> dict[str, float]:
    """The factor of every target.

    Raises:
        OptionError: a name in `sharing` is that of no target.
    """
    factors = {target.name: 1.0 for target in targets}
    for end, factor in config.sharing.items():
        found = [name for name in factors if is_named(name, [end])]
        if not found:
            raise OptionError(
                f"sharing: expected (the end of) the name of a coded parameter, found {end!r}; "
                f"{near_selection([end], factors) or offer('', factors)}; correct it, or leave it out"
            )
        factors |= {name: float(factor) for name in found}
    return factors
