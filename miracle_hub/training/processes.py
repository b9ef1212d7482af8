"""The processes of a distributed run: the first codes and writes, all end alike, with results or an error."""

import itertools
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as distributed
from torch import Tensor, nn

from miracle_hub import errors
from miracle_hub.errors import MiracleError, ProcessError

T = TypeVar("T")
_TEXT_BYTES = 1000  # of an error; the rest is in the output of the process that raised it
_NOTE_BYTES = 8 * _TEXT_BYTES  # of what processes tell one another: JSON has up to six for one
# A choice: so long one that failed waits for the others to hear of it before it ends, as they may be in the
# middle of a step, or of a collective operation that will not come to its end.
_FAREWELL = timedelta(seconds=20)
_PATIENCE = timedelta(hours=12)  # a choice: so long a file may take to be written
_RUNS = itertools.count()
_CALLS: Counter[str] = Counter()  # of `written_once`, by path and contents


class Processes:
    """The processes that work on one model; one, where there is no distributed run.

    What they tell one another goes through a group of its own, on the CPU: a process that fails in the middle
    of somebody else's collective operation is heard nevertheless.

    Attributes:
        rank: of this process; 0 is the first.
        count: of all.
    """

    def __init__(self, rank: int = 0, count: int = 1, group: Any = None, run: int = 0) -> None:
        self.rank, self.count, self.group = rank, count, group
        self._failure = f"miracle_hub/{run}/failure"

    @property
    def is_first(self) -> bool:
        """Whether this one codes, and writes files."""
        return self.rank == 0

    @contextmanager
    def together(self) -> Iterator[None]:
        """A block without communication: an error in one process is one in all.

        Raises:
            MiracleError: of the kind that another process raised, with its number.
            ProcessError: another one raised an error of another kind, or has ended.
        """
        try:
            yield
        except Exception as error:
            self._say(error)
            raise
        self.gathered()

    def gathered(self, value: float = 0.0) -> list[float]:
        """A number of every process, in their order.

        Raises:
            MiracleError: as `together`.
        """
        if self.count == 1:
            return [value]
        notes = self._exchanged({"value": value})
        for note in notes:
            if "kind" in note:
                raise self._error_of(note)
        return [note["value"] for note in notes]

    def mean(self, value: float) -> float:
        """The mean over all processes."""
        return sum(self.gathered(value)) / self.count

    def require_one(self, number: int, what: str) -> None:
        """
        Args:
            number: of what all processes must have equal, below 2^53.
            what: it is; what to do.

        Raises:
            ProcessError: numbers differ.
        """
        if (n_kinds := len(set(self.gathered(number)))) > 1:
            raise ProcessError(
                f"process {self.rank} of {self.count}: expected one, found {n_kinds} kinds of {what}"
            )

    def in_turn(self, make: Callable[[], T]) -> T:
        """What each process makes, the first one before the others, who find what it has cached."""
        made: list[T] = []
        for is_turn in (self.is_first, not self.is_first):
            with self.together():
                if is_turn:
                    made.append(make())
        return made[0]

    def first(self, value: T) -> T:
        """What the first process has, in all of them."""
        if self.count == 1:
            return value
        box: list[Any] = [value]
        with self._answered():
            distributed.broadcast_object_list(box, 0, self.group)
        return box[0]

    def every(self, value: T) -> list[T]:
        """What every process has, in their order: objects that can be pickled."""
        found: list[Any] = [value] * self.count
        if self.count > 1:
            with self._answered():
                distributed.all_gather_object(found, value, self.group)
        return found

    def make_equal(self, tensors: Iterable[Tensor]) -> None:
        """Give every process the values of the first one, in place."""
        if self.count > 1:
            with self._answered():
                for tensor in {id(t): t for t in tensors if t.numel()}.values():
                    self._broadcast(tensor.detach())

    def _broadcast(self, tensor: Tensor) -> None:
        # As bytes: not every backend knows every dtype.
        raw = tensor.contiguous().reshape(-1).view(torch.uint8)
        distributed.broadcast(raw, 0, self._group_of(tensor))
        if not tensor.is_contiguous():
            tensor.copy_(raw.view(tensor.dtype).view(tensor.shape))

    def average(self, parameters: Sequence[nn.Parameter]) -> None:
        """Gradients become their means over all processes; one that others lack counts as 0 there."""
        if self.count == 1:
            return
        with self._answered():
            has = torch.tensor([p.grad is not None for p in parameters], dtype=torch.uint8)
            distributed.all_reduce(has, distributed.ReduceOp.MAX, self.group)
            used = [p for p, has_gradient in zip(parameters, has.tolist(), strict=True) if has_gradient]
            for parameter in used:
                grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                parameter.grad = grad.div(self.count).contiguous()
            sums = [
                distributed.all_reduce(p.grad, group=self._group_of(p), async_op=True)
                for p in used
                if p.grad is not None
            ]
            for work in sums:
                if work is not None:
                    work.wait()

    def add(self, sums: Tensor) -> None:
        """Add up a tensor of every process, in place."""
        if self.count > 1:
            with self._answered():
                distributed.all_reduce(sums, group=self._group_of(sums))

    def _group_of(self, tensor: Tensor) -> Any:
        """Tensors of a GPU go where the run's own go."""
        return self.group if tensor.device.type == "cpu" else None

    def _say(self, error: Exception) -> None:
        """Let the others know of an error, wherever they are."""
        if self.count > 1:
            note = self.note_of(error)
            with suppress(RuntimeError):  # those that are gone need not hear of it
                _store().set(self._failure, json.dumps(note))
                self._exchanged(note, _FAREWELL)

    def note_of(self, error: Exception) -> dict[str, Any]:
        """What others are told of an error."""
        text = str(error).encode(errors="replace")[:_TEXT_BYTES].decode(errors="ignore")
        return {"kind": type(error).__name__, "text": text, "rank": self.rank}

    def told(self, key: str, what: str) -> Any:
        """What another process leaves under a key.

        Raises:
            MiracleError: it raised one. ProcessError: it leaves nothing.
        """
        try:
            _store().wait([key], _PATIENCE)
            note = json.loads(_store().get(key))
        except RuntimeError as error:
            raise ProcessError(
                f"process {self.rank} of {self.count}: expected {what}, found that it did not "
                f"({str(error)[:200]}); call this in all processes, or in the first alone"
            ) from error
        if "kind" in note:
            raise self._error_of(note)
        return note["value"]

    def _exchanged(self, note: dict[str, Any], limit: timedelta | None = None) -> list[dict[str, Any]]:
        """What every process says."""
        text = json.dumps(note).encode("ascii")
        own = torch.zeros(_NOTE_BYTES, dtype=torch.uint8)
        own[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        said = [torch.empty_like(own) for _ in range(self.count)]
        with self._answered():
            work = distributed.all_gather(said, own, self.group, async_op=True)
            assert work is not None
            work.wait() if limit is None else work.wait(limit)
        return [json.loads(x.numpy().tobytes().rstrip(b"\0")) for x in said]

    @contextmanager
    def _answered(self) -> Iterator[None]:
        """
        Raises:
            MiracleError: another process has said why it ends. ProcessError: it has not.
        """
        try:
            yield
        except RuntimeError as error:
            note = None
            with suppress(RuntimeError):  # it may be gone too
                if _store().check([self._failure]):
                    note = json.loads(_store().get(self._failure))
            if note is not None:
                raise self._error_of(note) from error
            raise ProcessError(
                f"process {self.rank} of {self.count}: expected an answer of the others, found none "
                f"({str(error)[:200]}); one of them has ended, or hangs: look at what it says, and run again"
            ) from error

    def _error_of(self, note: dict[str, Any]) -> MiracleError:
        kind, where = getattr(errors, note["kind"], None), f"process {note['rank']} of {self.count}"
        if isinstance(kind, type) and issubclass(kind, MiracleError):
            return kind(f"{where}: {note['text']}")
        return ProcessError(
            f"{where}: expected no error, found {note['kind']}: {note['text']}; mend it there, and run all "
            "processes again"
        )


def written_once(path: Path, number: int, write: Callable[[], T]) -> T:
    """Have the first process write a file; others that come here wait for it, and get what it has.

    The first waits for nobody: scripts may call this in it alone.

    Args:
        number: of the contents, which the processes have equal.
        write: what it returns has to be JSON.

    Raises:
        MiracleError: of the kind that the first process raised.
        ProcessError: it does not come here, or has ended.
    """
    processes = Processes() if not _is_distributed() else Processes(*_place())
    if processes.count == 1:
        return write()
    key = f"{Path(path).absolute()}/{number}"
    _CALLS[key] += 1
    key = f"miracle_hub/written/{key}/{_CALLS[key]}"
    if not processes.is_first:
        return processes.told(key, f"the first one to write {path}")
    try:
        found = write()
    except Exception as error:
        _store().set(key, json.dumps(processes.note_of(error)))
        raise
    _store().set(key, json.dumps({"value": found}))
    return found


def n_launched() -> int:
    """How many processes torchrun, or accelerate launch, has started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _is_distributed() -> bool:
    return distributed.is_available() and distributed.is_initialized()


def _place() -> tuple[int, int]:
    """The number of this process, and how many there are."""
    return distributed.get_rank(), distributed.get_world_size()


@contextmanager
def all_processes(alone: bool = False) -> Iterator[Processes]:
    """The processes of the distributed run that this one is in; all of them have to come here.

    Args:
        alone: leave the others out.

    Raises:
        ProcessError: the others do not come.
    """
    rank, count = (0, 1) if alone or not _is_distributed() else _place()
    if count == 1:
        yield Processes()
        return
    try:
        group: Any = distributed.new_group(backend="gloo")
    except RuntimeError as error:
        raise ProcessError(
            f"process {rank} of {count}: expected all processes here, found that some do not come "
            f"({str(error)[:200]}); call this in all of them"
        ) from error
    try:
        yield Processes(rank, count, group, next(_RUNS))
    finally:
        distributed.destroy_process_group(group)


def _store() -> Any:
    """Where processes of a run leave notes that the others need not wait for."""
    return distributed.distributed_c10d._get_default_store()
