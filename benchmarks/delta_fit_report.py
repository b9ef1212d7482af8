"""Fine-tuning for a small difference, in docs/results.md: MiniLM on SST-2, and a cleaner of JPEGs."""

from typing import Any

from figures import load

_FIT_HEAD = """### Fine-tuning for it

The same model and task (`benchmarks/delta_fit.py`): priors around the base (`fit`), beside tuning first and
then compressing the difference to the same size, without and with a penalty on it (`ratio`, `l1`, `l2`). With
the head alone {headed[test]:.2f} % of test are right ({headed[dev]:.2f} of dev), after the dense fine-tune
{tuned[test]:.2f} ({tuned[dev]:.2f}). A sentence of test is {step:.1f} % of that gain."""
_FIT_COLUMNS = ("method", "setting", "bytes", "bits per weight", "dev %", "gain on dev, %", "test %")
_FIT_COLUMNS += ("gain on test, %",)
_CLEANER_HEAD = """### A network tuned to images

A network of {n_weights:,} weights that cleans JPEGs, trained at quality {base_quality}, is tuned to a set of
images, and the update is sent beside their JPEG (`benchmarks/artifact_removal.py`). Gains are in dB of PSNR
over the network as it was; the last columns have what a JPEG of so many bytes more would have gained."""
_CLEANER_COLUMNS = ("set", "bytes of JPEG", "dense tune, dB", "method", "bytes of update", "gain, dB")
_CLEANER_COLUMNS += ("quality instead", "its gain, dB")
_NAMES = {"plain": "tuned, compressed", "ratio": "tuned under a penalty, compressed", "fit": "fit for it"}


def delta_fit() -> list[str]:
    """A row per file, the smallest first."""
    results = load("delta-fit")["results"]
    step = 100 * (100 / 872) / (results["tuned"]["test"] - results["headed"]["test"])
    rows = sorted(results["rows"], key=lambda row: (row["size"], row["method"], row["setting"]))
    table = _table(_FIT_COLUMNS, [_fit_row(row) for row in rows])
    return [_FIT_HEAD.format(step=step, **results), "", *table]


def _fit_row(row: dict[str, Any]) -> list[str]:
    figures = [f"{row['bytes']:,}", f"{row['bits_per_weight']:.4f}"]
    for split in ("dev", "test"):
        figures += [f"{row[split]:.2f}", f"{row[f'{split} gain']:.1f}"]
    return [row["method"], row["setting"], *figures]


def artifact_removal() -> list[str]:
    """A row per update."""
    results = load("artifact-removal")["results"]
    rows = [_cleaner_row(found, row) for found in results["sets"] for row in found["rows"]]
    return [_CLEANER_HEAD.format(**results), "", *_table(_CLEANER_COLUMNS, rows)]


def _cleaner_row(found: dict[str, Any], row: dict[str, Any]) -> list[str]:
    about = [found["set"], f"{found['jpeg_bytes']:,}", f"{found['dense_gain']:.3f}", _NAMES[row["method"]]]
    own = [f"{row['bytes']:,}", f"{row['gain']:.3f}"]
    return [*about, *own, str(row["same_bytes_quality"]), f"{row['same_bytes_gain']:.3f}"]


def _table(columns: tuple[str, ...], rows: list[list[str]]) -> list[str]:
    lines = [f"| {' | '.join(row)} |" for row in (list(columns), *rows)]
    return [lines[0], "|---" * len(columns) + "|", *lines[1:]]
