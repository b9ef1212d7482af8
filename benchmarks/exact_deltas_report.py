"""Lossless differences, in docs/results.md."""

from typing import Any

from figures import load

_HEAD = """## A fine-tune beside its base, lossless

Every bit of it (`benchmarks/exact_deltas.py`): our whole file beside general compressors of the standard
library, of the tune itself, of the bits in which it is not the base (xor), also in byte planes, and of the
numbers' difference (minus), which may not give every bit back. Predicted is what an ideal code would take for
Gaussian moves of the same mean size, tensor by tensor; a word table of which few rows moved takes less. One
thread, seconds of the processor; ours have reading, comparing with the base and writing in them."""
_COLUMNS = ("fine-tune", "dtype", "method", "bytes", "of dense, %", "bits per weight")
_COLUMNS += ("encode, s", "decode, s")


def exact_deltas() -> str:
    """A row per fine-tune and method, ours first."""
    lines = [_HEAD, "", f"| {' | '.join(_COLUMNS)} |", "|---" * len(_COLUMNS) + "|"]
    for found in load("exact-deltas")["results"]:
        rate = 8 * found["predicted_bytes"] / found["n_weights"]
        predicted = {"method": "predicted", "bytes": found["predicted_bytes"], "bits_per_weight": rate}
        own, *others = found["rows"]
        for row in (own, predicted, *sorted(others, key=lambda row: row["bytes"])):
            lines.append(_row(found, row))
    return "\n".join(lines)


def _row(found: dict[str, Any], row: dict[str, Any]) -> str:
    figures = [f"{row['bytes']:,}", f"{100 * row['bytes'] / found['dense_bytes']:.1f}"]
    figures.append(f"{row['bits_per_weight']:.2f}")
    figures += [f"{row[kind]:.1f}" if kind in row else "" for kind in ("encode", "decode")]
    return f"| {found['what']} | {found['dtype']} | {row['method']} | {' | '.join(figures)} |"
