"""Triton's interpreter without what it does again and again: the kernels' tests take a third less time.

It patches triton.language before every launch, which is needed, and again before every call of a device
function, which changes nothing within a launch; and it makes a table of dtypes whenever it looks one up.
Both are a third of its time. Nothing here changes what a kernel computes.
"""

from typing import Any

import triton.language as tl
from triton.runtime import interpreter

_patch = interpreter._patch_lang
_launch = interpreter.GridExecutor.__call__
_find_dtype = interpreter._get_np_dtype
# numpy dtypes of Triton's types, by name.
_dtypes: dict[str, Any] = {}
# Globals of functions, by identity, whose language modules are patched in the launch that goes on.
_patched: set[int] = set()


def _patch_once(function: Any) -> Any:
    key = id(function.__globals__)
    if key in _patched:
        return None  # of a device function, which does not restore anything
    _patched.add(key)
    return _patch(function)


def _launch_anew(self: Any, *args: Any, **kwargs: Any) -> Any:
    _patched.clear()
    return _launch(self, *args, **kwargs)


def _dtype_once(kind: Any) -> Any:
    element: Any = kind.element_ty if isinstance(kind, tl.block_type) else kind
    if element.name not in _dtypes:
        _dtypes[element.name] = _find_dtype(element)
    return _dtypes[element.name]


def make_faster() -> None:
    """For this process; once is enough."""
    interpreter._patch_lang = _patch_once
    interpreter.GridExecutor.__call__ = _launch_anew  # pyright: ignore[reportAttributeAccessIssue]
    interpreter._get_np_dtype = _dtype_once
