"""Weights that are drawn, in a module: torch's parametrizations, which follow or refuse what is done."""

import copy
from collections.abc import Callable
from types import MethodType
from typing import Any, NoReturn, cast

from torch import Tensor, nn
from torch.nn.utils import parametrize

from miracle_hub.errors import WrittenWeightError
from miracle_hub.training.model import Variational
from miracle_hub.training.passes import ATTRIBUTE
from miracle_hub.training.stream import Stream

_ORDINARY = "before make_variational, or after remove_variational(model)"


class Drawn(nn.Module):
    """The parametrization: a tensor of the draw in use."""

    own: Stream

    def __init__(self, variational: Variational, stream: int, member: int, siblings: tuple[str, ...]) -> None:
        """
        Args:
            siblings: all parameters of the module before, in their order, which is that of files too.
        """
        super().__init__()
        self.holder = (variational,)  # to be no child
        self.stream, self.member, self.siblings = stream, member, siblings

    def hold(self, child: str) -> None:
        """Be where the model has the variational part, or the stream, so that what is done to modules (to
        freeze them, to give them to an optimizer) is done to the posteriors of their weights.
        """
        variational = self.holder[0]
        self.add_module(child, variational if child == "variational" else variational.streams[self.stream])

    def forward(self, original: Tensor) -> Tensor:
        """The weights in use; what torch passes is empty."""
        return self.holder[0].weight(self.stream, self.member)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Drawn":
        self.holder[0].settle()
        self.holder[0].forget()
        self.holder[0].streams[self.stream].cast(self.member, fn)
        return super()._apply(fn, recurse)


class DrawnWeight(parametrize.ParametrizationList):
    """Torch's list of the parametrizations of a weight, of which there is one: `Drawn`."""

    def right_inverse(self, value: Tensor) -> None:
        """What assigning a tensor to the weight does: the posterior's mean is set.

        Raises:
            WrittenWeightError: it cannot be.
        """
        drawn = cast(Drawn, self[0])
        drawn.holder[0].write(drawn.stream, drawn.member, value)

    def append(self, module: nn.Module) -> NoReturn:  # pyright: ignore[reportIncompatibleMethodOverride]
        """
        Raises:
            WrittenWeightError: no file could hold what is put on top.
        """
        drawn = cast(Drawn, self[0])
        raise WrittenWeightError(
            f"{drawn.holder[0].streams[drawn.stream].members[drawn.member].name}: expected no other "
            f"parametrization of a posterior's weight, found {type(module).__name__}; exclude_modules those "
            "that are parametrized"
        )

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        drawn = cast(Drawn, self[0])
        drawn.holder[0].settle((drawn.stream, drawn.member))
        super()._save_to_state_dict(destination, prefix, keep_vars)


class _Parameters(dict[str, Any]):
    """What a module with drawn weights has of its parameters, for those who take them from there."""

    def __missing__(self, name: str) -> NoReturn:
        """
        Raises:
            WrittenWeightError: there is no such parameter.
        """
        raise WrittenWeightError(
            f"{name}: expected a parameter, found none but the weight of a posterior; prune, normalize and "
            f"convert modules {_ORDINARY}"
        )

    def __delitem__(self, name: str) -> None:
        if name not in self:
            self.__missing__(name)
        super().__delitem__(name)


def drawn_attributes(module: nn.Module) -> list[tuple[str, Drawn]]:
    """Attributes of a module that are variational."""
    held: Any = vars(module)["_modules"].get("parametrizations", {})  # wrappers hand on attributes of others
    return [(name, cast(Drawn, own[0])) for name, own in held.items() if isinstance(own, DrawnWeight)]


def coded_names(model: nn.Module) -> dict[tuple[int, int], str]:
    """The names that coded weights have by now, by stream and number in it: models are wrapped, and modules
    are put elsewhere. What is missing is in use no longer.
    """
    names: dict[tuple[int, int], str] = {}
    for prefix, module in model.named_modules():
        for name, drawn in drawn_attributes(module):
            names.setdefault((drawn.stream, drawn.member), f"{prefix}.{name}".lstrip("."))
    return names


def attach(module: nn.Module, name: str, drawn: Drawn) -> None:
    """Parametrize one attribute, and drop the parameter that it replaces."""
    before: Any = type(module)
    parametrize.register_parametrization(module, name, nn.Identity(), unsafe=True)
    if type(module) is not before:
        for method in (_refusing_pickle, _registering(before), _loading(before)):
            setattr(type(module), method.__name__, method)
        module._parameters = _Parameters(module._parameters)
        if "__deepcopy__" in vars(type(module)):  # torch's; others have their own
            setattr(type(module), "__deepcopy__", _copy)  # noqa: B010
    holder: Any = getattr(module, "parametrizations")[name]  # noqa: B009
    original = holder.original
    del holder.original
    holder.register_buffer("original", original.detach().new_empty(0), persistent=False)
    holder[0] = drawn
    holder.__class__ = DrawnWeight
    if isinstance(module, nn.RNNBase):
        _forget_flat_weights(module)


def detach(module: nn.Module, name: str, weight: nn.Parameter, siblings: tuple[str, ...]) -> None:
    """Give a module a parameter for an attribute that is drawn."""
    # torch removes the property from the class, which copies of the module share.
    own = {key: value for key, value in vars(type(module)).items() if key not in ("__dict__", "__weakref__")}
    module.__class__ = cast("type[nn.Module]", type(type(module).__name__, type(module).__bases__, own))
    holder: Any = getattr(module, "parametrizations")[name]  # noqa: B009
    holder.__class__ = parametrize.ParametrizationList
    del holder.original
    holder.register_parameter("original", weight)
    holder[0] = nn.Identity()
    parametrize.remove_parametrizations(module, name, leave_parametrized=False)
    for sibling in siblings:
        if sibling in module._parameters:
            module._parameters[sibling] = module._parameters.pop(sibling)
    if not drawn_attributes(module):
        module._parameters = dict(module._parameters)
    if isinstance(module, nn.RNNBase):
        _forget_flat_weights(module)


def _forget_flat_weights(module: nn.RNNBase) -> None:
    """Drop the list that a recurrent module has of its weights; it makes another one when it runs.

    Drawn weights belong to the graph of a forward pass, which cannot be copied.
    """
    module._flat_weights = [None] * len(module._flat_weights_names)


def _copy(module: nn.Module, memo: dict[Any, Any]) -> nn.Module:
    """`copy.deepcopy`: with its whole model a module stays drawn; by itself it becomes an ordinary one.

    A part cannot share the posteriors of the rest: what copies modules to train them by themselves, as PEFT's
    modules_to_save does, gets parameters at the means.
    """
    if isinstance(module, nn.RNNBase):
        _forget_flat_weights(module)
    copy.deepcopy(vars(module).get(ATTRIBUTE), memo)  # of the model itself
    held = drawn_attributes(module)
    means = {name: _copied_mean(drawn, memo) for name, drawn in held if not _is_copied(drawn, memo)}
    twin = memo[id(module)] = module.__new__(type(module))
    twin.__dict__ = copy.deepcopy(module.__dict__, memo)
    for name, drawn in held:
        if name in means:
            detach(twin, name, means[name], drawn.siblings)
    return twin


def guard_wrappers(model: nn.Module) -> None:
    """Have wrappers copied as themselves: PEFT's hand on attributes, and so the method by which what they
    wrap is copied.
    """
    for module in model.modules():
        method = getattr(module, "__deepcopy__", None)
        if getattr(method, "__self__", module) is not module:
            vars(module)["__deepcopy__"] = MethodType(_copy_wrapper, module)


def unguard_wrapper(module: nn.Module) -> None:
    """Undo `guard_wrappers`."""
    if getattr(vars(module).get("__deepcopy__"), "__func__", None) is _copy_wrapper:
        del vars(module)["__deepcopy__"]


def _copy_wrapper(module: nn.Module, memo: dict[Any, Any]) -> nn.Module:
    twin = memo[id(module)] = module.__new__(type(module))
    twin.__dict__ = copy.deepcopy(module.__dict__, memo)
    return twin


def _is_copied(drawn: Drawn, memo: dict[Any, Any]) -> bool:
    """Whether the variational part of the model was copied before, as the first of it all."""
    variational = drawn.holder[0]
    return memo.get(id(variational), variational) is not variational


def _copied_mean(drawn: Drawn, memo: dict[Any, Any]) -> nn.Parameter:
    """A parameter at the mean, one for tied weights; the posterior itself is not copied."""
    variational, stream = drawn.holder[0], drawn.holder[0].streams[drawn.stream]
    memo[id(variational)], memo[id(stream)] = variational, stream
    key = ("mean", id(variational), drawn.stream, drawn.member)
    if key not in memo:
        learns = any(parameter.requires_grad for parameter in stream.parameters())
        memo[key] = nn.Parameter(variational.mean(drawn.stream, drawn.member), learns)
    return memo[key]


def _refusing_pickle(module: nn.Module) -> NoReturn:
    """`pickle` and `torch.save` of a module."""
    raise WrittenWeightError(
        f"{type(module).__name__}: expected a module without posteriors to pickle, found one with them; save "
        "model.state_dict(), or pickle posterior_mean(model)"
    )


_refusing_pickle.__name__ = "__getstate__"


def _registering(before: type[nn.Module]) -> Callable[..., None]:
    def register_parameter(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        """What assigning a parameter does, or pruning the weight."""
        if name in dict(drawn_attributes(self)):
            raise WrittenWeightError(
                f"{name} of {before.__name__}: expected a tensor to set the posterior's mean to, found a "
                "parameter, which it cannot be; assign its values (parameter.detach()), or tie and replace "
                f"weights {_ORDINARY}"
            )
        if isinstance(param, Tensor) and not isinstance(param, nn.Parameter):
            raise WrittenWeightError(
                f"{name} of {before.__name__}: expected a parameter, found the weight of a posterior; prune, "
                f"normalize and convert modules {_ORDINARY}"
            )
        before.register_parameter(self, name, param)

    return register_parameter


def _loading(before: Any) -> Callable[..., None]:
    def _load_from_state_dict(self: Any, state: dict[str, Any], prefix: str, *arguments: Any) -> None:
        """A state of the ordinary module has weights under their own names: means are set to them."""
        for name, drawn in drawn_attributes(self):
            weight = state.pop(f"{prefix}{name}", None)
            if weight is not None:
                member = drawn.holder[0].streams[drawn.stream].members[drawn.member]
                chain = self.parametrizations[name]
                setattr(self, name, weight.to(chain.original.device, member.dtype))
                state |= chain.state_dict(prefix=f"{prefix}parametrizations.{name}.")
        before._load_from_state_dict(self, state, prefix, *arguments)

    return _load_from_state_dict
