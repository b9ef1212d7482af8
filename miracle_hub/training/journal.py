"""What coding reports as it goes: rows in a CSV and a JSON file, and a plot."""

import csv
import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from miracle_hub.errors import OutputWriteError
from miracle_hub.files.whole import whole_file
from miracle_hub.training.message import Chosen


@dataclass(frozen=True)
class Row:
    """One group of blocks.

    Attributes:
        group: its number, from 1.
        coded_values: values that are coded after it.
        blocks: how many blocks it has.
        kl_bits: KL of its posterior to the prior when it was coded; of all its blocks together.
        least_block_kl_bits, largest_block_kl_bits: that of single blocks.
        log_weight_gap_bits: log2 q/p of the chosen candidates, less that KL: near 0 if the message is as long
            as it must be, below if it is too short, or cannot have its bits where the KL is.
        loss: of the last refit step before it.
        validation: what `validate` said after it.
    """

    group: int
    coded_values: int
    blocks: int
    kl_bits: float
    least_block_kl_bits: float
    largest_block_kl_bits: float
    log_weight_gap_bits: float
    loss: float
    validation: float


def row_of(group: int, coded_values: int, chosen: Sequence[Chosen], loss: float) -> Row:
    """The row of a group before its validation, from what its choices cost; see `Row`."""
    block_kl_bits = torch.cat([part.block_kl_nats for part in chosen]) / math.log(2)
    kl_bits = float(block_kl_bits.sum())
    log_weight_bits = sum(part.log_weight_nats for part in chosen) / math.log(2)
    return Row(
        group=group,
        coded_values=coded_values,
        blocks=len(block_kl_bits),
        kl_bits=kl_bits,
        least_block_kl_bits=float(block_kl_bits.min()),
        largest_block_kl_bits=float(block_kl_bits.max()),
        log_weight_gap_bits=log_weight_bits - kl_bits,
        loss=loss,
        validation=math.nan,
    )


@dataclass
class Journal:
    """Rows of a coding run; with a folder also `coding.csv`, `coding.json` and `coding.png` there.

    Attributes:
        plot_every_seconds: at least so long between two plots; the last rows are always plotted.
    """

    folder: str | Path | None = None
    rows: list[Row] = field(default_factory=list)
    plot_every_seconds: float = 60.0
    plotted_at: float = field(default_factory=time.monotonic, repr=False)

    def add(self, row: Row) -> None:
        """
        Raises:
            OutputWriteError: the files cannot be written.
        """
        self.rows.append(row)
        self._write(time.monotonic() - self.plotted_at >= self.plot_every_seconds)

    def replace_last(self, row: Row) -> None:
        """
        Raises:
            OutputWriteError: the files cannot be written.
        """
        self.rows[-1] = row
        self._write(True)

    def finish(self) -> None:
        """Write all files, if there is a folder.

        Raises:
            OutputWriteError: they cannot be written.
        """
        self._write(True)

    def plot(self, path: Path) -> None:
        """KL and log weight gap per block, and loss and validation, over coding, as a PNG.

        Raises:
            ImportError: matplotlib is not installed.
        """
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 8), layout="constrained")
        upper, middle, lower = figure.subplots(3, 1, sharex=True)
        share = [row.coded_values / self.rows[-1].coded_values for row in self.rows]
        least = [row.least_block_kl_bits for row in self.rows]
        largest = [row.largest_block_kl_bits for row in self.rows]
        upper.fill_between(share, least, largest, alpha=0.3, label="least to largest")
        upper.plot(share, [row.kl_bits / row.blocks for row in self.rows], label="KL of a block, bits, mean")
        gaps = [row.log_weight_gap_bits / row.blocks for row in self.rows]
        middle.plot(share, gaps, label="log weight gap of a block, bits, mean")
        lower.plot(share, [row.loss for row in self.rows], label="loss")
        if not all(math.isnan(row.validation) for row in self.rows):
            lower.twinx().plot(share, [row.validation for row in self.rows], "C1", label="validation")
            lower.plot([], [], "C1", label="validation (right)")
        lower.set_xlabel("share of the values that is coded")
        for axes in (upper, middle, lower):
            axes.legend()
        figure.savefig(path, dpi=110)

    def _write(self, with_plot: bool) -> None:
        if self.folder is None:
            return
        folder = Path(self.folder)
        rows = [asdict(row) for row in self.rows]
        plain = [{k: v if math.isfinite(v) else None for k, v in row.items()} for row in rows]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with whole_file(folder / "coding.csv") as path:
                _write_csv(path, rows)
            with whole_file(folder / "coding.json") as path:
                path.write_text(json.dumps(plain, indent=1) + "\n")
            if with_plot and self.rows:
                with whole_file(folder / "coding.png") as path:
                    self.plot(path)
                self.plotted_at = time.monotonic()
        except OSError as error:
            raise OutputWriteError(
                f"{folder}: the journal could not be written ({error}); choose another folder, or make room"
            ) from error


def _write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Row)])
        writer.writeheader()
        writer.writerows(rows)
