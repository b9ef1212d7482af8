"""Fine-tuning for a small difference, in docs/results.md."""

from typing import Any

from figures import load

_HEAD = """### Fine-tuning for it

The same model and task (`benchmarks/delta_fit.py`): priors around the base (`fit`), beside tuning first and
then compressing the difference to the same size, without and with a penalty on it (`ratio`, `l1`, `l2`). With
the head alone {headed[test]:.2f} % of test are right ({headed[dev]:.2f} of dev), after the dense fine-tune
{tuned[test]:.2f} ({tuned[dev]:.2f}). A sentence of test is {step:.1f} % of that gain."""
_COLUMNS = ("method", "setting", "bytes", "bits per weight", "dev %", "gain on dev, %", "test %")
_COLUMNS += ("gain on test, %",)


def delta_fit() -> list[str]:
    """A row per file, the smallest first."""
    results = load("delta-fit")["results"]
    step = 100 * (100 / 872) / (results["tuned"]["test"] - results["headed"]["test"])
    rows = sorted(results["rows"], key=lambda row: (row["size"], row["method"], row["setting"]))
    head = [_HEAD.format(step=step, **results), "", f"| {' | '.join(_COLUMNS)} |"]
    return [*head, "|---" * len(_COLUMNS) + "|", *map(_row, rows)]


def _row(row: dict[str, Any]) -> str:
    figures = [f"{row['bytes']:,}", f"{row['bits_per_weight']:.4f}"]
    for split in ("dev", "test"):
        figures += [f"{row[split]:.2f}", f"{row[f'{split} gain']:.1f}"]
    return f"| {row['method']} | {row['setting']} | {' | '.join(figures)} |"
