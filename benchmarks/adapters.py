"""A LoRA adapter as a smaller file: rank 8 in all linear layers of all-MiniLM-L6-v2, tuned on SST-2.

    python benchmarks/adapters.py --tune                the adapter, in 16 bits: minutes
    python benchmarks/adapters.py --bits 2 3 4          rows of results/adapters.json

Both kinds of rows are of the same bytes: factors balanced, as `miracle compress` has them, and as they were
trained. Bytes are of adapter_model.safetensors and adapter_config.json. `test.tsv` is the official
development set, from which nothing is chosen.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from record import record
from safetensors.torch import load_file, save_file
from sst2 import accuracy, rows, source
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding

import miracle_hub
from miracle_hub.codec import adapter as coding
from miracle_hub.codec.factors import squared, squared_distance

_FILES = ("adapter_model.safetensors", "adapter_config.json")
_LAYERS = ["query", "key", "value", "dense"]
_RANK, _BATCH = 8, 32


class Task:
    """The data, and the folders."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.base, self.adapter = folder, folder / "base", folder / "adapter"
        self.tokenizer: Any = AutoTokenizer.from_pretrained(source())
        self.collator = DataCollatorWithPadding(self.tokenizer)

    def tune(self, steps: int, rate: float) -> None:
        """Write the base with a new head, and an adapter with a tuned one."""
        torch.manual_seed(0)
        train = sorted(rows("train", self.tokenizer), key=lambda row: len(row["input_ids"]))
        AutoModelForSequenceClassification.from_pretrained(source(), num_labels=2).save_pretrained(self.base)
        config = LoraConfig(task_type="SEQ_CLS", r=_RANK, lora_alpha=2 * _RANK, target_modules=_LAYERS)
        model: Any = get_peft_model(self._dense(), config)
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, rate)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps, pct_start=0.06)
        model.train()
        for step in range(steps):
            first = int(torch.randint(len(train) - _BATCH, ()))  # sentences of nearly the same length
            loss = model(**self.collator(train[first : first + _BATCH])).loss
            loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            if step % 25 == 0:
                print(step, f"{loss.item():.4f}", flush=True)
        model.save_pretrained(self.adapter)
        path = self.adapter / _FILES[0]
        save_file({name: t.half() for name, t in load_file(path).items()}, path, {"format": "pt"})

    def _dense(self) -> Any:
        return AutoModelForSequenceClassification.from_pretrained(self.base)

    def accuracy(self, adapter: Path) -> float:
        """In percent, as PEFT loads an adapter."""
        model: nn.Module = PeftModel.from_pretrained(self._dense(), adapter)
        return accuracy(model, rows("test", self.tokenizer), self.collator)

    def error(self, out: Path) -> float:
        """Squared error of the products of all factors over their square."""
        dense = load_file(self.adapter / _FILES[0])
        found = miracle_hub.load_state_dict(out)
        pairs = [(name.replace("lora_A", "lora_B"), name) for name in dense if "lora_A" in name]
        kept = [((dense[b], dense[a]), (found[b], found[a])) for b, a in pairs]
        return sum(squared_distance(*two) for two in kept) / sum(squared(*pair) for pair, _ in kept)

    def row(self, bits: float, kind: str) -> dict[str, Any]:
        """One file."""
        out, started = self.folder / f"{kind}-{bits:g}", time.monotonic()
        report = miracle_hub.compress(self.adapter, out, bits_per_weight=bits, overwrite=True, progress=False)
        print("\n".join(report.notes), flush=True)
        seconds = round(time.monotonic() - started, 1)
        found = {"kind": kind, "bits_per_weight": report.bits_per_weight, "bytes": n_bytes(out)}
        return found | {"seconds": seconds, "error": self.error(out), "test": self.accuracy(out)}


def n_bytes(folder: Path) -> int:
    """Of what PEFT reads."""
    return sum((folder / name).stat().st_size for name in _FILES)


def measure(task: Task, bits: list[float], kinds: list[str], options: dict[str, Any]) -> None:
    """The adapter in 16 bits, and rows of kinds; every one is noted as soon as it is there."""
    n_weights = sum(tensor.numel() for tensor in load_file(task.adapter / _FILES[0]).values())
    dense = {"bytes": n_bytes(task.adapter), "test": task.accuracy(task.adapter)}
    found: dict[str, Any] = {"n_weights": n_weights, "options": options, "fp16": dense, "rows": []}
    print(json.dumps(found), flush=True)
    for kind in kinds:
        if kind == "as-trained":
            coding.why_not_balanced = lambda config: "to compare"
        for each in bits:
            found["rows"].append(task.row(each, kind))
            print(json.dumps(found["rows"][-1]), flush=True)
            record("adapters", found)


def main() -> None:
    """Tune, or measure rows."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--folder", type=Path, default=Path("adapters-work"))
    p.add_argument("--tune", action="store_true")
    p.add_argument("--steps", type=int, default=250)
    p.add_argument("--rate", type=float, default=2e-3)
    p.add_argument("--bits", nargs="*", type=float, default=[])
    p.add_argument("--kinds", nargs="+", default=["balanced", "as-trained"])
    p.add_argument("--threads", type=int, default=2)
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    task = Task(a.folder)
    if a.tune:
        task.tune(a.steps, a.rate)
    if a.bits:
        measure(task, a.bits, a.kinds, {"steps": a.steps, "rate": a.rate, "rank": _RANK, "layers": _LAYERS})


if __name__ == "__main__":
    main()
