"""How a function becomes a torch op of this package's namespace, and how an op's arguments are named once."""

from functools import wraps
from inspect import Parameter, Signature
from typing import Any, Callable, TypeVar, get_type_hints

from torch.library import CustomOpDef, custom_op  # pyright: ignore[reportPrivateImportUsage]

try:
    from ._ops import add_op_namespace_prefix  # pyright: ignore[reportMissingImports]
except ModuleNotFoundError:  # _ops.py exists in kernel builds only, each with a namespace of its own

    def add_op_namespace_prefix(op_name: str) -> str:
        """The op's full name when the package is imported as it is."""
        return f"miracle_kernels::{op_name}"


Arguments = TypeVar("Arguments")
Result = TypeVar("Result")


def takes(
    arguments: type[Arguments], check: Callable[[Arguments], None]
) -> Callable[[Callable[[Arguments], Result]], Callable[..., Result]]:
    """Makes a function of one NamedTuple a function of the tuple's fields, which `check` sees first.

    So an op's arguments stand in one place, from which torch reads the op's schema too: the new function has
    the fields as its signature.
    """
    types = get_type_hints(arguments)
    defaults = getattr(arguments, "_field_defaults", {})
    parameters = [
        Parameter(
            name,
            Parameter.POSITIONAL_OR_KEYWORD,
            default=defaults.get(name, Parameter.empty),
            annotation=kind,
        )
        for name, kind in types.items()
    ]

    def decorate(function: Callable[[Arguments], Result]) -> Callable[..., Result]:
        @wraps(function)
        def unpacked(*args: Any, **kwargs: Any) -> Result:
            given = arguments(*args, **kwargs)
            check(given)
            return function(given)

        returned = get_type_hints(function)["return"]
        unpacked.__signature__ = Signature(parameters, return_annotation=returned)  # pyright: ignore
        return unpacked

    return decorate


def register(
    name: str, arguments: type, *, triton: Callable, reference: Callable, fake: Callable, mutates=()
) -> CustomOpDef:
    """An op that runs `triton` on a GPU and `reference` on a CPU; both are functions that `takes` made.

    Args:
        arguments: the NamedTuple that they were made for.
        fake: shapes and dtypes of the result by that tuple, for torch.compile.
        mutates: names of the arguments that are written.
    """
    op: Any = custom_op(add_op_namespace_prefix(name), triton, mutates_args=mutates, device_types="cuda")
    op.register_kernel("cpu")(reference)
    op.register_fake(lambda *args, **kwargs: fake(arguments(*args, **kwargs)))
    op.__doc__ = triton.__doc__
    return op
