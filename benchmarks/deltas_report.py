"""A fine-tune as a small file beside its base, in docs/results.md."""

from typing import Any

from figures import load

_HEAD = """## A fine-tune beside its base

all-MiniLM-L6-v2 with a head, tuned on SST-2 ({n_weights:,} weights; `benchmarks/deltas.py`). With the head
alone {headed[test]:.2f} % of test are right ({headed[dev]:.2f} of dev), after the fine-tune {tuned[test]:.2f}
({tuned[dev]:.2f}); gain is the share of that difference which is left. Bytes are whole files, with what
config.json states of the base. A sentence of test is {step:.2f} % of the gain. Of fit --delta the
time was not taken; all ran beside other work. Others leave word tables whole in bfloat16, 23.7 MB of theirs,
as their papers do; xz takes all of the difference. NNCodec was not run on it."""
_COLUMNS = ("method", "setting", "bytes", "bits per weight", "dev %", "gain on dev, %", "test %")
_COLUMNS += ("gain on test, %", "KL to the tune, test", "seconds")


def section() -> str:
    """One row per file, ours first."""
    results = load("deltas")["results"]
    gain = results["tuned"]["test"] - results["headed"]["test"]
    step = 100 * (100 / 872) / gain
    lines = [
        _HEAD.format(step=step, **results),
        "",
        f"| {' | '.join(_COLUMNS)} |",
        "|---" * len(_COLUMNS) + "|",
        *(_row(row) for row in sorted(results["rows"], key=_order)),
    ]
    return "\n".join(lines)


def _order(row: dict[str, Any]) -> tuple[int, str, float]:
    ours = ("data-free", "self", "calibrated", "fit --delta")
    place = ours.index(row["method"]) if row["method"] in ours else len(ours)
    return place, row["method"] if place == len(ours) else "", -row["bytes"]


def _row(row: dict[str, Any]) -> str:
    figures = [f"{row['bytes']:,}", f"{row['bits_per_weight']:.3f}"]
    for split in ("dev", "test"):
        figures += [f"{row[split]:.2f}", f"{row[f'{split} gain']:.1f}"]
    figures += [f"{row['test kl']:.4f}", "" if row["seconds"] is None else f"{row['seconds']:.0f}"]
    return f"| {row['method']} | {row['setting']} | {' | '.join(figures)} |"
