"""Coding with refits: code a group of blocks, fix it, fit what is left to it, until everything is coded."""

import json
import logging
import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace

import torch
from torch import Tensor, nn
from tqdm import tqdm

from miracle_hub.errors import TrainingError
from miracle_hub.files.sealed import crc_of
from miracle_hub.training.activations import measure_curvature
from miracle_hub.training.checkpoint import (
    Checkpoint,
    RunState,
    load_optimizer,
    of_process,
    optimizer_tensors,
)
from miracle_hub.training.coding_options import CodingOptions
from miracle_hub.training.guard import check_finite, check_model, undone_if_not_finite
from miracle_hub.training.journal import Journal, Row, row_of
from miracle_hub.training.message import Selector
from miracle_hub.training.model import variational_of
from miracle_hub.training.noise import generator
from miracle_hub.training.processes import Processes, all_processes
from miracle_hub.training.rounding import round_as_written
from miracle_hub.training.schedule import Schedule
from miracle_hub.training.wrapping import own_reduction, refuse_sharded

_LOGGER = logging.getLogger("miracle_hub")
_CURVATURE_BATCHES = 16  # inputs of MiniLM's layers differ by factors of 5 to 50: a few hundred rows tell


def code_model(
    model: nn.Module,
    loss: Callable[[int], Tensor] | None = None,
    *,
    options: CodingOptions | None = None,
    validate: Callable[[], float] | None = None,
    journal: Journal | None = None,
    checkpoint: Checkpoint | None = None,
    progress: bool = True,
    alone: bool = False,
) -> Journal:
    """Code everything that is variational in a model; afterwards its weights are those of the file.

    Vectors that a repository of the model will hold in 16 bits are rounded before the last validation.

    In a distributed run all processes call this. They begin with the model of the first one, which codes and
    writes; each has batches of its own, gradients are their means, and all end with the same weights.

    Args:
        loss: of the i-th batch of the refits, without the KL; the model is in training mode. It must give
            equal batches for equal i, or a resumed run ends elsewhere. The first ones are asked for once more
            at the beginning, where test channels measure the curvature. Of P processes that of rank r is
            asked for batches r, P + r, 2P + r, …. None means no refits.
        validate: called after every group, in evaluation mode; its value, in a distributed run the mean over
            processes, goes to the journal.
        checkpoint: where the state is kept, and found again by the next run with the same arguments.
        alone: this process codes a model of its own, whatever others do.

    Raises:
        ProcessError: another process failed, has ended, or has another model.
        TrainingError: the loss or a gradient is not finite; nothing is changed by that step. Or an input of a
            layer is not; nothing is coded.
        OptionError: the checkpoint is that of another model, or of a run with other options; the learning
            rate may be another.
        WrittenWeightError: a weight was written to in a way that its posterior cannot follow.
        FormatError: the checkpoint is damaged.
        OutputWriteError: the checkpoint or the journal cannot be written.

    Source: Havasi et al. 2019, algorithm 2.
    """
    was_training = model.training
    with all_processes(alone) as processes, own_reduction(variational_of(model)):
        coder = _Coder(model, loss, options or CodingOptions(), journal or Journal(), processes)
        coder.start(checkpoint)
        values, shown = coder.schedule, {"unit": "values", "unit_scale": True, "desc": "code"}
        with tqdm(total=values.n_values, disable=not progress or not processes.is_first, **shown) as bar:
            while not coder.is_done():
                bar.update(values.n_coded() - bar.n)
                coder.code_group(validate)
                coder.refit(bar)
            bar.update(values.n_coded() - bar.n)
        coder.finish()
    model.train(was_training)
    return coder.journal


class _Coder:
    """One coding run: its position is the number of the group and of the refit step inside it."""

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[int], Tensor] | None,
        options: CodingOptions,
        journal: Journal,
        processes: Processes,
    ) -> None:
        self.model, self.loss, self.options, self.journal = model, loss, options, journal
        self.processes, self.variational = processes, variational_of(model)
        self.streams, config = list(self.variational.streams), self.variational.config
        self.schedule = Schedule(self.streams, options.groups, options.order, config.seed)
        self.selector = Selector(config.selection, generator(config.seed))
        self.group, self.step, self.last_loss = 0, 0, math.nan
        self.checkpoint: Checkpoint | None = None
        self.optimizer: torch.optim.Adam | None = None
        # Modules that were frozen, as batch norms may be, while the model is trained.
        self.frozen = [module for module in model.modules() if model.training and not module.training]

    def start(self, checkpoint: Checkpoint | None) -> None:
        """Begin, or go on from a checkpoint, if there is one; or from a model that is coded in part.

        Raises:
            TrainingError: a weight is not finite.
        """
        check_model(self.model)
        self.checkpoint = checkpoint
        self.variational.check()
        refuse_sharded(self.model)
        self._require_one_model()
        saved = self._saved()
        if saved is None:
            self._make_equal()
            self._measure_curvature()
        for stream in self.streams:
            stream.begin_coding()
        self.optimizer = self._new_optimizer()
        if saved is not None:
            self._restore(saved, self.optimizer)
        else:
            self.group = self.schedule.group_by_now()
        self._make_equal()

    def _require_one_model(self) -> None:
        """
        Raises:
            ProcessError: another process would code another model, or otherwise.
        """
        if self.processes.count > 1:
            state = self.state()
            kinds = sorted((name, str(t.dtype), list(t.shape)) for name, t in state.model.items())
            said = json.dumps([state.options, kinds, self.loss is None]).encode()
            self.processes.require_one(zlib.crc32(said), "model, options and refits; make them equal")

    def _saved(self) -> RunState | None:
        """What the first process finds in its checkpoint."""
        saved = None
        with self.processes.together():
            if self.checkpoint is not None and self.processes.is_first:
                saved = self.checkpoint.read(self.state())
        return None if self.checkpoint is None else self.processes.first(saved)

    def _make_equal(self) -> None:
        """Every process gets the tensors of the first."""
        self.processes.make_equal(self.state().model.values())
        self.variational.forget()

    def _new_optimizer(self) -> torch.optim.Adam:
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        # The usual eps of 1e-8 is 0 in float16.
        eps = max([1e-8, *(torch.finfo(p.dtype).tiny for p in parameters)])
        return torch.optim.Adam([{"params": parameters}], lr=self.options.rate(), eps=eps)

    def state(self, random: Sequence[dict[str, Tensor]] = ()) -> RunState:
        """Where the run is; tensors are those in use, not copies.

        Args:
            random: generators of all processes, in their order.
        """
        model = self.model.state_dict().items()
        return RunState(
            options=self._fixed_options(),
            group=self.group,
            step=self.step,
            last_loss=self.last_loss,
            learning_rate=self.options.rate(),
            rows=tuple(self.journal.rows),
            model={name: t for name, t in model if isinstance(t, Tensor)},
            optimizer={} if self.optimizer is None else optimizer_tensors(self.optimizer),
            random={of_process(name, r): t for r, own in enumerate(random) for name, t in own.items()},
        )

    def _random(self) -> dict[str, Tensor]:
        """States of the generators of this process."""
        random = {"torch": torch.get_rng_state(), "encoder": self.selector.generator.get_state()}
        if next(self.model.parameters()).is_cuda:
            random["cuda"] = torch.cuda.get_rng_state()
        return random

    def _fixed_options(self) -> str:
        """What must be equal for a run to go on: the options but for the learning rate, and what is coded."""
        members = [[member.name, list(member.shape)] for stream in self.streams for member in stream.members]
        coding = asdict(self.options)
        del coding["learning_rate"]
        if self.processes.count > 1:
            coding["processes"] = self.processes.count
        if self.checkpoint is not None and self.checkpoint.loss:
            coding["loss"] = self.checkpoint.loss
        return json.dumps({"config": asdict(self.variational.config), "coding": coding, "tensors": members})

    def _restore(self, saved: RunState, optimizer: torch.optim.Optimizer) -> None:
        """Put the run, whose streams are being coded, where it was.

        Its refits may go on at another learning rate, which is what a loss that was not finite asks for.
        """
        if (before := saved.learning_rate) != (rate := self.options.rate()) and self.processes.is_first:
            _LOGGER.warning("refits go on at a learning rate of %g, after %g until now", rate, before)
        self.model.load_state_dict(saved.model)
        load_optimizer(optimizer, saved.optimizer)
        random = {name: saved.random[of_process(name, self.processes.rank)] for name in self._random()}
        torch.set_rng_state(random["torch"])
        self.selector.generator.set_state(random["encoder"])
        if "cuda" in random:
            torch.cuda.set_rng_state(random["cuda"])
        self.group, self.step, self.last_loss = saved.group, saved.step, saved.last_loss
        self.journal.rows = list(saved.rows)

    def _measure_curvature(self) -> None:
        """With the first batches of the refits, of which there may be few, unless something is coded."""
        if self.loss is not None and not self.schedule.n_coded():
            self._train()
            n_refits = (self.options.groups - 1) * self.options.refit_steps
            n_batches = min(_CURVATURE_BATCHES, n_refits * self.processes.count)
            measure_curvature(self.model, self.loss, n_batches, self.processes)

    def _train(self) -> None:
        """Training mode, but for what was frozen."""
        self.model.train()
        for module in self.frozen:
            module.train(False)

    def is_done(self) -> bool:
        """Whether everything is coded."""
        return self.schedule.n_coded() == self.schedule.n_values

    def code_group(self, validate: Callable[[], float] | None) -> None:
        """Code the next blocks, unless a resumed run is in the middle of their refit."""
        if self.step:
            return
        row = None
        with self.processes.together():
            if self.processes.is_first:
                runs = self.schedule.next_runs(self.group)
                chosen = [run.stream.code_steps(run.steps, self.selector) for run in runs]
                row = row_of(self.group + 1, self.schedule.n_coded(), chosen, self.last_loss)
        self.group += 1
        self._make_equal()
        if self.is_done():
            round_as_written(self.model)
        row = self.processes.first(row)
        assert row is not None
        self._report(replace(row, validation=self._validated(validate)))

    def _validated(self, validate: Callable[[], float] | None) -> float:
        """The mean over all processes."""
        self.model.eval()
        found = math.nan
        with self.processes.together():
            if validate is not None:
                found = float(validate())
        return self.processes.mean(found)

    def _report(self, row: Row) -> None:
        """Every process has the journal's rows, and the first its files."""
        with self.processes.together():
            if self.processes.is_first:
                self.journal.add(row)
            else:
                self.journal.rows.append(row)

    def refit(self, bar: tqdm) -> None:
        """Fit what is not coded to what is."""
        is_over = self.loss is None or not self._parameters() or self.is_done()
        steps = 0 if is_over else self.options.refit_steps
        self._train()
        while self.step < steps:
            self._refit_step()
            self.step += 1
            bar.set_postfix(loss=f"{self.last_loss:.4f}", group=self.group, refresh=False)
            self._save_if_due()
        self.step = 0
        self._save_if_due(now=self.is_done())

    def _save_if_due(self, now: bool = False) -> None:
        """By the clock of the first process, which writes."""
        if self.checkpoint is None or not self.processes.gathered(now or self.checkpoint.is_due())[0]:
            return
        random = self.processes.every(self._random())
        with self.processes.together():
            if self.processes.is_first:
                self.checkpoint.save_if_due(lambda: self.state(random), now=True)

    def _parameters(self) -> list[nn.Parameter]:
        """What refits fit."""
        assert self.optimizer is not None
        return self.optimizer.param_groups[0]["params"]

    def _refit_step(self) -> None:
        """One step of the optimizer, or none at all."""
        assert self.optimizer is not None
        try:
            with undone_if_not_finite(self.model):
                self._optimize(self.optimizer, (self.group - 1) * self.options.refit_steps + self.step)
        except TrainingError:
            self.optimizer.zero_grad()
            self._save_if_due(now=True)
            raise

    def _optimize(self, optimizer: torch.optim.Optimizer, number: int) -> None:
        for group in optimizer.param_groups:
            group["lr"] = self.options.rate() * max(0.1, 1 - self.group / self.options.groups)
        optimizer.zero_grad()
        loss = math.nan
        with self.processes.together():
            loss = self._backward(number)
        self.processes.average(self._parameters())
        optimizer.step()
        self.variational.after_step()
        self.last_loss = self.processes.mean(loss)

    def _backward(self, number: int) -> float:
        """The gradients of this process's batch for a step, and its loss."""
        assert self.loss is not None
        where = f"refit step {number} after group {self.group}"
        loss = self.loss(number * self.processes.count + self.processes.rank)
        total = loss + self.variational.penalty()
        check_finite(total, where)
        total.backward()
        sums = [p.grad.sum(dtype=torch.float32).cpu() for p in self._parameters() if p.grad is not None]
        check_finite(torch.stack(sums).sum(), where, "gradient")
        return float(loss.detach())

    def finish(self) -> None:
        """
        Raises:
            ProcessError: processes ended with different weights.
        """
        with self.processes.together():
            if self.processes.is_first:
                self.journal.finish()
        if self.processes.count > 1:
            state = {name: t.cpu().contiguous() for name, t in self.state().model.items()}
            self.processes.require_one(int(crc_of(state, {}), 16), "weights; report this")
