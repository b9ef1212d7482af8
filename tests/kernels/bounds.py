"""Every address that a kernel reads or writes must lie in a tensor that the launch was given.

A GPU may not notice a read past the end of a tensor, and the interpreter never does: the values are
masked later. So the interpreter's loads and stores are checked here.
"""

from typing import Any

import numpy as np
import pytest
import torch

_WORD = 4  # Messages are read in aligned words.


def check_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make Triton's interpreter raise on the first address outside the launch's tensors."""
    from triton.runtime import interpreter

    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    load, store, launch = builder.create_masked_load, builder.create_masked_store, executor.__call__
    tensors: list[tuple[int, int]] = []

    def check(pointers: Any, mask: Any) -> None:
        addresses = np.asarray(pointers.data).astype(np.int64)
        active = addresses[np.broadcast_to(np.asarray(mask.data), addresses.shape).astype(bool)]
        size = pointers.get_element_ty().primitive_bitwidth // 8
        inside = np.zeros(active.shape, bool)
        for start, stop in tensors:
            inside |= (active >= start) & (active + size <= stop)
        assert inside.all(), f"{(~inside).sum()} of {active.size} addresses are outside all tensors"

    def checked_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        check(pointers, mask)
        return load(self, pointers, mask, *rest)

    def checked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        check(pointers, mask)
        return store(self, pointers, value, mask, *rest)

    def checked_launch(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
        tensors[:] = [extent(tensor) for tensor in given]
        return launch(self, *args, **kwargs)

    monkeypatch.setattr(builder, "create_masked_load", checked_load)
    monkeypatch.setattr(builder, "create_masked_store", checked_store)
    monkeypatch.setattr(executor, "__call__", checked_launch)


def extent(tensor: torch.Tensor) -> tuple[int, int]:
    """Start and end of what a kernel may touch of a tensor."""
    start = tensor.data_ptr()
    stop = start + tensor.numel() * tensor.element_size()
    if tensor.dtype == torch.uint8:
        return start // _WORD * _WORD, -(-stop // _WORD) * _WORD
    return start, stop
