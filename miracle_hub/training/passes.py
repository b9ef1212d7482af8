"""Where a forward pass of a variational model begins and ends, whoever calls it, and by which method.

Hooks run where a module is called, but wrappers such as PEFT's call its `forward`.
"""

import functools
import inspect
from collections.abc import Callable
from types import MethodType
from typing import Any, Protocol

import torch
from torch import nn

from miracle_hub.training.wrapping import Streams, check_pass, with_penalty

ATTRIBUTE = "_miracle"  # where a model has its variational part, in a tuple: it is no child to be run
_BEFORE = "_miracle_forward"  # the forward that an instance had of its own


class Part(Streams, Protocol):
    """What is told of passes."""

    n_passes: int  # that have begun, and not ended

    def begin_pass(self, training: bool) -> None:
        """Called before every pass of a model in that mode."""
        ...


def install(model: nn.Module, part: Part) -> None:
    """Have a model's passes told to a part of it."""
    own = vars(model)
    rest = dict(own)
    own.clear()
    own[ATTRIBUTE] = (part,)  # the first to be copied, so that modules know that all of the model is
    own.update(rest)
    if "forward" in rest:
        own[_BEFORE] = rest["forward"]
    own["forward"] = MethodType(_telling(model, "forward" in rest), model)


def uninstall(model: nn.Module) -> None:
    """Have passes told no longer."""
    own = vars(model)
    del own[ATTRIBUTE], own["forward"]
    if _BEFORE in own:
        own["forward"] = own.pop(_BEFORE)


def _telling(model: Any, has_own: bool) -> Callable[..., Any]:
    """A forward for the instance, with the signature that it had, and no wrapper to be taken off."""

    def forward(self: Any, *arguments: Any, **keywords: Any) -> Any:
        run = getattr(self, _BEFORE) if has_own else functools.partial(type(self).forward, self)
        part = getattr(self, ATTRIBUTE)[0]
        part.begin_pass(self.training)
        if torch.compiler.is_compiling():
            return run(*arguments, **keywords)
        check_pass(self, part)
        part.n_passes += 1
        try:
            return with_penalty(part, run(*arguments, **keywords))
        finally:
            part.n_passes -= 1

    before = model.forward
    functools.update_wrapper(forward, before)
    del vars(forward)["__wrapped__"]
    itself = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    try:
        signature = inspect.signature(before)
    except ValueError:  # a forward in C
        return forward
    given = [p.replace(kind=p.kind) for p in signature.parameters.values()]
    forward.__signature__ = signature.replace(parameters=[itself, *given])  # pyright: ignore
    return forward
