"""`miracle fit`: fine-tune a hub model on a data set within a budget of bits, and write the repository."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    DataCollatorWithPadding,
    TrainingArguments,
    set_seed,
)

from miracle_hub.codec.compress import Report
from miracle_hub.errors import DataError, MiracleError, OptionError, OutputWriteError
from miracle_hub.evaluate.data import Split, read_split
from miracle_hub.files.whole import WRITE_ERRORS, alone_in, refuse_existing, writing
from miracle_hub.finetune.models import make_variational
from miracle_hub.finetune.trainer import MiracleTrainer
from miracle_hub.plugin.quantizer import MiracleConfig
from miracle_hub.training.coder import CodingOptions

TASKS = ("text-classification", "causal-lm")
_FULL_BYTES = 1 << 16  # with less of it left, the disk is why torch.save failed, which does not say so


@dataclass(frozen=True)
class FitReport:
    """What a fit did.

    Attributes:
        report: of the repository.
        fitted: the evaluation's figures at the posterior's means, before coding.
        coded: the same of what was written.
    """

    report: Report
    fitted: dict[str, float]
    coded: dict[str, float]


def fit(
    source: str | Path,
    out: str | Path,
    *,
    data: str | Path,
    task: str = "text-classification",
    bits_per_weight: float = 1.0,
    target_modules: str = "all-matrices",
    parametrization: str = "test-channel",
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
) -> FitReport:
    """Make a hub model variational, fine-tune it, code it with refits, and write `out`.

    What an interrupted fit goes on from, and coding.csv, coding.json and coding.png, are in the folder `out`
    with "-fit" appended.

    Args:
        source: a folder or a Hub id of a dense model with its tokenizer.
        data: a file (csv, tsv, json, jsonl, parquet, txt), a folder of `datasets`, or a Hub id.
        task: "text-classification" or "causal-lm".
        bits_per_weight, target_modules, parametrization: see `training.config.VariationalConfig`.
        text_columns: one or two columns of text; by default the columns of strings.
        label_column: of a classification: whole numbers from 0 on, or names of classes.
        epochs: passes over the data.
        steps: of the optimizer; above 0 they count instead of epochs.
        learning_rate: of the fit; see `MiracleTrainer.refit_learning_rate` for that of refits.
        max_length: tokens of a text, or of a language model's window.
        groups, refit_steps: see `training.coder.CodingOptions`.
        distill: refits hold the model to what the fit made of it, instead of to labels.
        resume: go on where an interrupted fit of the same arguments was.

    Raises:
        DataError: the data lack a column, a label or any row.
        OptionError, BudgetError: an option is out of range.
        TrainingError: a loss is not finite.
        OutputExistsError: `out` exists, or another process is fitting it.
        OutputWriteError: it, or a checkpoint, cannot be written.
    """
    _check(task, Path(out), overwrite)
    splits, folder = read_split(data, task, text_columns, label_column, seed), Path(f"{out}-fit")
    options: dict[str, Any] = dict(target_modules=target_modules, parametrization=parametrization, seed=seed)
    config = MiracleConfig(bits_per_weight=bits_per_weight, **options)
    arguments = _arguments(folder, epochs, steps, batch_size, learning_rate, seed, progress)
    with alone_in(folder):
        trainer = _trainer(source, splits, arguments, config, max_length)
        checkpoint = folder / "coding.safetensors"
        fitted = _train(trainer, folder, checkpoint, resume)
        set_seed(seed)  # or where coding begins would depend on how often training was interrupted
        rate = trainer.refit_learning_rate(distill)
        report = trainer.compress(
            out, options=CodingOptions(groups, refit_steps, rate), distill=distill, checkpoint=checkpoint,
            log_folder=folder, overwrite=overwrite,
        )  # fmt: skip
        return FitReport(report, fitted, _figures(trainer))


def _check(task: str, out: Path, overwrite: bool) -> None:
    """Refuse before any work what can only fail after it."""
    if task not in TASKS:
        raise OptionError(f"task: expected one of {TASKS}, found {task!r}; choose one of them")
    refuse_existing(out, overwrite)


def _train(trainer: MiracleTrainer, folder: Path, checkpoint: Path, resume: bool) -> dict[str, float]:
    """Train, or go on training, unless coding has begun; the evaluation's figures."""
    figures = folder / "fitted.json"
    if not resume:
        checkpoint.unlink(missing_ok=True)
    if checkpoint.exists() and figures.exists():
        return json.loads(figures.read_text(encoding="utf-8"))
    last = _last_checkpoint(folder) if resume else None
    if last is not None and last.is_done:
        trainer._load_from_checkpoint(str(last.folder))  # train() would make a step more
    else:
        _train_or_name_a_full_disk(trainer, folder, last)
    found = _figures(trainer)
    with writing(figures):
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
    source: Any, splits: Split, arguments: TrainingArguments, config: MiracleConfig, max_length: int
) -> MiracleTrainer:
    """The trainer of a model made variational; classes mean classification, else language modeling."""
    set_seed(arguments.seed)  # a new head starts at random
    tokenizer: Any = AutoTokenizer.from_pretrained(source)
    prepare = _classification if splits.class_names else _language_model
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


def _classification(source: Any, tokenizer: Any, splits: Split, max_length: int) -> tuple[Any, Any, Callable]:
    names = splits.class_names
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    model = AutoModelForSequenceClassification.from_pretrained(source, num_labels=len(names), **labels)

    def encode(rows: Any) -> Any:
        def one(batch: dict[str, list]) -> Any:
            texts = [batch[column] for column in splits.text_columns]
            return {**tokenizer(*texts, truncation=True, max_length=max_length), "labels": batch["labels"]}

        return rows.map(one, batched=True, remove_columns=rows.column_names)

    return model, DataCollatorWithPadding(tokenizer), encode


def _language_model(source: Any, tokenizer: Any, splits: Split, max_length: int) -> tuple[Any, Any, Callable]:
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.bos_token

    def one(batch: dict[str, list]) -> dict[str, list]:
        """Texts one after the other, cut into windows."""
        tokens = [t for text in batch[splits.text_columns[0]] for t in tokenizer(text)["input_ids"]]
        starts = range(0, max(1, len(tokens) - max_length + 1), max_length)
        return {"input_ids": [tokens[start : start + max_length] for start in starts if tokens]}

    def encode(rows: Any) -> Any:
        windows = rows.map(one, batched=True, remove_columns=rows.column_names)
        if not len(windows):
            raise DataError("data: expected texts with at least one token, found none; look at the file")
        return windows

    model = AutoModelForCausalLM.from_pretrained(source)
    return model, DataCollatorForLanguageModeling(tokenizer, mlm=False), encode


def _arguments(
    folder: Path, epochs: float, steps: int, batch: int, rate: float, seed: int, progress: bool
) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder), num_train_epochs=epochs, max_steps=steps, per_device_train_batch_size=batch,
        per_device_eval_batch_size=4 * batch, learning_rate=rate, warmup_steps=0.06, seed=seed,
        logging_steps=50, save_steps=200, save_total_limit=1, report_to=[], disable_tqdm=not progress,
        dataloader_pin_memory=torch.cuda.is_available(),
    )  # fmt: skip


def _accuracy(predictions: Any) -> dict[str, float]:
    return {"accuracy": float((predictions.predictions.argmax(-1) == predictions.label_ids).mean())}


def _figures(trainer: MiracleTrainer) -> dict[str, float]:
    found = trainer.evaluate()
    return {
        name.removeprefix("eval_"): found[name] for name in ("eval_loss", "eval_accuracy") if name in found
    }
