"""A module ⇄ its variational twin, by torch's parametrizations: classes, names and forward stay as they are."""

import copy

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from miracle_hub.coding.sharing import Sharing
from miracle_hub.errors import OptionError
from miracle_hub.training.config import VariationalConfig
from miracle_hub.training.stream import Member, Stream
from miracle_hub.training.targets import Target, find_targets
from miracle_hub.training.variational import ATTRIBUTE, Variational, variational_of


class Drawn(nn.Module):
    """The parametrization: a tensor of the draw in use."""

    def __init__(self, variational: Variational, stream: int, member: int) -> None:
        super().__init__()
        # The first of them is where the model holds the module; to the others a tuple hides it.
        if (stream, member) == (0, 0):
            self.variational = variational
        self.holder = (variational,)
        self.stream, self.member = stream, member

    def forward(self, original: Tensor) -> Tensor:
        return self.holder[0].weight(self.stream, self.member)


def make_variational(model: nn.Module, config: VariationalConfig) -> nn.Module:
    """Give a model's weights Gaussian posteriors, in place, and return it.

    The optimizer must be made after this: the parameters are others. The means start at the weights.

    Args:
        model: on any device, with weights to start from.
        config: what is coded, how, and within which budget.

    Raises:
        OptionError: nothing matches, a parameter cannot be converted, or the model is variational already.
        BudgetError: the budget is below what the code can use.

    Source: Havasi et al. 2019, section 3.3, with the parametrizations of `posterior`.
    """
    if hasattr(model, ATTRIBUTE):
        raise OptionError(
            f"model: expected one without posteriors, found the attribute {ATTRIBUTE!r} on {type(model).__name__}; "
            "call remove_variational(model) first"
        )
    targets = find_targets(model, config)
    factors = _sharing_factors(targets, config)
    groups = [targets] if config.streams == "network" else [[target] for target in targets]
    streams: list[Stream] = []
    for group in groups:
        sharings = [_sharing(target, factors[target.name], config) for target in group]
        streams.append(_stream(group, sharings, config, len(streams)))
    variational = Variational(streams, config)
    for s, group in enumerate(groups):
        for m, target in enumerate(group):
            for module, name in target.owners:
                _attach(module, name, Drawn(variational, s, m))
    setattr(model, ATTRIBUTE, (variational.train(model.training),))
    model.register_forward_pre_hook(_begin_pass)
    return model


def remove_variational(model: nn.Module) -> nn.Module:
    """Make a variational model an ordinary one again, in place: its weights are the posterior's means, or,
    where they are coded, what the file will hold.

    Raises:
        OptionError: the model is not variational.
    """
    variational = variational_of(model).eval()
    dense: dict[tuple[int, int], nn.Parameter] = {}
    for module in list(model.modules()):
        for name in list(getattr(module, "parametrizations", {})):
            drawn = module.parametrizations[name][0]  # pyright: ignore[reportIndexIssue]
            if isinstance(drawn, Drawn):
                key = (drawn.stream, drawn.member)
                if key not in dense:
                    dense[key] = nn.Parameter(variational.weight(*key).detach().clone())
                _detach(module, name, dense[key])
    delattr(model, ATTRIBUTE)
    for key in [k for k, hook in model._forward_pre_hooks.items() if hook is _begin_pass]:
        del model._forward_pre_hooks[key]
    return model


def mean(model: nn.Module) -> nn.Module:
    """A dense copy of a variational model, at the posterior's means."""
    return remove_variational(copy.deepcopy(model))


def sample(model: nn.Module, n: int) -> list[nn.Module]:
    """Dense copies at `n` draws of the posterior: an ensemble whose spread is the model's uncertainty."""
    variational_of(model)
    copies = []
    for _ in range(n):
        variational = variational_of(model)
        variational.draw_number.add_(1)
        twin = copy.deepcopy(model)
        drawn = variational_of(twin)
        with torch.no_grad():
            values = {i: stream.draw(drawn.seed()) for i, stream in enumerate(drawn.streams)}
        drawn.eval().kept = values
        drawn.eval = lambda: drawn  # pyright: ignore[reportAttributeAccessIssue]
        copies.append(remove_variational(twin))
    return copies


def _begin_pass(model: nn.Module, arguments: tuple) -> None:
    getattr(model, ATTRIBUTE)[0].begin_pass()


def _attach(module: nn.Module, name: str, drawn: Drawn) -> None:
    """Parametrize one attribute, and drop the parameter that it replaces."""
    parametrize.register_parametrization(module, name, nn.Identity(), unsafe=True)
    holder = module.parametrizations[name]  # pyright: ignore[reportIndexIssue]
    holder[0] = drawn
    original = holder.original
    del holder.original
    holder.register_buffer("original", original.detach().new_empty(0), persistent=False)


def _detach(module: nn.Module, name: str, weight: nn.Parameter) -> None:
    # torch removes the property from the class, which copies of the module share.
    own = {key: value for key, value in vars(type(module)).items() if key not in ("__dict__", "__weakref__")}
    module.__class__ = type(type(module).__name__, type(module).__bases__, own)
    holder = module.parametrizations[name]  # pyright: ignore[reportIndexIssue]
    del holder.original
    holder.register_parameter("original", weight)
    holder[0] = nn.Identity()
    parametrize.remove_parametrizations(module, name, leave_parametrized=False)


def _stream(group: list[Target], sharings: list[Sharing], config: VariationalConfig, number: int) -> Stream:
    n_values = sum(sharing.n_values for sharing in sharings)
    where = group[0].name if len(group) == 1 else f"{len(group)} tensors"
    members = [
        Member(target.name, tuple(target.parameter.shape), target.parameter.dtype, sharing)
        for target, sharing in zip(group, sharings, strict=True)
    ]
    weights = [target.parameter for target in group]
    code = config.code_for(n_values, where)
    stream = Stream(members, weights, code, config.parametrization, config.kl_block_weights, number)
    return stream.to(group[0].parameter.device)


def _sharing(target: Target, factor: float, config: VariationalConfig) -> Sharing:
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
        found = [name for name in factors if name == end or name.endswith(f".{end}")]
        if not found:
            raise OptionError(
                f"sharing: expected (the end of) the name of a coded parameter, found {end!r}; the names are "
                f"{', '.join(factors)}"
            )
        factors |= {name: float(factor) for name in found}
    return factors
