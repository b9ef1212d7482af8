"""LoRA adapters, in docs/results.md."""

from typing import Any

from figures import load

_HEAD = """## LoRA adapters

Rank {rank} in all linear layers of all-MiniLM-L6-v2, tuned on SST-2 (`benchmarks/adapters.py`): {n_weights:,}
weights, the head among them. Bytes are adapter_model.safetensors and adapter_config.json; error is that of
the products B·A, squared, over their square."""
_COLUMNS = ("adapter", "bits per weight", "bytes", "of 16 bits", "error", "test %")


def adapters() -> str:
    """The adapter in 16 bits, then one row per file."""
    results = load("adapters")["results"]
    dense = results["fp16"]
    return "\n".join(
        [
            _HEAD.format(rank=results["options"]["rank"], n_weights=results["n_weights"]),
            "",
            f"| {' | '.join(_COLUMNS)} |",
            "|---" * len(_COLUMNS) + "|",
            f"| 16 bits |  | {dense['bytes']:,} | 100 % |  | {dense['test']:.2f} |",
            *(_row(row, dense["bytes"]) for row in results["rows"]),
        ]
    )


def _row(row: dict[str, Any], dense_bytes: int) -> str:
    figures = [row["kind"], f"{row['bits_per_weight']:.2f}", f"{row['bytes']:,}"]
    figures += [f"{100 * row['bytes'] / dense_bytes:.1f} %", f"{row['error']:.4f}"]
    return f"| {' | '.join([*figures, format(row['test'], '.2f')])} |"
