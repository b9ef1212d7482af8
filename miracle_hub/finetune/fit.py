"""`miracle fit`: fine-tune a hub model on a data set within a budget of bits, and write the repository."""

import errno
import json
import logging
import os
import shutil
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Trainer,
    TrainingArguments,
    set_seed,
)

from miracle_hub.codec.detector import TO_FINE_TUNE
from miracle_hub.codec.report import Report
from miracle_hub.errors import MiracleError, OutputWriteError
from miracle_hub.evaluate.batches import (
    read_model_config,
    read_tokenizer,
    tokenizer_of,
)
from miracle_hub.evaluate.data import Split, read_split
from miracle_hub.files.whole import WRITE_ERRORS, alone_in, refuse_existing, writing
from miracle_hub.finetune.models import loading_options, make_variational
from miracle_hub.finetune.tasks import classification, language_model, pad_with_another
from miracle_hub.finetune.trainer import MiracleTrainer
from miracle_hub.hub.resolve import file_names, require_kind
from miracle_hub.options import TASKS, FitOptions, chosen
from miracle_hub.training.coding_options import CodingOptions
from miracle_hub.training.config import VariationalConfig
from miracle_hub.training.guard import check_finite
from miracle_hub.training.processes import Processes, all_processes, n_launched

_LOGGER = logging.getLogger("miracle_hub")
# As the Trainer's save_model leaves them: weights are new, and what belongs to the old ones need not fit.
_OF_THE_BASE = "of SOURCE; a fit writes the model and its tokenizer"
_FULL_BYTES = 1 << 16  # with less of it left, the disk is why torch.save failed, which does not say so


@dataclass(frozen=True)
class FitReport:
    """What a fit did.

    Attributes:
        report: of the repository.
        fitted: the evaluation's figures at the posterior's means, before coding.
        coded: the same of what `from_pretrained` loads from what was written.
    """

    report: Report
    fitted: dict[str, float]
    coded: dict[str, float]


def fit(
    source: str | Path,
    out: str | Path,
    *,
    data: str | Path,
    task: str = TASKS[0],
    bits_per_weight: float | None = None,
    size: str | int | None = None,
    rate: float | None = None,
    delta: bool = False,
    target_modules: str | list[str] | None = None,
    parametrization: str | None = None,
    text_columns: list[str] | None = None,
    label_column: str = "label",
    epochs: float = 1.0,
    steps: int = -1,
    batch_size: int = 32,
    learning_rate: float = 1e-4,
    max_length: int = 128,
    groups: int = 40,
    refit_steps: int = 10,
    distill: bool = True,
    seed: int = 0,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
    options: FitOptions | None = None,
) -> FitReport:
    """Make a hub model variational, fine-tune it, code it with refits, and write `out`.

    Exactly one of `bits_per_weight`, `size` and `rate` is the budget. That of the whole files is never
    exceeded, and at least 99 % of it are used; the report has both.
    What an interrupted fit goes on from, and coding.csv, coding.json and coding.png, are in the folder `out`
    with "-fit" appended. In a distributed run (`torchrun`) all processes call this, on disks that they share.

    Args:
        source: a folder or a Hub id of a dense model with its tokenizer.
        out: the folder to write; it appears whole or not at all.
        data: a file (csv, tsv, json, jsonl, parquet, txt), a folder of `datasets`, or a Hub id.
        task: "text-classification" or "causal-lm".
        bits_per_weight: bits of the whole files, headers and plain tensors included, over all weights.
        size: the same as bytes, such as "5.5MB"; never exceeded.
        rate: bits per coded value instead; headers, scales and plain tensors come on top.
        delta: OUT is a difference to SOURCE, which its readers need too: only what the fit changes is coded;
            what is not coded, and SOURCE has, stays as it is.
        target_modules: what is coded: "all-matrices" (by default), "all-linear" (that of a difference),
            "all", a regular expression that matches whole names of modules or parameters; or, in Python, a
            list of names or ends of names.
        parametrization: "test-channel" (no noise in the fit; by default), "mean-kl" (for far less than 1
            bit; that of a difference) or "mean-var".
        text_columns: one or two columns of text; by default those that can be no others.
        label_column: of a classification: whole numbers from 0 on, or names of classes.
        epochs: passes over the data.
        steps: of the optimizer; above 0 they count instead of epochs.
        batch_size: rows of a step, in every process.
        learning_rate: that of a dense fine-tuning; refits have their own.
        max_length: tokens of a text, or of a language model's window.
        groups: groups that are coded one after the other.
        refit_steps: steps of the optimizer after every group.
        distill: refits hold the model to what the fit made of it, instead of to labels.
        seed: of the data's order, a new head, the noise and the shared candidates.
        resume: go on where an interrupted fit of the same arguments was.
        overwrite: replace the output if it exists.
        progress: show a progress bar.
        options: all of these from `task` on, instead of the keywords.

    Raises:
        SourceError: and its subclasses: the source is no dense model of transformers.
        DataError: the data lack a column, a label or any row.
        OptionError: an option is out of range.
        BudgetError: there is not exactly one budget, or it cannot be met; the message says the least or most
            possible.
        TrainingError: a loss is not finite.
        OutputExistsError: `out` exists, or another process is fitting it.
        OutputWriteError: it, or a checkpoint, cannot be written.
        ProcessError: another process failed, or has ended.
    """
    return _fit(source, out, data, chosen(FitOptions, options, locals()))


def _fit(source: str | Path, out: str | Path, data: str | Path, options: FitOptions) -> FitReport:
    refuse_existing(Path(out), options.overwrite)  # before any work
    require_kind(source, TO_FINE_TUNE)
    read_model_config(source)
    config, folder = _config(source, options), Path(f"{out}-fit")
    arguments = _arguments(folder, options)  # with them the processes of a distributed run meet
    with all_processes() as processes, ExitStack() as until_the_end:
        wanted = (data, options.task, options.text_columns, options.label_column, options.seed)
        splits = processes.in_turn(lambda: read_split(*wanted))
        with processes.together():
            if processes.is_first:
                until_the_end.enter_context(alone_in(folder))
        trainer = processes.in_turn(lambda: _trainer(source, splits, arguments, config, options.max_length))
        checkpoint = folder / "coding.safetensors"
        fitted = _train(trainer, folder, checkpoint, options.resume, processes)
        set_seed(options.seed)  # or where coding begins would depend on how often training was interrupted
        rate = trainer.refit_learning_rate(options.distill)
        report = trainer.compress(
            out, options=CodingOptions(options.groups, options.refit_steps, rate), distill=options.distill,
            checkpoint=checkpoint, log_folder=folder, overwrite=options.overwrite,
        )  # fmt: skip
        left_out = {name: _OF_THE_BASE for name in file_names(source) if not (Path(out) / name).exists()}
        found = _figures(_reader(out, trainer, splits))
        return FitReport(replace(report, left_out=left_out), fitted, found)


def _config(source: str | Path, options: FitOptions) -> VariationalConfig:
    return VariationalConfig(
        base=source if options.delta else None,
        bits_per_weight=options.bits_per_weight, size=options.size, rate=options.rate,
        target_modules=options.target_modules, parametrization=options.parametrization, seed=options.seed,
    )  # fmt: skip


def _train(
    trainer: MiracleTrainer, folder: Path, checkpoint: Path, resume: bool, processes: Processes
) -> dict[str, float]:
    """Train, or go on training, unless coding has begun; the evaluation's figures."""
    figures, found, last = folder / "fitted.json", None, None
    with processes.together():
        if processes.is_first:
            if not resume:
                checkpoint.unlink(missing_ok=True)
            if checkpoint.exists() and figures.exists():
                found = json.loads(figures.read_text(encoding="utf-8"))
            last = _last_checkpoint(folder) if resume else None
    found, last = processes.first((found, last))
    if found is not None:
        return found
    if last is not None and last.is_done:
        trainer._load_from_checkpoint(str(last.folder))  # train() would make a step more
    else:
        _train_or_name_a_full_disk(trainer, folder, last)
    found = _figures(trainer)
    with processes.together(), writing(figures):
        if processes.is_first:
            figures.write_text(json.dumps(found), encoding="utf-8")
    return found


@dataclass(frozen=True)
class _TrainerCheckpoint:
    """One of the Trainer's that was written to its end: its own state, which it writes last, can be read."""

    folder: Path
    step: int
    is_done: bool


def _last_checkpoint(folder: Path) -> _TrainerCheckpoint | None:
    whole = []
    for path in folder.glob("checkpoint-*/trainer_state.json"):
        with suppress(ValueError):  # half of the JSON
            state = json.loads(path.read_text(encoding="utf-8"))
            step = state["global_step"]
            whole.append(_TrainerCheckpoint(path.parent, step, step >= state["max_steps"]))
    return max(whole, key=lambda checkpoint: checkpoint.step, default=None)


def _train_or_name_a_full_disk(
    trainer: MiracleTrainer, folder: Path, last: _TrainerCheckpoint | None
) -> None:
    """
    Raises:
        OutputWriteError: a checkpoint of the Trainer does not fit the disk.
    """
    try:
        trainer.train(resume_from_checkpoint=None if last is None else str(last.folder))
    except WRITE_ERRORS as error:
        free, says_so = shutil.disk_usage(folder).free, os.strerror(errno.ENOSPC) in str(error)
        if isinstance(error, MiracleError) or (free > _FULL_BYTES and not says_so):
            raise
        raise OutputWriteError(
            f"{folder}: expected room for a checkpoint, found {free} bytes ({error}); make room and run it "
            "again with --resume (resume=True)"
        ) from error


def _trainer(
    source: Any, splits: Split, arguments: TrainingArguments, config: VariationalConfig, max_length: int
) -> MiracleTrainer:
    """The trainer of a model made variational; classes mean classification, else language modeling."""
    set_seed(arguments.seed)  # a new head starts at random
    is_folder = Path(source).is_dir()
    tokenizer = read_tokenizer(Path(source)) if is_folder else tokenizer_of(source)
    if tokenizer.pad_token is None:
        pad_with_another(tokenizer)
    prepare = classification if splits.class_names else language_model
    model, collator, encode = prepare(source, tokenizer, splits, max_length)
    return MiracleTrainer(
        model=make_variational(model, config),
        args=arguments,
        train_dataset=encode(splits.train),
        eval_dataset=encode(splits.evaluation),
        data_collator=collator,
        processing_class=tokenizer,
        compute_metrics=_accuracy if splits.class_names else None,
    )


def _arguments(folder: Path, options: FitOptions) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder), num_train_epochs=options.epochs, max_steps=options.steps,
        per_device_train_batch_size=options.batch_size, per_device_eval_batch_size=4 * options.batch_size,
        learning_rate=options.learning_rate, warmup_steps=0.06, seed=options.seed,
        logging_steps=50, save_steps=200, save_total_limit=1, report_to=[],
        disable_tqdm=not options.progress, dataloader_pin_memory=torch.cuda.is_available(),
        # Or transformers multiplies losses by the number of processes, also where models took their means.
        average_tokens_across_devices=False,
        # Without a GPU accelerate has processes meet only where this says so.
        use_cpu=n_launched() > 1 and not torch.accelerator.is_available(),
    )  # fmt: skip


def _accuracy(predictions: Any) -> dict[str, float]:
    return {"accuracy": float((predictions.predictions.argmax(-1) == predictions.label_ids).mean())}


def _reader(out: str | Path, trainer: MiracleTrainer, splits: Split) -> Trainer:
    """What evaluates the model that a stranger loads."""
    kind: Any = AutoModelForSequenceClassification if splits.class_names else AutoModelForCausalLM
    return Trainer(
        model=kind.from_pretrained(out, **loading_options(trainer.base)), args=trainer.args,
        eval_dataset=trainer.eval_dataset, data_collator=trainer.data_collator,
        processing_class=trainer.processing_class, compute_metrics=trainer.compute_metrics,
    )  # fmt: skip


def _figures(trainer: Trainer) -> dict[str, float]:
    found = trainer.evaluate()
    check_finite(torch.tensor(found["eval_loss"]), "evaluation")
    return {
        name.removeprefix("eval_"): found[name] for name in ("eval_loss", "eval_accuracy") if name in found
    }
