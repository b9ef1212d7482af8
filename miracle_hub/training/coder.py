"""Coding with refits: code a group of blocks, fix it, fit what is left to it, until everything is coded."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from miracle_hub.coding.cpu import decode_stream
from miracle_hub.coding.encode import encode_states, pack_states
from miracle_hub.coding.posterior import Cost
from miracle_hub.errors import OptionError, TrainingError
from miracle_hub.training.checkpoint import Checkpoint
from miracle_hub.training.curvature import measure_curvature
from miracle_hub.training.journal import Journal, Row
from miracle_hub.training.stream import Stream
from miracle_hub.training.variational import Snapshot, Variational, variational_of

_LEARNING_RATE = 3e-4
ORDERS = ("random", "largest-kl")
_CURVATURE_BATCHES = 16  # inputs of MiniLM's layers differ by factors of 5 to 50: a few hundred rows tell
# Steps of a sliding code that are searched beyond a group, in windows: survivors have merged by then.
_LOOK_AHEAD_WINDOWS = 16


@dataclass(frozen=True)
class CodingOptions:
    """How coding alternates with refits.

    Attributes:
        groups: how many groups the values of all streams are coded in. They get smaller, so that what is
            left can always make up for what was coded: after g of G groups a share of (1 - g/G)² is left.
        refit_steps: steps of the optimizer after every group but the last.
        learning_rate: of the refits' Adam; it falls from group to group, to a tenth. None means 3e-4, or what
            suits a Trainer.
        order: "random", a part of every stream in every group, blocks of a block code at random; or
            "largest-kl", streams one after the other, and blocks, by their KL.

    Raises:
        OptionError: an option is none.
    """

    groups: int = 60
    refit_steps: int = 60
    learning_rate: float | None = None
    order: str = "random"

    def __post_init__(self) -> None:
        if self.order not in ORDERS:
            raise OptionError(f"order: expected one of {ORDERS}, found {self.order!r}; choose one of them")
        are_counts = isinstance(self.groups, int) and isinstance(self.refit_steps, int)
        if not are_counts or self.groups < 1 or self.refit_steps < 0 or not 0 < self.rate() < math.inf:
            raise OptionError(
                "groups, refit_steps, learning_rate: expected at least one group, no negative number of "
                f"steps and a positive rate, found {self.groups}, {self.refit_steps} and {self.learning_rate}"
            )

    def rate(self) -> float:
        return _LEARNING_RATE if self.learning_rate is None else self.learning_rate


@dataclass(frozen=True)
class Run:
    """Steps of one stream that are coded together, in ascending order."""

    stream: int
    steps: Tensor


def code_model(
    model: nn.Module,
    loss: Callable[[int], Tensor] | None = None,
    *,
    options: CodingOptions | None = None,
    validate: Callable[[], float] | None = None,
    journal: Journal | None = None,
    checkpoint: Checkpoint | None = None,
    progress: bool = True,
) -> Journal:
    """Code everything that is variational in a model; afterwards its weights are those of the file.

    Args:
        loss: of the i-th batch of the refits, without the KL; the model is in training mode. It must give
            equal batches for equal i, or a resumed run ends elsewhere. The first ones are asked for once more
            at the beginning, where test channels measure the curvature. None means no refits.
        validate: called after every group, in evaluation mode; its value goes to the journal.
        checkpoint: where the state is kept, and found again by the next run with the same arguments.

    Raises:
        TrainingError: the loss or a gradient is not finite; nothing is changed by that step. Or an input of a
            layer is not; nothing is coded.
        OptionError: the checkpoint is that of another model, or of a run with other options; the learning
            rate may be another.
        FormatError: the checkpoint is damaged.
        OutputWriteError: the checkpoint or the journal cannot be written.

    Source: Havasi et al. 2019, algorithm 2.
    """
    was_training = model.training
    coder = _Coder(model, loss, options or CodingOptions(), journal or Journal())
    coder.start(checkpoint)
    with tqdm(total=coder.n_values, unit="values", unit_scale=True, desc="code", disable=not progress) as bar:
        while not coder.is_done():
            bar.update(coder.n_coded() - bar.n)
            coder.code_group(validate)
            coder.refit(bar)
        bar.update(coder.n_coded() - bar.n)
    coder.journal.finish()
    model.train(was_training)
    return coder.journal


class _Coder:
    """One coding run: its position is the number of the group and of the refit step inside it."""

    def __init__(
        self, model: nn.Module, loss: Callable[[int], Tensor] | None, options: CodingOptions, journal: Journal
    ) -> None:
        self.model, self.loss, self.options, self.journal = model, loss, options, journal
        self.variational: Variational = variational_of(model)
        self.streams = list(self.variational.streams)
        self.n_values = sum(stream.n_values for stream in self.streams)
        self.selection = self.variational.config.selection
        self.generator = torch.Generator().manual_seed(self.variational.config.seed)
        self.group, self.step, self.last_loss = 0, 0, math.nan
        self.checkpoint: Checkpoint | None = None
        # Modules that were frozen, as batch norms may be, while the model is trained.
        self.frozen = [module for module in model.modules() if model.training and not module.training]

    def start(self, checkpoint: Checkpoint | None) -> None:
        """Begin, or go on from a checkpoint, if there is one; or from a model that is coded in part."""
        self.checkpoint = checkpoint
        saved = None if checkpoint is None else checkpoint.read(self)
        if saved is None:
            self._measure_curvature()
        for stream in self.streams:
            stream.begin_coding()
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        # The usual eps of 1e-8 is 0 in float16.
        eps = max([1e-8, *(torch.finfo(p.dtype).tiny for p in parameters)])
        self.optimizer = torch.optim.Adam([{"params": parameters}], lr=self.options.rate(), eps=eps)
        if saved is not None:
            saved.restore(self)
            return
        share_left = 1 - self.n_coded() / self.n_values
        self.group = math.floor(self.options.groups * (1 - math.sqrt(share_left)))

    def _measure_curvature(self) -> None:
        """With the first batches of the refits, of which there may be few, unless something is coded."""
        has_begun = any(stream.is_coded is not None and stream.is_coded.any() for stream in self.streams)
        if self.loss is not None and not has_begun:
            self._train()
            n_refits = (self.options.groups - 1) * self.options.refit_steps
            measure_curvature(self.model, self.loss, min(_CURVATURE_BATCHES, n_refits))

    def _train(self) -> None:
        """Training mode, but for what was frozen."""
        self.model.train()
        for module in self.frozen:
            module.train(False)

    def n_coded(self) -> int:
        return sum(int(_flags(stream).sum()) for stream in self.streams)

    def is_done(self) -> bool:
        return self.n_coded() == self.n_values

    def code_group(self, validate: Callable[[], float] | None) -> None:
        """Code the next blocks, unless a resumed run is in the middle of their refit."""
        if self.step:
            return
        parts = [self._code_run(run) for run in self._next_runs()]
        block_kl_bits = torch.cat([kl_nats for kl_nats, _ in parts]) / math.log(2)
        kl_bits, log_weight_bits = float(block_kl_bits.sum()), sum(w for _, w in parts) / math.log(2)
        self.group += 1
        self.model.eval()
        self.journal.add(
            Row(
                group=self.group,
                coded_values=self.n_coded(),
                blocks=len(block_kl_bits),
                kl_bits=kl_bits,
                least_block_kl_bits=float(block_kl_bits.min()),
                largest_block_kl_bits=float(block_kl_bits.max()),
                log_weight_gap_bits=log_weight_bits - kl_bits,
                loss=self.last_loss,
                validation=math.nan if validate is None else float(validate()),
            )
        )

    def refit(self, bar: tqdm) -> None:
        """Fit what is not coded to what is."""
        is_frozen = not self.optimizer.param_groups[0]["params"]
        steps = 0 if self.loss is None or is_frozen or self.is_done() else self.options.refit_steps
        self._train()
        while self.step < steps:
            self._refit_step()
            self.step += 1
            bar.set_postfix(loss=f"{self.last_loss:.4f}", group=self.group, refresh=False)
            if self.checkpoint is not None:
                self.checkpoint.save_if_due(self)
        self.step = 0
        if self.checkpoint is not None:
            self.checkpoint.save_if_due(self, now=self.is_done())

    def _refit_step(self) -> None:
        """One step of the optimizer, or none at all."""
        try:
            with undone_if_not_finite(self.model):
                self._optimize((self.group - 1) * self.options.refit_steps + self.step)
        except TrainingError:
            self.optimizer.zero_grad()
            if self.checkpoint is not None:
                self.checkpoint.save(self)
            raise

    def _optimize(self, number: int) -> None:
        assert self.loss is not None
        where = f"refit step {number} after group {self.group}"
        for group in self.optimizer.param_groups:
            group["lr"] = self.options.rate() * max(0.1, 1 - self.group / self.options.groups)
        self.optimizer.zero_grad()
        loss = self.loss(number)
        total = loss + self.variational.penalty()
        check_finite(total, where)
        total.backward()
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        sums = [p.grad.sum(dtype=torch.float32).cpu() for p in parameters if p.grad is not None]
        check_finite(torch.stack(sums).sum(), where, "gradient")
        self.optimizer.step()
        self.variational.anneal()
        self.last_loss = float(loss.detach())

    def _next_runs(self) -> list[Run]:
        """The next group: a part of every stream, or all of the streams of largest KL."""
        share_left = max(0.0, 1 - (self.group + 1) / self.options.groups) ** 2
        coded = [int(_flags(stream).sum()) for stream in self.streams]
        left = [i for i, stream in enumerate(self.streams) if coded[i] < stream.n_values]
        if self.options.order == "random":
            sizes = [stream.n_values for stream in self.streams]
            return [self._run(i, math.ceil(sizes[i] - coded[i] - share_left * sizes[i])) for i in left]
        wanted, runs = math.ceil(self.n_values - sum(coded) - share_left * self.n_values), []
        for i in sorted(left, key=lambda i: (not coded[i], -float(self.streams[i].kl_nats().detach().sum()))):
            runs.append(self._run(i, wanted))
            wanted -= len(runs[-1].steps) * self.streams[i].code.step_weights
            if wanted <= 0:
                break
        return runs

    def _run(self, number: int, wanted: int) -> Run:
        """About so many values of a stream, in whole blocks: the rest of one would have all of its KL."""
        stream = self.streams[number]
        block, width = stream.posterior.block_weights, stream.code.step_weights
        n_steps = max(1, -(-wanted // block)) * (block // width)
        return Run(number, self._uncoded_steps(number)[:n_steps].sort().values)

    def _uncoded_steps(self, number: int) -> Tensor:
        """Blocks in random order or by KL; windows that overlap one after the other."""
        stream = self.streams[number]
        left = (~_flags(stream)[:: stream.code.step_weights]).nonzero().view(-1).cpu()
        if stream.code.overlap_bits:
            return left
        if self.options.order == "largest-kl":
            return left[stream.kl_nats().detach().cpu()[left].argsort(descending=True, stable=True)]
        seed = torch.Generator().manual_seed(self.variational.config.seed + number)
        order = torch.randperm(stream.code.steps(stream.n_values), generator=seed)
        return order[torch.isin(order, left)]

    def _code_run(self, run: Run) -> tuple[Tensor, float]:
        """Encode and fix; returns KL per block, `[blocks]`, and log importance weight of it all, in nats."""
        stream = self.streams[run.stream]
        cost, n, width = stream.cost(), len(run.steps), stream.code.step_weights
        searched, entry = self._search(stream, run.steps)
        values = (searched[:, None] * width + torch.arange(width)).flatten()
        values = values[values < stream.n_values]
        part = Cost(*(x[values].contiguous() for x in (cost.quadratic, cost.linear)))
        found = encode_states(part, stream.code, self.selection, self.generator, entry)
        z = decode_stream(pack_states(found, stream.code), stream.code, len(values))[: n * width]
        return self._fix(run, torch.from_numpy(found[:n]), torch.as_tensor(z), values[: n * width])

    def _search(self, stream: Stream, steps: Tensor) -> tuple[Tensor, int | None]:
        """Steps to search for the best windows of some, and the bits that the first of them begins with."""
        code, first = stream.code, int(steps[0])
        if not code.overlap_bits:
            return steps, None
        ahead = _LOOK_AHEAD_WINDOWS * code.window_bits // code.step_bits
        searched = torch.arange(first, min(first + len(steps) + ahead, code.steps(stream.n_values)))
        if not first:
            return searched, None
        assert stream.states is not None
        return searched, int(stream.states[first - 1]) & ((1 << code.overlap_bits) - 1)

    @torch.no_grad()
    def _fix(self, run: Run, states: Tensor, z: Tensor, values: Tensor) -> tuple[Tensor, float]:
        stream = self.streams[run.stream]
        mean, variance = (x[values].double() for x in stream.moments())
        log_weight = 0.5 * (z.square() - (z - mean).square() / variance - variance.log()).sum()
        kl = 0.5 * (mean.square() + variance - 1 - variance.log())
        blocks, block_of_value = (values // stream.posterior.block_weights).unique(return_inverse=True)
        assert stream.coded is not None and stream.is_coded is not None and stream.states is not None
        at = values.to(stream.coded.device)
        stream.coded[at], stream.is_coded[at] = z.to(stream.coded.device), True
        stream.states[run.steps.to(stream.states.device)] = states.to(stream.states)
        return kl.new_zeros(len(blocks)).index_add_(0, block_of_value, kl), float(log_weight)


def message_of(stream: Stream) -> Tensor:
    """The message of a stream that is coded, uint8 `[bytes]`.

    Raises:
        OptionError: something of it is not coded.
    """
    if stream.states is None or not bool(_flags(stream).all()):
        raise OptionError(
            f"{stream.members[0].name}: expected a coded stream, found one that is not; call "
            "code_model(model, …) first"
        )
    return pack_states(stream.states.cpu().long().numpy(), stream.code)


@contextmanager
def undone_if_not_finite(model: nn.Module) -> Iterator[None]:
    """Give buffers back what they had if a loss is not finite: batch norms average bad batches too."""
    before = Snapshot(model)
    try:
        yield
    except TrainingError:
        with torch.no_grad():
            before.restore()
        raise


def check_finite(value: Tensor, where: str, what: str = "loss") -> None:
    """Raise unless a loss is finite.

    Raises:
        TrainingError: it is NaN or infinite.
    """
    if not math.isfinite(found := float(value.detach())):
        raise TrainingError(
            f"{where}: expected a finite {what}, found {found}; the model is as it was after the step "
            "before: lower the learning rate, or look at the batch"
        )


def _flags(stream: Stream) -> Tensor:
    assert stream.is_coded is not None
    return stream.is_coded
