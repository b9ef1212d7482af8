"""The rule of rates that needs no data, in docs/results.md: how far models are from dense under each."""

import json

import record

_TITLES = {
    "minilm": "all-MiniLM-L6-v2: encoder",
    "stories260k": "stories260K: causal, tied head",
    "smollm2": "SmolLM2-135M: causal, tied head",
    "stories260k-untied": "stories260K with a copy of the word table as its head",
    "resnet20": "ResNet-20: convolutions",
    "whisper-base": "whisper-base: speech, tied head; kept apart",
    "resnet44": "ResNet-44: convolutions; kept apart",
    "lenet5": "LeNet-5: convolutions and matrices; kept apart",
}
_BITS = (4.0, 3.0, 2.0, 1.0)
_HEAD = """## The rule without data

What models lose where nobody runs them, under several rules of rates (`benchmarks/size_rule.py`): KL to the
dense model in nats per token or image, of the encoder mean 1 − cosine, on dev data, at bits per weight of the
whole file. Every tensor has errors of the size that its code would leave, in the mean over some draws.
Rows of other numbers of draws compare roughly only: one draw differs from another by a tenth or so. No rule
was chosen by losses of the models that are kept apart. But gradients of ResNet-44 and LeNet-5 had been seen,
and that half of the matrices makes a network convolutional was set so that LeNet-5 is one."""


def section() -> str:
    """The table."""
    rows = json.loads((record.RESULTS / "size_rule.json").read_text())["results"]["rows"]
    found: dict[tuple[str, str, int], dict[float, float]] = {}
    for row in rows:
        found.setdefault((row["case"], row["rule"], row["seeds"]), {})[row["bits"]] = row["divergence"]
    lines = ["| model | rule | draws | 4 bits | 3 bits | 2 bits | 1 bit |", "|---|---|---|---|---|---|---|"]
    lines += [_line(*key, found[key]) for key in sorted(found, key=_place)]
    return "\n".join([_HEAD, "", *lines])


def _place(key: tuple[str, str, int]) -> tuple[int, bool, bool, str]:
    case, rule, _ = key
    return [*_TITLES].index(case), rule == "coded", rule != "size^0.6", rule


def _line(case: str, rule: str, draws: int, losses: dict[float, float]) -> str:
    cells = [f"{losses[bits]:.4f}" if bits in losses else "" for bits in _BITS]
    return f"| {_TITLES[case]} | {rule} | {draws} | {' | '.join(cells)} |"
