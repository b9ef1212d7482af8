"""Called by `import torch` through the entry-point group "torch.backends".

Arms hooks that register the plug-in the moment transformers' quantizers, or PEFT's readers, are imported, so
that plain `from_pretrained` works with nothing of this package imported. An exception here would break
`import torch`, so this file imports the standard library only and does next to nothing.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
import warnings
from collections.abc import Callable, Sequence

# Registration needs the first module complete. If that one is being imported right now (it imports
# torch, which calls us), the second is the next that every `from_pretrained` needs.
_TARGETS = ("transformers.quantizers.auto", "transformers.modeling_utils")
_LAST_NAME = "register_quantizer"  # one of the last names that the first target defines
_PEFT, _LAST_OF_PEFT = "peft.utils.save_and_load", "load_peft_weights"
_PLUG_IN = "miracle_hub.plugin.quantizer"


def _register() -> None:
    """Register, or say why not: an installation this plug-in cannot serve must still import transformers."""
    if _PLUG_IN in sys.modules and not hasattr(sys.modules[_PLUG_IN], "register"):
        return  # The plug-in is what imports transformers right now; it registers itself at its end.
    try:
        from miracle_hub.plugin.quantizer import register

        register()
    except Exception as error:
        warnings.warn(
            f"miracle-hub could not register with transformers ({error!r}): compressed repositories will "
            "not load; pip install -U miracle-hub transformers",
            RuntimeWarning,
            stacklevel=2,
        )


def _register_adapters() -> None:
    """The same with PEFT."""
    try:
        from miracle_hub.plugin.adapters import register

        register(sys.modules[_PEFT])
    except Exception as error:
        warnings.warn(
            f"miracle-hub could not register with PEFT ({error!r}): compressed adapters will not load; "
            "pip install -U miracle-hub peft transformers, or decompress them (miracle decompress)",
            RuntimeWarning,
            stacklevel=2,
        )


class _PostImport(importlib.abc.MetaPathFinder):
    """Finds one module as usual, and registers the plug-in once it has been executed."""

    def __init__(self, target: str, register: Callable[[], None]) -> None:
        self.target, self.register = target, register
        self.searching = False

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != self.target or self.searching:
            return None
        self.searching = True
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self.searching = False
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_register(module: types.ModuleType) -> None:
            execute(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            self.register()

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def activate() -> None:
    """Register now with what is already there, else as soon as it is."""
    _activate(_TARGETS, _LAST_NAME, _register)
    _activate((_PEFT,), _LAST_OF_PEFT, _register_adapters)


def _activate(targets: Sequence[str], last_name: str, register: Callable[[], None]) -> None:
    if hasattr(sys.modules.get(targets[0]), last_name):
        register()
    elif not any(isinstance(finder, _PostImport) and finder.register is register for finder in sys.meta_path):
        missing = [target for target in targets if target not in sys.modules]
        sys.meta_path.insert(0, _PostImport(missing[0] if missing else targets[0], register))
