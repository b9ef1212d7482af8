"""Fine-tuning for a small difference: all-MiniLM-L6-v2 with a head on SST-2, beside tuning first.

    python benchmarks/delta_fit.py --tune                                the fine-tune of deltas.py
    python benchmarks/delta_fit.py --method fit --sizes 131000 266000    priors around the base
    python benchmarks/delta_fit.py --method plain --sizes 131000         that fine-tune, compressed
    python benchmarks/delta_fit.py --method ratio --weight 1e-6 --sizes 131000   one under a penalty

A row has bytes (all safetensors files, and what config.json states of the base), accuracy, and how much of
the gain of the fine-tune over the head alone is left. All start at the same head; steps include refits.
Settings are chosen on `dev.tsv`, a part of the official training set; `test.tsv`,
the official development set, is for figures.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from deltas import Task, file_bytes, load, measured, note_ends
from record import RESULTS, record
from torch import nn
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments

import miracle_hub
from miracle_hub import CodingOptions, MiracleConfig, MiracleTrainer, UpdatePenalty

PENALTIES = ("ratio", "l1", "l2")


def trainer(kind: Any, task: Task, model: nn.Module, steps: int, rate: float, callbacks: Any = ()) -> Any:
    """One of either kind, with the options of deltas.py's fine-tune, but for batches of like lengths."""
    arguments = TrainingArguments(
        output_dir=str(task.folder / "trainer"), max_steps=steps, per_device_train_batch_size=32,
        learning_rate=rate, seed=0, warmup_steps=0.06, train_sampling_strategy="group_by_length", bf16=True,
        use_cpu=True, report_to=[], save_strategy="no", logging_steps=50, disable_tqdm=True,
        dataloader_pin_memory=False,
    )  # fmt: skip
    return kind(
        model=model, args=arguments, train_dataset=task.splits["train"], data_collator=task.collator,
        callbacks=list(callbacks), processing_class=task.tokenizer,
    )  # fmt: skip


def as_loaded(task: Task, out: Path) -> tuple[int, nn.Module]:
    """Bytes of a file, and the model that plain from_pretrained makes of it."""
    config = MiracleConfig(base=task.base)
    model = AutoModelForSequenceClassification.from_pretrained(out, quantization_config=config)
    return file_bytes(out), model.float()


def fitted(task: Task, size: int, a: argparse.Namespace) -> tuple[int, nn.Module]:
    """Fitted for a size, and coded with refits."""
    out, model = task.folder / "fitted", load(task.headed)
    options: dict[str, Any] = {"parametrization": a.parametrization, "target_modules": a.target_modules}
    options |= {"kl_block_weights": a.kl_block, "window_bits": a.window_bits}
    miracle_hub.make_variational(model, MiracleConfig(size=size, base=task.base, **options))
    steps = a.steps - (a.groups - 1) * a.refit
    tuner = trainer(MiracleTrainer, task, model, steps, a.fit_rate)
    tuner.train()
    print("before coding", task.accuracies(model), flush=True)
    coding = CodingOptions(a.groups, a.refit, a.refit_rate)
    tuner.compress(out, options=coding, overwrite=True, log_folder=task.folder)
    return as_loaded(task, out)


def tuned(task: Task, a: argparse.Namespace) -> Path:
    """The fine-tune under a penalty, made once; or that without."""
    if a.method == "plain":
        return task.tuned
    folder = task.folder / f"tuned-{a.method}-{a.weight:g}"
    if not folder.exists():
        model: Any = load(task.headed)
        penalty = UpdatePenalty(model, a.method, a.weight)
        trainer(Trainer, task, model, a.steps, a.rate, [penalty]).train()
        model.save_pretrained(folder)
        task.tokenizer.save_pretrained(folder)
        print(folder.name, task.accuracies(model), flush=True)
    return folder


def compressed(task: Task, size: int, a: argparse.Namespace) -> tuple[int, nn.Module]:
    """A fine-tune through `compress` with a base, calibrated on training sentences."""
    out, source = task.folder / "compressed", tuned(task, a)
    calibrate = "none" if a.effort < 0 else str(task.texts())
    miracle_hub.compress(
        source, out, size=size, base=task.base, calibrate=calibrate, effort=max(0, a.effort), overwrite=True,
        progress=False,
    )  # fmt: skip
    return as_loaded(task, out)


def setting(a: argparse.Namespace) -> str:
    """What tells a row from others of its method and size."""
    if a.method == "fit":
        return f"{a.parametrization}, {a.target_modules}, {a.steps} steps at {a.fit_rate:g}"
    weight = "" if a.method == "plain" else f"weight {a.weight:g}, "
    return weight + ("not calibrated" if a.effort < 0 else f"calibrated, effort {a.effort}")


def keep(task: Task, size: int, a: argparse.Namespace) -> None:
    """Measure a file and put it among the rows of before."""
    started = time.monotonic()
    n_bytes, model = (fitted if a.method == "fit" else compressed)(task, size, a)
    n_weights = sum(parameter.numel() for parameter in model.parameters())
    row = {"method": a.method, "setting": setting(a), "size": size, "bytes": n_bytes}
    row |= {"bits_per_weight": 8 * n_bytes / n_weights, "seconds": round(time.monotonic() - started)}
    row |= measured(task, model)
    print(json.dumps(row), flush=True)
    path, ends = RESULTS / "delta-fit.json", json.loads((task.folder / "ends.json").read_text())
    before = json.loads(path.read_text())["results"]["rows"] if path.exists() else []
    own = ("method", "setting", "size")
    kept = [other for other in before if any(other[name] != row[name] for name in own)]
    facts = {"n_weights": n_weights, **{name: ends[name] for name in ("headed", "tuned")}}
    record("delta-fit", {**facts, "rows": [*kept, row]})


def main() -> None:
    """Tune, or measure rows."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--folder", type=Path, default=Path("deltas-work"))
    p.add_argument("--tune", action="store_true")
    p.add_argument("--method", choices=("fit", "plain", *PENALTIES))
    p.add_argument("--sizes", nargs="+", type=int, default=[131_000])
    p.add_argument("--steps", type=int, default=600)
    p.add_argument("--rate", type=float, default=1e-4)
    p.add_argument("--fit-rate", type=float, default=1e-3)
    p.add_argument("--refit-rate", type=float, default=5e-4)
    p.add_argument("--groups", type=int, default=11)
    p.add_argument("--refit", type=int, default=15)
    p.add_argument("--parametrization", default="mean-kl")
    p.add_argument("--target-modules", default="all-linear")
    p.add_argument("--kl-block", type=int, default=128)
    p.add_argument("--window-bits", type=int, default=14)
    p.add_argument("--weight", type=float, default=1e-6)
    p.add_argument("--effort", type=int, default=1, help="of calibration; -1 for none")
    p.add_argument("--threads", type=int, default=1)
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    task = Task(a.folder)
    if a.tune:
        task.tune(a.steps, a.rate)
        note_ends(task)
    for size in a.sizes if a.method else ():
        keep(task, size, a)


if __name__ == "__main__":
    main()
