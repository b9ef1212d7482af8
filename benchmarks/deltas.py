"""A fine-tune as a small file beside its base: all-MiniLM-L6-v2 with a head tuned on SST-2.

    python benchmarks/deltas.py --tune                        the base with a head, and its fine-tune: minutes
    python benchmarks/deltas.py --method data-free --bits 0.3 a row of results/deltas.json
    python benchmarks/deltas.py --method peers                those of all others

A row has the whole file (all safetensors files, and what config.json states of the base), accuracy, and how
much of the gain of the fine-tune over the head alone is left. Settings are chosen on `dev.tsv`, a part of the
official training set; `test.tsv`, the official development set, is for figures. Calibration sees training
sentences without labels.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deltas_peers
import torch
from record import DATA, RESULTS, record
from sst2 import rows, source
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

import miracle_hub

# Sentences that the head is fitted to, and those that calibration sees.
_HEAD_ROWS, _CALIBRATION_ROWS = 8192, 16384
# Of the head alone; without it answers are so sure that the fine-tune begins with a loss of 2.
_DECAY = 1e-3


class Task:
    """The data and the models, in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.tuned, self.headed = folder, folder / "tuned", folder / "headed"
        self.tokenizer: Any = AutoTokenizer.from_pretrained(source())
        self.collator = DataCollatorWithPadding(self.tokenizer)
        self.splits = {name: rows(name, self.tokenizer) for name in ("train", "dev", "test")}

    @property
    def base(self) -> Path:
        """Without a head."""
        return Path(source())

    def right(self, logits: Tensor, split: str) -> float:
        """Of a split's sentences, in percent."""
        labels = torch.tensor([row["labels"] for row in self.splits[split]])
        return 100 * float((logits.argmax(1) == labels).float().mean())

    def accuracies(self, model: nn.Module) -> dict[str, float]:
        """In percent."""
        return {split: self.right(self.logits(model, split), split) for split in ("dev", "test")}

    def logits(self, model: nn.Module, split: str, n_rows: int | None = None) -> Tensor:
        """Of the first rows of a split."""
        data, found = self.splits[split][:n_rows], []
        with torch.inference_mode():
            for first in range(0, len(data), 128):
                batch = self.collator(data[first : first + 128])
                batch.pop("labels")
                found.append(model.eval()(**batch).logits)
        return torch.cat(found)

    def texts(self) -> Path:
        """Training sentences, without labels."""
        lines = (DATA / "glue" / "SST-2" / "train.tsv").read_text(encoding="utf-8").splitlines()[1:]
        path = self.folder / "texts.txt"
        path.write_text("\n".join(line.rsplit("\t", 1)[0] for line in lines[:_CALIBRATION_ROWS]) + "\n")
        return path

    def tune(self, steps: int, rate: float) -> None:
        """Fit the head alone, then everything."""
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_pretrained(source(), num_labels=2)
        self._fit_head(model)
        model.save_pretrained(self.headed)
        self.tokenizer.save_pretrained(self.headed)
        arguments = TrainingArguments(
            output_dir=str(self.folder / "trainer"), max_steps=steps, per_device_train_batch_size=32,
            learning_rate=rate, seed=0, warmup_steps=0.06, bf16=True, use_cpu=True, report_to=[],
            save_strategy="no", logging_steps=100, disable_tqdm=True, dataloader_pin_memory=False,
        )  # fmt: skip
        data: Any = self.splits["train"]
        Trainer(model=model, args=arguments, train_dataset=data, data_collator=self.collator).train()
        model.save_pretrained(self.tuned)
        self.tokenizer.save_pretrained(self.tuned)

    def _fit_head(self, model: Any) -> None:
        data, features = self.splits["train"][:_HEAD_ROWS], []
        with torch.inference_mode():
            for first in range(0, len(data), 128):
                batch = self.collator(data[first : first + 128])
                batch.pop("labels")
                features.append(model.eval().bert(**batch).pooler_output)
        x, y = torch.cat(features).clone(), torch.tensor([row["labels"] for row in data])
        optimizer = torch.optim.LBFGS(model.classifier.parameters(), max_iter=200)

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model.classifier(x), y)
            loss = loss + _DECAY * model.classifier.weight.square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)


def load(folder: Path) -> nn.Module:
    """A model in float32."""
    return AutoModelForSequenceClassification.from_pretrained(folder).float()


def measured(task: Task, model: nn.Module) -> dict[str, float]:
    """Accuracy, and how much of the gain over the head alone is left, in percent."""
    known = json.loads((task.folder / "ends.json").read_text())
    found: dict[str, float] = {}
    for split in ("dev", "test"):
        logits = task.logits(model, split)
        found[split] = task.right(logits, split)
        gain = known["tuned"][split] - known["headed"][split]
        found[f"{split} gain"] = 100 * (found[split] - known["headed"][split]) / gain
        own = logits.log_softmax(1)
        dense = torch.tensor(known["logits"][split]).log_softmax(1)
        found[f"{split} agreement"] = 100 * float((own.argmax(1) == dense.argmax(1)).float().mean())
        found[f"{split} kl"] = float((dense.exp() * (dense - own)).sum(1).mean())
    return found


def note_ends(task: Task) -> None:
    """What the head alone and the fine-tune reach."""
    found: dict[str, Any] = {}
    for name, folder in (("headed", task.headed), ("tuned", task.tuned)):
        model = load(folder)
        logits = {split: task.logits(model, split) for split in ("dev", "test")}
        found[name] = {split: task.right(own, split) for split, own in logits.items()}
        print(name, found[name], flush=True)
        found["logits"] = {split: own.tolist() for split, own in logits.items()}
    (task.folder / "ends.json").write_text(json.dumps(found))


def file_bytes(folder: Path) -> int:
    """Of all safetensors files, and of what config.json states of the base."""
    config = json.loads((folder / "config.json").read_text())
    stated = json.dumps(config["quantization_config"].get("base_model", {}), separators=(",", ":"))
    return sum(path.stat().st_size for path in folder.glob("*.safetensors")) + len(stated)


def ours(task: Task, bits: float, options: dict[str, Any]) -> tuple[int, nn.Module]:
    """A file of ours, and what plain from_pretrained makes of it."""
    out = task.folder / "out"
    given = {"bits_per_weight": bits, "base": task.base, "overwrite": True, "progress": False, **options}
    report = miracle_hub.compress(task.tuned, out, **given)
    print(report.base, report.n_same, report.n_differing, len(report.differences_left_out), flush=True)
    print("\n".join(report.calibration_lines), flush=True)
    config = miracle_hub.MiracleConfig(base=task.base)
    model = AutoModelForSequenceClassification.from_pretrained(out, quantization_config=config)
    return file_bytes(out), model


def keep(task: Task, method: str, setting: str, make: Callable[[], tuple[int, nn.Module]]) -> None:
    """Measure a file and put it among the rows of before."""
    started = time.monotonic()
    n_bytes, model = make()
    seconds = time.monotonic() - started
    n_weights = sum(p.numel() for p in model.parameters())
    row = {"method": method, "setting": setting, "bytes": n_bytes, "bits_per_weight": 8 * n_bytes / n_weights}
    row |= {"seconds": round(seconds, 1), **measured(task, model.float())}
    path = RESULTS / "deltas.json"
    ends = json.loads((task.folder / "ends.json").read_text())
    facts = {"n_weights": n_weights, **{name: ends[name] for name in ("headed", "tuned")}}
    before = json.loads(path.read_text())["results"]["rows"] if path.exists() else []
    kept = [r for r in before if (r["method"], r["setting"]) != (method, setting)]
    print(json.dumps(row), flush=True)
    record("deltas", {**facts, "rows": [*kept, row]})


def main() -> None:
    """Tune, or measure rows."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--folder", type=Path, default=Path("deltas-work"))
    p.add_argument("--tune", action="store_true")
    p.add_argument("--steps", type=int, default=600)
    p.add_argument("--rate", type=float, default=1e-4)
    p.add_argument("--method", choices=("data-free", "self", "calibrated", "peers", *deltas_peers.METHODS))
    p.add_argument("--bits", nargs="+", type=float, default=[0.3])
    p.add_argument("--effort", type=int, default=1)
    p.add_argument("--window-bits", type=int, default=14)
    p.add_argument("--threads", type=int, default=2)
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    task = Task(a.folder)
    if a.tune:
        task.tune(a.steps, a.rate)
        note_ends(task)
    how = {"data-free": "none", "self": "self", "calibrated": str(task.texts()) if a.method else ""}
    for bits in a.bits if a.method in how else ():
        options = {"calibrate": how[a.method], "effort": a.effort, "window_bits": a.window_bits}
        setting = f"{bits:g}" + ("" if a.method == "data-free" else f", effort {a.effort}")
        keep(task, a.method, setting, lambda bits=bits, options=options: ours(task, bits, options))
    for method, made in deltas_peers.METHODS.items():
        if a.method not in ("peers", method):
            continue
        keep(task, method, "", lambda made=made: made(task, load(task.tuned), load(task.headed)))


if __name__ == "__main__":
    main()
