"""Triton kernels → PTX, as they would be compiled for a GPU, each once for every state of its sources."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from tests.kernels.device.build import KEPT
from tests.kernels.device.program import Program, assemble
from tests.kernels.device.ptx import parse
from tests.kernels.scripts import script


@dataclass(frozen=True)
class Compiled:
    """A kernel's program, the bytes of shared memory it asks for, and its arguments that are no constants."""

    program: Program
    shared_bytes: int
    names: tuple[str, ...]
    types: tuple[str, ...]


@lru_cache(1000)
def assembled(ptx: str) -> Program:
    """The program of a module of PTX."""
    return assemble(parse(ptx))


class Compiler:
    """Of one GPU.

    Args:
        change: what to do to every PTX text before it is executed; tests break kernels so.
    """

    def __init__(self, architecture: str, change: Callable[[str], str] = lambda text: text) -> None:
        self.target = GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)
        self.backend: Any = make_backend(self.target)  # its declared type says less than it has
        self.change = change
        self.binders: dict[JITFunction, Any] = {}
        self.compiled: dict[tuple[Any, ...], Compiled] = {}

    def __call__(
        self, kernel: Any, arguments: tuple[Any, ...], options: dict[str, Any]
    ) -> tuple[Compiled, dict[str, Any]]:
        """What a launch would run, and its arguments by name."""
        if kernel not in self.binders:
            self.binders[kernel] = create_function_from_signature(
                kernel.signature, kernel.params, self.backend
            )
        bound, specialization, extra = self.binders[kernel](*arguments, **options)
        told = {name: value for name, value in options.items() if not isinstance(value, torch.Tensor)}
        key = (kernel, str(specialization), str(told))
        if key not in self.compiled:
            chosen, signature, constants, attributes = kernel._pack_args(
                self.backend, options, bound, specialization, extra
            )
            found = self._kept(kernel, signature, constants, attributes, chosen)
            names = [name for name in bound if signature[name] != "constexpr"]
            self.compiled[key] = Compiled(
                assembled(self.change(found["ptx"])),
                found["shared_bytes"],
                tuple(names),
                tuple(str(signature[name]) for name in names),
            )
        return self.compiled[key], bound

    def _kept(
        self, kernel: Any, signature: dict[str, Any], constants: Any, attributes: Any, options: Any
    ) -> dict[str, Any]:
        source = ASTSource(kernel, signature, constants, attributes)
        # The hash is of the kernel's text and of all that it calls, of its types and its constants.
        name = json.dumps([source.hash(), repr(options), repr(self.target), triton.__version__])
        return script("sources").kept(KEPT / "ptx", name, lambda: self.compile(source, options))

    def compile(self, source: ASTSource, options: Any) -> dict[str, Any]:
        """What triton.compile does, up to PTX, and the bytes of shared memory."""
        context = ir.context()
        ir.load_dialects(context)
        self.backend.load_dialects(context)
        stages: dict[str, Any] = {}
        self.backend.add_stages(stages, options, source.language)
        functions = self.backend.get_codegen_implementation(options)
        made: Any = source.make_ir(self.target, options, functions, self.backend.get_module_map(), context)
        metadata: dict[str, Any] = {"target": self.target, **options.__dict__}
        for stage in ("ttir", "ttgir", "llir", "ptx"):
            made = stages[stage](made, metadata)
        code, _, _ = made.partition("\t.section")  # what follows is for debuggers
        return {"ptx": code, "shared_bytes": metadata["shared"]}
