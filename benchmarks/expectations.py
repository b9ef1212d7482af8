"""What to expect of a size, in docs/choosing.md: a model of every family at several rates, of the zoo."""

from zoo_report import SHOWN, Column
from zoo_rows import OURS, Row, known

# Family → the model that stands for it, and what is told of it.
_FAMILIES: dict[str, tuple[str, Column]] = {
    "causal language model": ("smollm2", Column("relative", "perplexity, of dense", 2)),
    "small causal language model": ("stories260k", Column("relative", "perplexity, of dense", 2)),
    "sentence encoder": ("minilm", Column("spearman", "STS-B, dense 82.0", 1)),
    "speech to text": ("whisper-base", Column("nats_over", "nats per token over dense", 3)),
    "convolutional classifier": ("resnet44", Column("agreement", "% of answers as dense", 1)),
    "small convolutional classifier": ("lenet5", Column("agreement", "% of answers as dense", 1)),
}
_BITS = (4.0, 3.0, 2.0, 1.5, 1.0)
_HEADS = {"data-free": "`none`", "self": "`self`", "calibrated": "data"}


def table() -> str:
    """Families × what is calibrated on, at bits per weight of the whole file; blank what nobody measured."""
    rows = known("test")
    heads = " | ".join(f"{bits:g} bit{'s' * (bits != 1)}" for bits in _BITS)
    lines = [f"| what | `--calibrate` | {heads} |", "|---" * (2 + len(_BITS)) + "|"]
    for family, (name, column) in _FAMILIES.items():
        told = f"{family}: {SHOWN[name].title}, {column.heading}"
        for method in OURS:
            found = [row for row in rows if (row["model"], row["method"]) == (name, method)]
            if found:
                lines.append(f"| {told} | {_HEADS[method]} | {' | '.join(_cells(found, column))} |")
                told = ""
    return "\n".join(lines)


def _cells(rows: list[Row], column: Column) -> list[str]:
    by_bits = {row["setting"]: row["quality"] for row in rows if not row["setting"].startswith("=")}
    found = [by_bits.get(f"{bits:g}") for bits in _BITS]
    return ["" if quality is None else f"{quality[column.key]:,.{column.digits}f}" for quality in found]
