"""What each ingredient of calibration is worth, in docs/results.md."""

import json

import record
from zoo_report import SHOWN

_HEAD = """## What each ingredient is worth

Files of the same size, made with more and more of calibration (`benchmarks/ablation.py`): divergence from
dense on dev data, KL in nats per token or image, of the encoder mean 1 − cosine. Effort 1, windows of 12
bits. "Rates" alone is what errors cost, measured; "feedback" is where they are made."""


def section() -> str:
    """The table, as far as it was measured."""
    path = record.RESULTS / "ablation.json"
    if not path.exists():
        return f"{_HEAD}\n\nNot measured yet."
    found = json.loads(path.read_text())["results"]
    titles = [f"{SHOWN[name].title}, {of['bits_per_weight']:g} bits" for name, of in found.items()]
    lines = [f"| ingredients | {' | '.join(titles)} |", "|---" * (1 + len(titles)) + "|"]
    variants = dict.fromkeys(variant for of in found.values() for variant in of["divergence"])
    for variant in variants:
        cells = [f"{of['divergence'][variant]:.4f}" for of in found.values()]
        lines.append(f"| {variant} | {' | '.join(cells)} |")
    return "\n".join([_HEAD, "", *lines])
