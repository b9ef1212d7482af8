"""PTX text → the statements of its one kernel: PTX ISA, "Syntax". What they mean is program.py's."""

import re
from dataclasses import dataclass, field

_TOKEN = re.compile(
    r"""
    (?:\s|//[^\n]*|\.pragma[^;]*;)+
    | \.loc\s+(?P<file>\d+)\s+(?P<row>\d+)[^\n]*
    | \.reg\s+\.\w+\s+(?P<registers>[^;]+);
    | (?P<label>[$\w]+):(?!:)
    | (?P<brace>[{}])
    | (?P<statement>[^;{}]*(?:\{[^}]*\}[^;{}]*)*);
    """,
    re.VERBOSE,
)
_STATEMENT = re.compile(
    r"(?:@(?P<unless>!?)(?P<guard>\S+)\s+)?(?P<name>[\w.:]+)\s*(?P<operands>.*)", re.DOTALL
)
_OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*")
_ENTRY = re.compile(r"\.visible\s+\.entry\s+(\w+)\s*\((.*?)\)(.*?)\{", re.DOTALL)
_PARAMETER = re.compile(r"\.param\s+\.(\w+)\s[^,]*?(\w+)\s*(?:,|$)", re.DOTALL)
_COMMENT = re.compile(r"//[^\n]*")


class UnknownPTX(Exception):
    """Text that this machine does not know: an instruction to add to it, not a fault of a kernel."""


@dataclass(frozen=True)
class Statement:
    """One instruction.

    Args:
        name: with all its suffixes, such as "ld.global.v2.b32".
        operands: as they are written; registers of an inner block have a name of their own.
        guard: the predicate that must hold (or, `unless`, must not), or "".
        line: in the PTX text.
        source: file and line that Triton compiled it from, or "".
    """

    name: str
    operands: tuple[str, ...]
    guard: str
    unless: bool
    line: int
    source: str

    def __str__(self) -> str:
        guard = f"@{'!' * self.unless}{self.guard} " if self.guard else ""
        return f"{guard}{self.name} {', '.join(self.operands)}".strip()


@dataclass
class Kernel:
    """A kernel's name, its parameters (type and name), threads of a program, statements and labels."""

    name: str
    parameters: list[tuple[str, str]]
    n_threads: int
    statements: list[Statement] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)


def parse(text: str) -> Kernel:
    """The kernel in a module of PTX.

    Raises:
        UnknownPTX: there is none, or something in it is no instruction.
    """
    entry = _ENTRY.search(text)
    threads = entry and re.search(r"\.(?:reqntid|maxntid)\s+(\d+)", entry[3])
    if entry is None or threads is None:
        raise UnknownPTX("a module without an entry that says how many threads it has")
    kernel = Kernel(entry[1], _PARAMETER.findall(entry[2]), int(threads[1]))
    _Body(text, entry.end(), kernel).read()
    return kernel


class _Body:
    """What stands between a kernel's braces."""

    def __init__(self, text: str, start: int, kernel: Kernel) -> None:
        self.text, self.at, self.kernel = text, start, kernel
        self.line = text.count("\n", 0, start) + 1
        self.files = dict(re.findall(r'\.file\s+(\d+)\s+"([^"]+)"', text))
        self.source = ""
        self.blocks: list[dict[str, str]] = [{}]  # registers declared in each block that is open
        self.n_blocks = 0

    def read(self) -> None:
        while self.blocks:
            token = _TOKEN.match(self.text, self.at)
            if token is None:
                raise UnknownPTX(f"line {self.line}: {self.text[self.at : self.at + 60]!r}")
            self._take(token)
            self.line += self.text.count("\n", self.at, token.end())
            self.at = token.end()

    def _take(self, token: re.Match[str]) -> None:
        if token["file"]:
            file = self.files.get(token["file"], "").rsplit("/", 1)[-1]
            self.source = f"{file}:{token['row']}"
        elif token["registers"]:
            self._declare(token["registers"])
        elif token["label"]:
            self.kernel.labels[token["label"]] = len(self.kernel.statements)
        elif token["brace"] == "{":
            self.n_blocks += 1
            self.blocks.append({})
        elif token["brace"] == "}":
            self.blocks.pop()
        elif token["statement"]:
            start = self.line + self.text.count("\n", self.at, token.start("statement"))
            self._state(token["statement"], start)

    def _declare(self, names: str) -> None:
        """Names of inner blocks are used again and again; ranges such as %r<9> are the kernel's."""
        for name in re.split(r"\s*,\s*", names.strip()):
            if "<" not in name:
                self.blocks[-1][name] = f"{name}#{self.n_blocks}"

    def _state(self, text: str, line: int) -> None:
        found = _STATEMENT.fullmatch(_COMMENT.sub("", text).strip())
        if found is None or found["name"].startswith("."):
            raise UnknownPTX(f"line {line}: {text.strip()!r}")
        operands = tuple(self._renamed(operand.strip()) for operand in _OPERAND.findall(found["operands"]))
        guard = self._renamed(found["guard"] or "")
        self.kernel.statements.append(
            Statement(found["name"], operands, guard, bool(found["unless"]), line, self.source)
        )

    def _renamed(self, operand: str) -> str:
        declared = {name: own for block in self.blocks for name, own in block.items()}
        if not declared or not operand:
            return operand
        return re.sub(r"%?[A-Za-z_]\w*", lambda word: declared.get(word[0], word[0]), operand)
