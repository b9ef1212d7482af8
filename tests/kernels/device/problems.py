"""What a kernel did that it must not do, in words: kernel, instruction, line, program, thread, address."""

from dataclasses import dataclass

# In the order of `Kind` in machine/problems.h. {other} is a thread, a program, a size or a mask.
TEXTS = (
    "reads {other} bytes outside the tensors of the launch",
    "writes {other} bytes outside the tensors of the launch",
    "reads {other} bytes outside the program's shared memory",
    "writes {other} bytes outside the program's shared memory",
    "accesses {other} bytes at an address that is no multiple of it",
    "reads shared memory that nobody has written",
    "reads what thread {other} writes, with no barrier between them",
    "writes what thread {other} writes, with no barrier between them",
    "writes what thread {other} reads, with no barrier between them",
    "reads what program {other} writes in the same launch",
    "writes what program {other} writes in the same launch",
    "writes what program {other} reads in the same launch",
    "reads what an asynchronous copy may not have written yet",
    "writes what an asynchronous copy may still write",
    "writes what an asynchronous product may still read",
    "reads by the asynchronous proxy what thread {other} wrote, with no proxy fence between them",
    "is reached by some threads of its warp only, those of mask {other}",
    "takes a value from thread {other} of its warp, which does not take part",
    "waits for warp {other}, which has ended",
    "some instruction leaves other bytes than in another order of warps and programs",
    "has run for 2^32 instructions",
)
DIVERGED = 16


class DeviceFault(AssertionError):
    """A kernel did what it must not do; the text says what, and where."""


@dataclass(frozen=True)
class Problem:
    """One of them; `kind` is a place in TEXTS, `instruction` one in the kernel's statements."""

    kind: int
    instruction: int
    program: int
    thread: int
    address: int
    other: int

    def text(self, instruction: str) -> str:
        """In words, of an instruction that says where it stands."""
        other = f"{self.other & 0xFFFFFFFF:#010x}" if self.kind == DIVERGED else str(self.other)
        what = TEXTS[self.kind].format(other=other)
        where = f"program {self.program}, thread {self.thread}"
        where += f", address {self.address:#x}" if self.address else ""
        return f"{instruction} {what} ({where})"
