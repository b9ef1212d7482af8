"""The Hugging Face Trainer for variational models: KL in the loss, its annealing, and coding at the end."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from miracle_hub.codec.report import Report
from miracle_hub.errors import OptionError
from miracle_hub.files.whole import refuse_existing
from miracle_hub.finetune.agreement import require_own_tensors
from miracle_hub.finetune.distillation import Teacher
from miracle_hub.finetune.models import compress_model, refuse_adapters
from miracle_hub.finetune.refit_batches import RefitBatches
from miracle_hub.training.checkpoint import Checkpoint
from miracle_hub.training.coder import code_model
from miracle_hub.training.coding_options import CodingOptions
from miracle_hub.training.guard import check_finite, undone_if_not_finite
from miracle_hub.training.journal import Journal
from miracle_hub.training.model import Variational, variational_of
from miracle_hub.training.processes import Processes, all_processes, n_launched

# Of refits, in learning rates of the fit. MiniLM on SST-2 at 1 bit, 400 steps and 725 of refits, accuracy on
# test: towards a teacher (hidden states counting once) 82.0 (1), 83.7 (5), 84.7 (10); towards labels 81.7
# (1), and at 10 it diverges.
_REFIT_RATES = {True: 5.0, False: 1 / 3}


class AnnealingCallback(TrainerCallback):
    """Tells posteriors of every step of the optimizer, after which some move the weight of their KL."""

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        """See `TrainerCallback`. Of a loss that is finite, gradients may not be; scaled ones are passed over.

        Raises:
            TrainingError: one is not; the step is not made.
        """
        found = [p.grad for p in model.parameters() if p.grad is not None]
        gradients = [gradient for gradient in found if not gradient.is_sparse]
        if gradients and not args.fp16:
            norms = torch.stack([g.sum(dtype=torch.float32).cpu() for g in gradients])
            check_finite(norms.sum(), f"step {state.global_step}", "gradient")

    def on_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        """See `TrainerCallback`."""
        variational_of(model).after_step()


class MiracleTrainer(Trainer):
    """A Trainer whose loss has the weighted KL of a variational model, and that can code it.

    Only Mean-Var needs it to be fitted: the KL of others is fixed, so that the plain Trainer fits them.
    Refits have this class's loss, or a teacher's: a subclass's `compute_loss` is that of the fit alone.
    The learning rate is that of a dense fine-tuning; posteriors are never decayed.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """
        Raises:
            OptionError: the model is not variational.
        """
        super().__init__(*args, **kwargs)
        self.add_callback(AnnealingCallback())
        self._teacher: Teacher | None = None
        self._processes = Processes()
        variational_of(self._plain_model())
        self._refuse_other_wrappers()

    def _refuse_other_wrappers(self) -> None:
        """
        Raises:
            OptionError: the arguments, or the machine, would have the model wrapped in a way that it is not
                made for.
        """
        wanted = {
            "FSDP": self.is_fsdp_enabled,
            "DeepSpeed": self.is_deepspeed_enabled,
            "nn.DataParallel over several GPUs in one process": self.args.n_gpu > 1,
        }
        if n_launched() > 1 and self.args.world_size == 1:
            raise OptionError(
                f"args: expected a run of {n_launched()} processes, as the launcher says, found that each "
                "trains on its own; on CPUs pass TrainingArguments(use_cpu=True)"
            )
        if found := [name for name, is_wanted in wanted.items() if is_wanted]:
            raise OptionError(
                f"args: expected one device, or processes with DistributedDataParallel, found {found[0]}; "
                "start a process per device with torchrun, without FSDP and DeepSpeed, or use one device "
                "(CUDA_VISIBLE_DEVICES=0)"
            )

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's; in a distributed run an error of one process is one of all."""
        with all_processes() as self._processes:
            try:
                return super().train(*args, **kwargs)
            finally:
                self._processes = Processes()

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The Trainer's loss plus Σ β·KL.

        Raises:
            TrainingError: the loss is not finite; the model is as the last step left it.
            ProcessError: that of another process could not be worked out.
        """
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        with self._processes.together():
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
            check_finite(loss, f"step {self.state.global_step}")
            loss = loss + self.variational.penalty() * self._share_of_step(num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """The Trainer's; a loss that is not finite leaves no trace in buffers."""
        with undone_if_not_finite(self._plain_model()):
            return super().training_step(*args, **kwargs)

    def _share_of_step(self, num_items_in_batch: Any) -> float:
        """So that a step's micro-batches add up to one penalty, whoever divides the loss by their number."""
        is_scaled = (
            self.model_accepts_loss_kwargs and num_items_in_batch is not None
        ) or self.compute_loss_func
        return 1 / self.current_gradient_accumulation_steps if is_scaled else 1.0

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """The Trainer's logs with the KL of what is not coded, in bits."""
        super().log({**logs, "kl_bits": self.variational.kl_bits()}, *args, **kwargs)

    def get_decay_parameter_names(self, model: Any) -> list[str]:
        """Parameters to decay: none of a posterior, whose own prior pulls it."""
        own = {id(tensor) for tensor in self.variational.tensors()}
        posterior = {name for name, parameter in model.named_parameters() if id(parameter) in own}
        return [name for name in super().get_decay_parameter_names(model) if name not in posterior]

    def compress(
        self,
        out: str | Path,
        *,
        options: CodingOptions | None = None,
        size: str | int | None = None,
        bits_per_weight: float | None = None,
        distill: bool = True,
        validate: bool = False,
        checkpoint: str | Path | None = None,
        log_folder: str | Path | None = None,
        overwrite: bool = False,
    ) -> Report:
        """Code the model, refitting what is left on the training data, and write `out`.

        Afterwards the model is what `out` loads to, so that `evaluate` is of what was written. In a
        distributed run all processes call this: each refits with batches of its own, and the first writes.

        Args:
            options: of coding; without a learning rate refits have `refit_learning_rate(distill)`.
            size, bits_per_weight: of the whole files, met by coding the other tensors without training; None
                means that they stay plain.
            distill: refits hold the model to a dense copy of what it was before coding, instead of to labels.
            validate: evaluate after every group; the loss goes to the journal, the last one of what is
                written.
            checkpoint: a file to go on from if this is interrupted; it is removed at the end, as is the
                teacher, whose file has "-teacher" appended.
            log_folder: where coding.csv, coding.json and coding.png go.

        Raises:
            TrainingError: a loss, or an input of a layer, is not finite.
            OutputExistsError, OutputWriteError: `out` exists, or cannot be written.
            ProcessError: another process failed, or has ended.
        """
        options = options or CodingOptions()
        if options.learning_rate is None:
            options = replace(options, learning_rate=self.refit_learning_rate(distill))
        state = None if checkpoint is None else Path(checkpoint)
        budget: dict[str, Any] = {"size": size, "bits_per_weight": bits_per_weight}
        with all_processes() as processes:
            with processes.together():
                refuse_adapters(self._plain_model())
                require_own_tensors(self._plain_model())
                if processes.is_first:
                    refuse_existing(Path(out), overwrite)
            journal = self._coded(options, distill, validate, state, log_folder, processes)
            report = compress_model(
                self._plain_model(), out, tokenizer=self.processing_class, overwrite=overwrite,
                progress=not self.args.disable_tqdm, **budget,
            )  # fmt: skip
            if validate and any(value is not None for value in budget.values()):  # others were coded since
                row = replace(journal.rows[-1], validation=self._eval_loss())
                with processes.together():
                    if processes.is_first:
                        journal.replace_last(row)
            if state is not None and processes.is_first:
                state.unlink(missing_ok=True)
                _teacher_beside(state).unlink(missing_ok=True)
        return report

    def _coded(
        self,
        options: CodingOptions,
        distill: bool,
        validate: bool,
        state: Path | None,
        log_folder: str | Path | None,
        processes: Processes,
    ) -> Journal:
        """Code the model with refits; see `compress`."""
        loss, crc = self._refits(options, distill, state, processes)
        with processes.together():
            self._check_data(loss, validate)
        return code_model(
            self._plain_model(), loss, options=options, validate=self._eval_loss if validate else None,
            journal=Journal(Path(log_folder) if log_folder is not None else None),
            checkpoint=Checkpoint(state, loss=crc) if state is not None else None,
            progress=not self.args.disable_tqdm,
        )  # fmt: skip

    def _eval_loss(self) -> float:
        return self.evaluate()["eval_loss"]

    def _refits(
        self, options: CodingOptions, distill: bool, state: Path | None, processes: Processes
    ) -> tuple[Callable[[int], Tensor] | None, str]:
        """The loss of the refits, if there are any, and what tells it from others in a checkpoint."""
        if self.train_dataset is None or options.refit_steps == 0:
            return None, ""
        with processes.together():
            batches = RefitBatches(self)
        teacher = self._teacher_of(state, processes) if distill else None
        crc = teacher.crc if teacher and state else ""
        return partial(self._loss_of_batch, batches=batches, teacher=teacher), crc

    def _teacher_of(self, state: Path | None, processes: Processes) -> Teacher:
        """What the model was before it was coded, though an attempt before has coded a part of it."""
        path = None if state is None else _teacher_beside(state)
        has_begun = any(stream.message is not None for stream in self.variational.streams)
        with processes.together():
            if self._teacher is None or not has_begun:
                is_resumed = state is not None and processes.is_first and state.exists()
                self._teacher = Teacher(self._plain_model(), path if is_resumed else None)
        assert self._teacher is not None
        processes.make_equal(self._teacher.tensors())
        with processes.together():
            if path is not None and processes.is_first:
                self._teacher.keep(path)
        return self._teacher

    def _check_data(self, loss: Callable[[int], Tensor] | None, validate: bool) -> None:
        """Refuse before anything is coded what refits or evaluations would fail at.

        Raises:
            OptionError: data are missing, or the model does not suit distillation.
        """
        if validate and (self.eval_dataset is None or isinstance(self.eval_dataset, dict)):
            raise OptionError(
                f"validate: expected one eval_dataset, found {type(self.eval_dataset).__name__}; give the "
                "Trainer one, or leave validate out"
            )
        if loss is not None:
            model = self._plain_model()
            modes = [(module, module.training) for module in model.modules()]  # some may be frozen
            with torch.no_grad(), torch.random.fork_rng():
                model.eval()
                loss(0)
            for module, mode in modes:  # those that a module holds come after it
                module.train(mode)

    def refit_learning_rate(self, distill: bool) -> float:
        """What suits refits: without noise and towards a teacher more than the fit's learning rate."""
        return self.args.learning_rate * _REFIT_RATES[distill and not self.variational.has_noise]

    @property
    def variational(self) -> Variational:
        """The variational part of the model.

        Raises:
            OptionError: the model has none.
        """
        return variational_of(self._plain_model())

    @property
    def base(self) -> Path | None:
        """The folder of the model to which this one is a difference, if there is one."""
        return self.variational.base and self.variational.base.folder

    def _plain_model(self) -> Any:
        return self.accelerator.unwrap_model(self.model)

    def _loss_of_batch(self, number: int, batches: RefitBatches, teacher: Teacher | None) -> Tensor:
        """The loss of the refits' batch of that number: the same whenever it is asked for."""
        collate = self._get_collator_with_removed_columns(self.data_collator)
        inputs = self._prepare_inputs(collate(batches.rows(number)))
        model = self._plain_model()
        with self.compute_loss_context_manager():
            if teacher is not None:
                return teacher.loss(model, inputs)
            loss: Any = super().compute_loss(model, inputs)
        return loss


def _teacher_beside(state: Path) -> Path:
    """The file of the teacher of a run that has its state there."""
    return state.with_name(f"{state.name}-teacher")
