"""A causal language model without calibration: stories260K at several whole-file rates, nats per token.

    python benchmarks/stories.py

The model has 260,032 weights, the smallest of karpathy/tinyllamas. Text: the first 30
windows of the TinyStories sample as it is, 512 tokens each with the token for a beginning. Model
and text are read from the data folder (MIRACLE_DATA, else ../shared/data).
"""

import math
import tempfile
from pathlib import Path
from typing import Any

import torch
from record import DATA, record
from transformers import AutoModelForCausalLM, AutoTokenizer

import miracle_hub

_MODEL, _TEXT = DATA / "tinyllama_260k" / "hf", DATA / "tinystories" / "tinystories_sample.txt"
_RATES = (2.0, 3.0, 4.0, 6.0)
_WINDOW, _WINDOWS = 512, 30


@torch.inference_mode()
def nats_per_token(folder: Path) -> float:
    """Mean loss of every token but the first ones."""
    tokenizer = AutoTokenizer.from_pretrained(_MODEL)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokens = tokenizer(_TEXT.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
    total, count = 0.0, 0
    for start in range(0, _WINDOWS * (_WINDOW - 1), _WINDOW - 1):
        ids = torch.tensor([[1, *tokens[start : start + _WINDOW - 1]]])
        n = ids.shape[1] - 1
        total += float(model(input_ids=ids, labels=ids).loss) * n
        count += n
    return total / count


def row(rate: float) -> dict[str, Any]:
    """Compress at one rate and evaluate what plain from_pretrained loads."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "compressed"
        report = miracle_hub.compress(_MODEL, out, bits_per_weight=rate, calibrate=None, progress=False)
        nats = nats_per_token(out)
    found = {
        "asked": rate,
        "bits_per_weight": round(report.bits_per_weight, 4),
        "bytes": report.compressed_bytes,
        "nats_per_token": round(nats, 4),
        "perplexity": round(math.exp(nats), 2),
        "digest": report.digest,
    }
    print(found, flush=True)
    return found


def main() -> None:
    """Measure and record."""
    dense = nats_per_token(_MODEL)
    results = {
        "dense": {"nats_per_token": round(dense, 4), "perplexity": round(math.exp(dense), 2)},
        "compressed": [row(rate) for rate in _RATES],
    }
    record("stories", results)


if __name__ == "__main__":
    main()
