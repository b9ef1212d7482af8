"""Scripts of kernels/ as modules: the folder is on no path, as `kernels` is somebody else's package."""

import importlib.util
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

KERNELS = Path(__file__).parents[2] / "kernels"


@cache
def script(name: str) -> ModuleType:
    """kernels/NAME.py."""
    spec = importlib.util.spec_from_file_location(f"_miracle_kernel_{name}", KERNELS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
