"""What coding reports as it goes: rows in a CSV file, all of it as JSON, and a plot."""

import csv
import json
import math
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path


@dataclass(frozen=True)
class Row:
    """One group of blocks.

    Attributes:
        group: its number, from 1.
        coded_values: values that are coded after it.
        kl_bits: KL of its posterior to the prior when it was coded.
        log_weight_gap_bits: log2 q/p of the chosen candidates, less that KL: near 0 if the message is as long
            as it must be, below if it is too short.
        loss: of the last refit step before it.
        validation: what `validate` said after it.
    """

    group: int
    coded_values: int
    kl_bits: float
    log_weight_gap_bits: float
    loss: float
    validation: float


@dataclass
class Journal:
    """Rows of a coding run; with a folder also `coding.csv`, `coding.json` and `coding.png` there."""

    folder: Path | None = None
    rows: list[Row] = field(default_factory=list)

    def add(self, row: Row) -> None:
        self.rows.append(row)
        if self.folder is not None:
            self._write_csv()

    def finish(self) -> None:
        """Write the JSON file and the plot, if there is a folder."""
        if self.folder is not None:
            rows = [{k: _json_number(v) for k, v in asdict(row).items()} for row in self.rows]
            (self.folder / "coding.json").write_text(json.dumps(rows, indent=1) + "\n")
            self.plot(self.folder / "coding.png")

    def plot(self, path: Path) -> None:
        """KL and log weight gap per group, and loss and validation over coding, as a PNG.

        Raises:
            ImportError: matplotlib is not installed.
        """
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 6), layout="constrained")
        upper, lower = figure.subplots(2, 1, sharex=True)
        share = [row.coded_values / self.rows[-1].coded_values for row in self.rows]
        upper.plot(share, [row.kl_bits for row in self.rows], label="KL of the group, bits")
        upper.plot(share, [row.log_weight_gap_bits for row in self.rows], label="log weight gap, bits")
        lower.plot(share, [row.loss for row in self.rows], label="loss")
        if not all(math.isnan(row.validation) for row in self.rows):
            lower.twinx().plot(share, [row.validation for row in self.rows], "C1", label="validation")
            lower.plot([], [], "C1", label="validation (right)")
        lower.set_xlabel("share of the values that is coded")
        for axes in (upper, lower):
            axes.legend()
        figure.savefig(path, dpi=110)

    def _write_csv(self) -> None:
        assert self.folder is not None
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "coding.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow([f.name for f in fields(Row)])
            writer.writerows([list(asdict(row).values()) for row in self.rows])


def _json_number(value: float) -> float | None:
    return None if isinstance(value, float) and math.isnan(value) else value
