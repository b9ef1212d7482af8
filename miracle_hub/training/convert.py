"""A module ⇄ its variational twin, by torch's parametrizations: classes, names and forward stay."""

import copy
from collections.abc import Set
from dataclasses import replace
from typing import Any, cast

from torch import Tensor, nn
from torch.nn.utils import parametrize

from miracle_hub.code import StreamCode
from miracle_hub.coding.sharing import Sharing
from miracle_hub.errors import OptionError
from miracle_hub.names import is_named
from miracle_hub.training.codes import FilePlan, Unit, codes_of
from miracle_hub.training.config import VariationalConfig
from miracle_hub.training.layout import Member, row_values
from miracle_hub.training.model import ATTRIBUTE, Variational, variational_of
from miracle_hub.training.start import stream_of
from miracle_hub.training.stream import Stream
from miracle_hub.training.targets import Target, find_targets


class Drawn(nn.Module):
    """The parametrization: a tensor of the draw in use."""

    def __init__(
        self, variational: Variational, stream: int, member: int, is_first: bool, siblings: tuple[str, ...]
    ) -> None:
        """
        Args:
            siblings: all parameters of the module before, in their order, which is that of files too.
        """
        super().__init__()
        # The first of them is where the model holds the module; to the others a tuple hides it.
        if is_first:
            self.variational = variational
        self.holder = (variational,)
        self.stream, self.member, self.siblings = stream, member, siblings

    def forward(self, original: Tensor) -> Tensor:
        """The weights in use; what torch passes is empty."""
        return self.holder[0].weight(self.stream, self.member)


def make_variational(model: nn.Module, config: VariationalConfig, plan: FilePlan | None = None) -> nn.Module:
    """Give a model's weights Gaussian posteriors, in place, and return it.

    The optimizer must be made after this: the parameters are others. The means start at the weights.

    Args:
        model: on any device, with weights to start from.
        config: what is coded, how, and within which budget.
        plan: of the file, where the budget is that of one.

    Raises:
        OptionError: nothing matches, a parameter cannot be converted, or the model is variational already.
        BudgetError: the budget is below what the code can use.

    Source: Havasi et al. 2019, section 3.3, with the kinds of `posteriors`.
    """
    _refuse_variational(model)
    targets = find_targets(model, config)
    groups = [targets] if config.streams == "network" else [[target] for target in targets]
    one_scale = frozenset() if plan is None else plan.one_scale
    units = units_of(targets, config, one_scale)
    codes = codes_of(units, config) if plan is None else plan.codes
    sharings = iter(sharings_of(targets, config))
    streams: list[Stream] = []
    for group, unit in zip(groups, units, strict=True):
        own, scales = [next(sharings) for _ in group], "tensor" if unit.name in one_scale else config.scales
        options = replace(config, scales=scales)
        streams.append(_stream(group, own, options, codes[unit.name], len(streams)))
    variational = Variational(streams, config, plan)
    siblings = {id(module): tuple(module._parameters) for t in targets for module, _ in t.owners}
    is_first = True
    for s, group in enumerate(groups):
        for m, target in enumerate(group):
            for module, name in target.owners:
                _attach(module, name, Drawn(variational, s, m, is_first, siblings[id(module)]))
                is_first = False
    setattr(model, ATTRIBUTE, (variational.train(model.training),))
    model.register_forward_pre_hook(_begin_pass)
    return model


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
    variational = variational_of(model).eval()
    variational.kept = values
    dense: dict[tuple[int, int], nn.Parameter] = {}
    for module in list(model.modules()):
        for name, drawn in drawn_attributes(module):
            key = (drawn.stream, drawn.member)
            if key not in dense:
                dense[key] = nn.Parameter(variational.weight(*key).detach().clone())
            _detach(module, name, dense[key], drawn.siblings)
    for module in model.modules():
        if hasattr(module, ATTRIBUTE):
            delattr(module, ATTRIBUTE)
        for key in [k for k, hook in module._forward_pre_hooks.items() if hook is _begin_pass]:
            del module._forward_pre_hooks[key]
    return model


def drawn_attributes(module: nn.Module) -> list[tuple[str, Drawn]]:
    """Attributes of a module that are variational."""
    held: Any = getattr(module, "parametrizations", {})
    return [(name, chain[0]) for name, chain in held.items() if isinstance(chain[0], Drawn)]


def _begin_pass(model: nn.Module, arguments: tuple) -> None:
    variational: Variational = getattr(model, ATTRIBUTE)[0]
    if variational.training != model.training:  # a module that holds it was frozen, as embeddings may be
        variational.train(model.training)
    variational.begin_pass()


def _attach(module: nn.Module, name: str, drawn: Drawn) -> None:
    """Parametrize one attribute, and drop the parameter that it replaces."""
    parametrize.register_parametrization(module, name, nn.Identity(), unsafe=True)
    holder: Any = getattr(module, "parametrizations")[name]  # noqa: B009
    holder[0] = drawn
    original = holder.original
    del holder.original
    holder.register_buffer("original", original.detach().new_empty(0), persistent=False)
    if isinstance(module, nn.RNNBase):
        _forget_flat_weights(module)
        setattr(type(module), "__deepcopy__", _copy_rnn)  # noqa: B010


def _detach(module: nn.Module, name: str, weight: nn.Parameter, siblings: tuple[str, ...]) -> None:
    # torch removes the property from the class, which copies of the module share.
    own = {key: value for key, value in vars(type(module)).items() if key not in ("__dict__", "__weakref__")}
    module.__class__ = cast("type[nn.Module]", type(type(module).__name__, type(module).__bases__, own))
    holder: Any = getattr(module, "parametrizations")[name]  # noqa: B009
    del holder.original
    holder.register_parameter("original", weight)
    holder[0] = nn.Identity()
    parametrize.remove_parametrizations(module, name, leave_parametrized=False)
    for sibling in siblings:
        if sibling in module._parameters:
            module._parameters[sibling] = module._parameters.pop(sibling)
    if isinstance(module, nn.RNNBase):
        _forget_flat_weights(module)


def _forget_flat_weights(module: nn.RNNBase) -> None:
    """Drop the list that a recurrent module has of its weights; it makes another one when it runs.

    Drawn weights belong to the graph of a forward pass, which cannot be copied.
    """
    module._flat_weights = [None] * len(module._flat_weights_names)


def _copy_rnn(module: nn.RNNBase, memo: dict[int, Any]) -> nn.RNNBase:
    """`copy.deepcopy` of a recurrent module with drawn weights."""
    _forget_flat_weights(module)
    twin = module.__new__(type(module))
    memo[id(module)] = twin
    twin.__dict__ = copy.deepcopy(module.__dict__, memo)
    return twin


def _stream(
    group: list[Target], sharings: list[Sharing], config: VariationalConfig, code: StreamCode, number: int
) -> Stream:
    members = [
        Member(target.name, tuple(target.parameter.shape), target.parameter.dtype, sharing)
        for target, sharing in zip(group, sharings, strict=True)
    ]
    stream = stream_of(members, [target.parameter for target in group], config, code, number)
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
                f"sharing: expected (the end of) the name of a coded parameter, found {end!r}; the names are "
                f"{', '.join(factors)}"
            )
        factors |= {name: float(factor) for name in found}
    return factors
