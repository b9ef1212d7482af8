"""A kernel's statements → what the machine executes: numbered registers, operations and operands.

Numbers and special registers are registers too, which are filled before a program starts.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.kernels.device.build import library
from tests.kernels.device.ptx import Kernel, Statement, UnknownPTX

# The fields of `Instruction` in machine/machine.h.
_SMALL = "operation guard unless operands n_targets n_sources jump bytes items flags".split()
INSTRUCTION = np.dtype([*((name, "<i4") for name in _SMALL), ("offset", "<i8"), ("second_offset", "<i8")])
# `Preset` in machine/schedule.cpp.
_NUMBER = 0
_SPECIAL = {
    "%tid.x": 1, "%laneid": 2, "%ctaid.x": 3, "%ctaid.y": 4, "%ctaid.z": 5,
    "%nctaid.x": 6, "%nctaid.y": 7, "%nctaid.z": 8,
}  # fmt: skip
# An address that shared memory may have on every GPU: as aligned as any matrix wants it.
SHARED_START = 1024
# Order memory for other programs, or wait for an earlier kernel: nothing to a launch that is alone.
_WITHOUT_EFFECT = (
    "wgmma.fence",
    "griddepcontrol",
    "fence.mbarrier_init",
    "fence.acq_rel",
    "membar",
    "prefetch",
)
_A_IN_REGISTERS, _A_TRANSPOSED, _B_TRANSPOSED = 1, 2, 4
# Special registers that are not told above have a dot in their names, or end in a word.
_REGISTER = re.compile(r"%(r|rd|rs|rh|f|fd|h|hh|p|b|q)\d+|[%a-z_]\w*#\d+|_")
_NUMERIC = re.compile(r"(-?)(0[xX][0-9a-fA-F]+|\d+)U?")
_ADDRESS = re.compile(r"\[\s*([^\s+\]]+)\s*(?:\+\s*(-?\w+)\s*)?\]")


@dataclass(frozen=True)
class Program:
    """What the machine executes.

    Args:
        presets: int64 [n, 3]: register, what it holds, the number if it is one.
        parameters: register, place among the kernel's parameters, offset in bytes.
    """

    kernel: Kernel
    code: NDArray[Any]
    operands: NDArray[np.int32]
    presets: NDArray[np.int64]
    parameters: tuple[tuple[int, int, int], ...]
    n_registers: int


def assemble(kernel: Kernel) -> Program:
    """The program of a kernel.

    Raises:
        UnknownPTX: an instruction or an operand is none that the machine knows.
    """
    assembler = _Assembler(kernel)
    for statement in kernel.statements:
        try:
            assembler.add(statement)
        except UnknownPTX as error:
            raise UnknownPTX(f"{kernel.name}, line {statement.line}: {statement}: {error}") from None
    return assembler.program()


def _operation(name: str) -> int:
    number = library().device_operation(name.encode())
    if number < 0:
        raise UnknownPTX(f"no operation {name}")
    return number


class _Assembler:
    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.places = {name: place for place, (_, name) in enumerate(kernel.parameters)}
        self.registers: dict[str, int] = {}
        self.presets: list[tuple[int, int, int]] = []
        self.parameters: list[tuple[int, int, int]] = []
        self.rows: list[tuple[int, ...]] = []
        self.operands: list[int] = []
        self.statement = kernel.statements[0]

    def program(self) -> Program:
        return Program(
            self.kernel,
            np.array(self.rows, INSTRUCTION),
            np.array(self.operands, np.int32),
            np.array(self.presets, np.int64).reshape(-1, 3),
            tuple(self.parameters),
            len(self.registers),
        )

    def add(self, statement: Statement) -> None:
        self.statement = statement
        words = statement.name.replace("::", ".").split(".")
        if statement.name.startswith(_WITHOUT_EFFECT):
            return self.emit("nothing")
        special = getattr(self, f"add_{words[0]}", None)
        if special is not None:
            return special(words, statement.operands)
        return self.add_plain(words, statement.operands)

    def emit(
        self,
        operation: str,
        targets: Sequence[int] = (),
        sources: Sequence[int] = (),
        **fields: int,
    ) -> None:
        """One instruction; fields are those of INSTRUCTION that are not 0."""
        guard = self.register(self.statement.guard) if self.statement.guard else -1
        fixed = dict(
            operation=_operation(operation), guard=guard, unless=int(self.statement.unless),
            operands=len(self.operands), n_targets=len(targets), n_sources=len(sources),
        )  # fmt: skip
        self.operands += [*targets, *sources]
        self.rows.append(tuple((fixed | fields).get(name, 0) for name in INSTRUCTION.names or ()))

    def register(self, operand: str) -> int:
        """The number of a register, or of one that holds what the operand stands for."""
        number = self.registers.get(operand)
        if number is None:
            number = self.registers[operand] = len(self.registers)
            self.preset(number, operand)
        return number

    def preset(self, number: int, operand: str) -> None:
        if operand in _SPECIAL:
            self.presets.append((number, _SPECIAL[operand], 0))
        elif operand == "global_smem":
            self.presets.append((number, _NUMBER, SHARED_START))
        elif found := re.fullmatch(r"0[fF]([0-9a-fA-F]{8})", operand):
            self.presets.append((number, _NUMBER, int(found[1], 16)))
        elif found := _NUMERIC.fullmatch(operand):
            value = int(found[2], 0) * (-1 if found[1] else 1) & (2**64 - 1)
            self.presets.append((number, _NUMBER, value - 2**64 if value >> 63 else value))
        elif operand in ("true", "false"):
            self.presets.append((number, _NUMBER, int(operand == "true")))
        elif not _REGISTER.fullmatch(operand):
            raise UnknownPTX(f"no operand {operand}")

    def vector(self, operand: str) -> list[int]:
        """Registers of {…}, or of one alone. `_` takes what nobody wants."""
        names = operand[1:-1].split(",") if operand.startswith("{") else [operand]
        return [self.register(name.strip()) for name in names]

    def address(self, operand: str) -> tuple[int, int]:
        """Register and offset of [register + offset]."""
        found = _ADDRESS.fullmatch(operand)
        if found is None:
            raise UnknownPTX(f"no address {operand}")
        return self.register(found[1]), int(found[2] or "0", 0)

    # What an instruction's first word means, where operands are more than a target and its sources.

    def add_plain(self, words: list[str], operands: tuple[str, ...]) -> None:
        if words[0] in ("add", "sub", "mul") and words[1:2] == ["rn"]:  # the only rounding there is here
            words = [words[0], *words[2:]]
        target, _, second = operands[0].partition("|")
        if second and second != "_":
            raise UnknownPTX("a second target")
        sources = [self.register(operand) for operand in operands[1:]]
        self.emit(".".join(words), [self.register(target)], sources)

    def add_mov(self, words: list[str], operands: tuple[str, ...]) -> None:
        to, source = operands
        if to.startswith("{"):
            self.emit(f"unpack.{words[1]}", self.vector(to), self.vector(source))
        elif source.startswith("{"):
            self.emit(f"pack.{words[1]}", self.vector(to), self.vector(source))
        else:
            self.add_plain(words, operands)

    def add_bra(self, words: list[str], operands: tuple[str, ...]) -> None:
        self.emit("bra", jump=self.kernel.labels[operands[-1]])

    def add_ret(self, words: list[str], operands: tuple[str, ...]) -> None:
        self.emit("ret")

    add_exit = add_ret

    def add_bar(self, words: list[str], operands: tuple[str, ...]) -> None:
        if words[1] == "warp":
            return self.emit("bar.warp.sync")
        if words[1:] != ["sync"] or operands != ("0",):
            raise UnknownPTX("a barrier of some warps")
        return self.emit("bar.sync")

    add_barrier = add_bar

    def add_ld(self, words: list[str], operands: tuple[str, ...]) -> None:
        targets, item = self.vector(operands[0]), _bytes_of(words[-1])
        if words[1] == "param":
            return self.add_parameter(targets, item, operands[1])
        source, offset = self.address(operands[1])
        return self.emit(
            f"ld.{_space(words)}", targets, [source], bytes=item, items=len(targets), offset=offset
        )

    def add_parameter(self, targets: list[int], item: int, operand: str) -> None:
        found = _ADDRESS.fullmatch(operand)
        if found is None or found[1] not in self.places or len(targets) > 1:
            raise UnknownPTX("no parameter")
        name, offset = f"{found[1]}+{found[2] or 0}", int(found[2] or "0", 0)
        if name not in self.registers:
            self.registers[name] = len(self.registers)
            self.parameters.append((self.registers[name], self.places[found[1]], offset))
        self.emit(f"mov.b{max(16, 8 * item)}", targets, [self.registers[name]])

    def add_st(self, words: list[str], operands: tuple[str, ...]) -> None:
        (to, offset), values = self.address(operands[0]), self.vector(operands[1])
        item = _bytes_of(words[-1])
        self.emit(f"st.{_space(words)}", [], [to, *values], bytes=item, items=len(values), offset=offset)

    def add_cp(self, words: list[str], operands: tuple[str, ...]) -> None:
        name = ".".join(words[:3])
        if name == "cp.async.wait_all" or name == "cp.async.commit_group":
            return self.emit(name)
        if name == "cp.async.wait_group":
            return self.emit(name, offset=int(operands[0], 0))
        if words[2] not in ("ca", "cg"):
            raise UnknownPTX("a copy of another kind")
        (to, offset), (source, second) = self.address(operands[0]), self.address(operands[1])
        given = [self.register(operand) for operand in operands[3:4]]
        size = int(operands[2], 0)
        return self.emit(
            "cp.async", [], [to, source, *given], bytes=size, offset=offset, second_offset=second
        )

    def add_createpolicy(self, words: list[str], operands: tuple[str, ...]) -> None:
        self.emit("mov.b64", [self.register(operands[0])], [self.register("0")])

    def add_fence(self, words: list[str], operands: tuple[str, ...]) -> None:
        if words[1:3] != ["proxy", "async"]:
            raise UnknownPTX("a fence of another kind")
        self.emit("fence.proxy.async")

    def add_ldmatrix(self, words: list[str], operands: tuple[str, ...]) -> None:
        source, offset = self.address(operands[1])
        self.emit(_matrices(words), self.vector(operands[0]), [source], offset=offset)

    def add_stmatrix(self, words: list[str], operands: tuple[str, ...]) -> None:
        to, offset = self.address(operands[0])
        self.emit(_matrices(words), [], [to, *self.vector(operands[1])], offset=offset)

    def add_mma(self, words: list[str], operands: tuple[str, ...]) -> None:
        if ".".join(words) != "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32":
            raise UnknownPTX("a product of another kind")
        sources = [register for operand in operands[1:] for register in self.vector(operand)]
        self.emit("mma.m16n8k16", self.vector(operands[0]), sources)

    def add_wgmma(self, words: list[str], operands: tuple[str, ...]) -> None:
        if words[1] in ("commit_group", "wait_group"):
            return self.emit(f"wgmma.{words[1]}", offset=int(operands[0], 0) if operands else 0)
        if not re.fullmatch(r"mma_async\.sync\.aligned\.m64n\d+k16\.f32\.f16\.f16", ".".join(words[1:])):
            raise UnknownPTX("a product of another kind")
        targets, a, b, adds, *rest = operands
        in_registers = a.startswith("{")
        signs, transposed = rest[:2], [word == "1" for word in rest[2:]]
        if signs != ["1", "1"]:
            raise UnknownPTX("a product with another sign")
        flags = _A_IN_REGISTERS if in_registers else _A_TRANSPOSED * transposed[0]
        flags |= _B_TRANSPOSED * transposed[-1]
        sources = [*self.vector(a), self.register(b), self.register(adds)]
        return self.emit("wgmma", self.vector(targets), sources, flags=flags)


def _bytes_of(word: str) -> int:
    return int(word.lstrip("abcdefghijklmnopqrstuvwxyz")) // 8


def _space(words: list[str]) -> str:
    space = next((word for word in words if word in ("global", "shared")), None)
    if space is None or "volatile" in words or "v8" in words:
        raise UnknownPTX("memory of another kind")
    return space


def _matrices(words: list[str]) -> str:
    """Such as ldmatrix.x4.trans."""
    number = next(word for word in words if re.fullmatch(r"x\d", word))
    return f"{words[0]}.{number}" + ".trans" * ("trans" in words)
