"""How a function becomes a torch op of this package's namespace."""

from typing import Any, Callable

from torch.library import CustomOpDef, custom_op  # pyright: ignore[reportPrivateImportUsage]

try:
    from ._ops import add_op_namespace_prefix  # pyright: ignore[reportMissingImports]
except ModuleNotFoundError:  # _ops.py exists in kernel builds only, each with a namespace of its own

    def add_op_namespace_prefix(op_name: str) -> str:
        """The op's full name when the package is imported as it is."""
        return f"miracle_kernels::{op_name}"


def register(name: str, *, triton: Callable, reference: Callable, fake: Callable, mutates=()) -> CustomOpDef:
    """An op that runs `triton` on a GPU and `reference` on a CPU.

    Args:
        fake: shapes and dtypes of the result, for torch.compile.
        mutates: names of the arguments that are written.
    """
    op: Any = custom_op(add_op_namespace_prefix(name), triton, mutates_args=mutates, device_types="cuda")
    op.register_kernel("cpu")(reference)
    op.register_fake(fake)
    op.__doc__ = triton.__doc__
    return op
