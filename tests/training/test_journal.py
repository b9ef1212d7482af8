"""What coding reports as it goes."""

import csv
import errno
import json
import math
from pathlib import Path
from typing import Any

import pytest

from miracle_hub.errors import OutputWriteError
from miracle_hub.training.coder import CodingOptions, code_model
from miracle_hub.training.journal import Journal, Row

from .networks import loss_of, variational_net

FILES = {"coding.csv", "coding.json", "coding.png"}
ROWS = [
    Row(1, 10, 2, 30.5, 15.0, 15.5, -2.0, math.nan, 0.5),
    Row(2, 15, 1, 15.0, 15.0, 15.0, -math.inf, 1.25, math.nan),
]


def read(folder: Path) -> tuple[list[dict[str, str]], list[dict[str, Any]]]:
    with (folder / "coding.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return rows, json.loads((folder / "coding.json").read_text(), parse_constant=pytest.fail)


def test_files_hold_every_row_as_soon_as_it_is_known(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "logs"
    journal = Journal(str(folder))
    plain: list[dict[str, Any]] = []
    for n, row in enumerate(ROWS, 1):
        journal.add(row)
        rows, plain = read(folder)
        assert len(rows) == len(plain) == n
        assert rows[-1] == {name: str(value) for name, value in vars(row).items()}
        assert not (folder / "coding.png").exists()  # a plot takes a while, and is made once a minute
    # JSON has neither NaN nor infinity.
    assert plain == [
        dict(zip(vars(ROWS[0]), values, strict=True))
        for values in [
            (1, 10, 2, 30.5, 15.0, 15.5, -2.0, None, 0.5),
            (2, 15, 1, 15.0, 15.0, 15.0, None, 1.25, None),
        ]
    ]
    journal.finish()
    assert {path.name for path in folder.iterdir()} == FILES
    assert (folder / "coding.png").read_bytes().startswith(b"\x89PNG\r\n")


def test_the_plot_is_made_again_while_coding_lasts(tmp_path: Path) -> None:
    journal, plots = Journal(tmp_path, plot_every_seconds=0), []
    for row in ROWS:
        journal.add(row)
        plots.append((tmp_path / "coding.png").read_bytes())
    assert plots[0] != plots[1]


def test_without_a_folder_nothing_is_written_and_rows_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    journal = Journal()
    journal.add(ROWS[0])
    journal.finish()
    assert journal.rows == ROWS[:1] and not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputWriteError) as raised:
        Journal(tmp_path / "file" / "logs").add(ROWS[0])
    message = str(raised.value)
    assert message.startswith(f"{tmp_path / 'file' / 'logs'}: the journal could not be written (")
    assert message.endswith("); choose another folder, or make room")


def test_a_write_that_fails_leaves_the_rows_of_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = Journal(tmp_path)
    journal.add(ROWS[0])

    def full(self: Path, text: str) -> None:
        self.write_bytes(text[:5].encode())
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched, pytest.raises(OutputWriteError, match="No space left on device"):
        patched.setattr(Path, "write_text", full)
        journal.add(ROWS[1])
    assert len(read(tmp_path)[1]) == 1
    assert {path.name for path in tmp_path.iterdir()} == FILES - {"coding.png"}


def test_coding_reports_group_after_group(tmp_path: Path) -> None:
    model, seen = variational_net(streams="network", code="block"), []

    def validate() -> float:
        assert not model.training
        seen.append(len(read(tmp_path)[0]) if (tmp_path / "coding.csv").exists() else 0)
        return 0.25 * len(seen)

    options = CodingOptions(groups=4, refit_steps=1)
    journal = code_model(
        model, loss_of(model), options=options, validate=validate, journal=Journal(tmp_path), progress=False
    )
    assert seen == [0, 1, 2, 3]
    rows = [{**row, "loss": row["loss"] or math.nan} for row in read(tmp_path)[1]]
    assert str(rows) == str([vars(row) for row in journal.rows])
    assert [row.group for row in journal.rows] == [1, 2, 3, 4]
    assert [row.validation for row in journal.rows] == [0.25, 0.5, 0.75, 1.0]
    assert math.isnan(journal.rows[0].loss) and all(math.isfinite(row.loss) for row in journal.rows[1:])
    # n·(1 - (1 - g/G)²) values after group g, in whole blocks of three, the last of which has two.
    for row in journal.rows:
        assert abs(row.coded_values - 473 * (1 - (1 - row.group / 4) ** 2)) < 3
    assert journal.rows[-1].coded_values == 473
    # Once more: there is nothing left to code, and the files are those of the journal, which is empty.
    again = code_model(model, options=options, journal=Journal(tmp_path / "again"), progress=False)
    assert again.rows == [] and {p.name for p in (tmp_path / "again").iterdir()} == FILES - {"coding.png"}
