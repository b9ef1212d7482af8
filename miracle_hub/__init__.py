"""A neural network as a small, exact file: minimal random code learning for Hugging Face models."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from miracle_hub._autoload import activate as _activate
from miracle_hub.config import Code as Code

if TYPE_CHECKING:
    from miracle_hub.codec.compress import Report as Report
    from miracle_hub.codec.inspection import Inspection as Inspection
    from miracle_hub.hub.api import compress as compress
    from miracle_hub.hub.api import decompress as decompress
    from miracle_hub.hub.api import inspect as inspect
    from miracle_hub.hub.api import load_state_dict as load_state_dict
    from miracle_hub.hub.quantizer import MiracleConfig as MiracleConfig

__all__ = [
    "Code",
    "Inspection",
    "MiracleConfig",
    "Report",
    "compress",
    "decompress",
    "inspect",
    "load_state_dict",
]
__version__ = "0.1.0"

# Imported on first use: transformers imports this package for everybody who has it installed, and
# numba alone takes half a second.
_HOMES = {
    "Inspection": "miracle_hub.codec.inspection",
    "MiracleConfig": "miracle_hub.hub.quantizer",
    "Report": "miracle_hub.codec.compress",
    "compress": "miracle_hub.hub.api",
    "decompress": "miracle_hub.hub.api",
    "inspect": "miracle_hub.hub.api",
    "load_state_dict": "miracle_hub.hub.api",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'miracle_hub' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


_activate()
