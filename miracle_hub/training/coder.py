"""Coding with refits: code a group of blocks, fix it, fit what is left to it, until everything is coded."""

import json
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from miracle_hub.checks import check_choice
from miracle_hub.errors import OptionError, TrainingError
from miracle_hub.training.activations import measure_curvature
from miracle_hub.training.checkpoint import Checkpoint, RunState, load_optimizer, optimizer_tensors
from miracle_hub.training.guard import check_finite, check_model, undone_if_not_finite
from miracle_hub.training.journal import Journal, Row
from miracle_hub.training.message import Chosen, Selector
from miracle_hub.training.model import variational_of
from miracle_hub.training.schedule import ORDERS, Schedule

_LOGGER = logging.getLogger("miracle_hub")
_LEARNING_RATE = 3e-4  # a choice, for losses that have no fit before them; a Trainer takes its own
_CURVATURE_BATCHES = 16  # inputs of MiniLM's layers differ by factors of 5 to 50: a few hundred rows tell


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
        check_choice("order", self.order, ORDERS)
        are_counts = isinstance(self.groups, int) and isinstance(self.refit_steps, int)
        if not are_counts or self.groups < 1 or self.refit_steps < 0 or not 0 < self.rate() < math.inf:
            raise OptionError(
                "groups, refit_steps, learning_rate: expected at least one group, no negative number of "
                f"steps and a positive rate, found {self.groups}, {self.refit_steps} and {self.learning_rate}"
            )

    def rate(self) -> float:
        """The learning rate of the first refit."""
        return _LEARNING_RATE if self.learning_rate is None else self.learning_rate


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
        WrittenWeightError: a weight was written to in a way that its posterior cannot follow.
        FormatError: the checkpoint is damaged.
        OutputWriteError: the checkpoint or the journal cannot be written.

    Source: Havasi et al. 2019, algorithm 2.
    """
    was_training = model.training
    coder = _Coder(model, loss, options or CodingOptions(), journal or Journal())
    coder.start(checkpoint)
    values, shown = coder.schedule, {"unit": "values", "unit_scale": True, "desc": "code"}
    with tqdm(total=values.n_values, disable=not progress, **shown) as bar:
        while not coder.is_done():
            bar.update(values.n_coded() - bar.n)
            coder.code_group(validate)
            coder.refit(bar)
        bar.update(values.n_coded() - bar.n)
    coder.journal.finish()
    model.train(was_training)
    return coder.journal


class _Coder:
    """One coding run: its position is the number of the group and of the refit step inside it."""

    def __init__(
        self, model: nn.Module, loss: Callable[[int], Tensor] | None, options: CodingOptions, journal: Journal
    ) -> None:
        self.model, self.loss, self.options, self.journal = model, loss, options, journal
        self.variational = variational_of(model)
        self.streams, config = list(self.variational.streams), self.variational.config
        self.schedule = Schedule(self.streams, options.groups, options.order, config.seed)
        self.selector = Selector(config.selection, torch.Generator().manual_seed(config.seed))
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
        saved = None if checkpoint is None else checkpoint.read(self.state())
        if saved is None:
            self._measure_curvature()
        for stream in self.streams:
            stream.begin_coding()
        self.optimizer = self._new_optimizer()
        if saved is not None:
            self._restore(saved, self.optimizer)
        else:
            self.group = self.schedule.group_by_now()

    def _new_optimizer(self) -> torch.optim.Adam:
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        # The usual eps of 1e-8 is 0 in float16.
        eps = max([1e-8, *(torch.finfo(p.dtype).tiny for p in parameters)])
        return torch.optim.Adam([{"params": parameters}], lr=self.options.rate(), eps=eps)

    def state(self) -> RunState:
        """Where the run is; tensors are those in use, not copies."""
        model = self.model.state_dict().items()
        random = {"torch": torch.get_rng_state(), "encoder": self.selector.generator.get_state()}
        if next(self.model.parameters()).is_cuda:
            random["cuda"] = torch.cuda.get_rng_state()
        return RunState(
            options=self._fixed_options(),
            group=self.group,
            step=self.step,
            last_loss=self.last_loss,
            learning_rate=self.options.rate(),
            rows=tuple(self.journal.rows),
            model={name: t for name, t in model if isinstance(t, Tensor)},
            optimizer={} if self.optimizer is None else optimizer_tensors(self.optimizer),
            random=random,
        )

    def _fixed_options(self) -> str:
        """What must be equal for a run to go on: the options but for the learning rate, and what is coded."""
        members = [[member.name, list(member.shape)] for stream in self.streams for member in stream.members]
        coding = asdict(self.options)
        del coding["learning_rate"]
        if self.checkpoint is not None and self.checkpoint.loss:
            coding["loss"] = self.checkpoint.loss
        return json.dumps({"config": asdict(self.variational.config), "coding": coding, "tensors": members})

    def _restore(self, saved: RunState, optimizer: torch.optim.Optimizer) -> None:
        """Put the run, whose streams are being coded, where it was.

        Its refits may go on at another learning rate, which is what a loss that was not finite asks for.
        """
        if (before := saved.learning_rate) != (rate := self.options.rate()):
            _LOGGER.warning("refits go on at a learning rate of %g, after %g until now", rate, before)
        self.model.load_state_dict(saved.model)
        load_optimizer(optimizer, saved.optimizer)
        torch.set_rng_state(saved.random["torch"])
        self.selector.generator.set_state(saved.random["encoder"])
        if "cuda" in saved.random:
            torch.cuda.set_rng_state(saved.random["cuda"])
        self.group, self.step, self.last_loss = saved.group, saved.step, saved.last_loss
        self.journal.rows = list(saved.rows)

    def _measure_curvature(self) -> None:
        """With the first batches of the refits, of which there may be few, unless something is coded."""
        if self.loss is not None and not self.schedule.n_coded():
            self._train()
            n_refits = (self.options.groups - 1) * self.options.refit_steps
            measure_curvature(self.model, self.loss, min(_CURVATURE_BATCHES, n_refits))

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
        runs = self.schedule.next_runs(self.group)
        chosen = [run.stream.code_steps(run.steps, self.selector) for run in runs]
        self.group += 1
        self.model.eval()
        self.journal.add(self._row(chosen, math.nan if validate is None else float(validate())))

    def _row(self, chosen: Sequence[Chosen], validation: float) -> Row:
        block_kl_bits = torch.cat([part.block_kl_nats for part in chosen]) / math.log(2)
        kl_bits = float(block_kl_bits.sum())
        log_weight_bits = sum(part.log_weight_nats for part in chosen) / math.log(2)
        return Row(
            group=self.group,
            coded_values=self.schedule.n_coded(),
            blocks=len(block_kl_bits),
            kl_bits=kl_bits,
            least_block_kl_bits=float(block_kl_bits.min()),
            largest_block_kl_bits=float(block_kl_bits.max()),
            log_weight_gap_bits=log_weight_bits - kl_bits,
            loss=self.last_loss,
            validation=validation,
        )

    def refit(self, bar: tqdm) -> None:
        """Fit what is not coded to what is."""
        is_over = self.loss is None or not self._parameters() or self.is_done()
        steps = 0 if is_over else self.options.refit_steps
        self._train()
        while self.step < steps:
            self._refit_step()
            self.step += 1
            bar.set_postfix(loss=f"{self.last_loss:.4f}", group=self.group, refresh=False)
            if self.checkpoint is not None:
                self.checkpoint.save_if_due(self.state)
        self.step = 0
        if self.checkpoint is not None:
            self.checkpoint.save_if_due(self.state, now=self.is_done())

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
            if self.checkpoint is not None:
                self.checkpoint.save(self.state())
            raise

    def _optimize(self, optimizer: torch.optim.Optimizer, number: int) -> None:
        assert self.loss is not None
        where = f"refit step {number} after group {self.group}"
        for group in optimizer.param_groups:
            group["lr"] = self.options.rate() * max(0.1, 1 - self.group / self.options.groups)
        optimizer.zero_grad()
        loss = self.loss(number)
        total = loss + self.variational.penalty()
        check_finite(total, where)
        total.backward()
        sums = [p.grad.sum(dtype=torch.float32).cpu() for p in self._parameters() if p.grad is not None]
        check_finite(torch.stack(sums).sum(), where, "gradient")
        optimizer.step()
        self.variational.after_step()
        self.last_loss = float(loss.detach())
