"""Plots are drawn from what files say, and say why one is missing."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import miracle_hub
from miracle_hub.code import Code
from miracle_hub.codec.inspection import Inspection, TensorReport
from miracle_hub.errors import OutputWriteError
from miracle_hub.hub import plots
from miracle_hub.hub.plots import read_journal, write_plots

if TYPE_CHECKING:
    from .conftest import Repository

NAMES = ["bits_per_tensor", "squared_error_per_tensor", "kl_per_group", "rate_distortion"]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The axes of every plot, by name, instead of files."""
    from matplotlib.figure import Figure

    axes: dict[str, Any] = {}

    def save(path: Path, draw: Callable[[Any], None], height: float) -> None:
        axes[path.stem] = Figure().subplots()
        draw(axes[path.stem])

    monkeypatch.setattr(plots, "_save", save)
    return axes


def tensor(name: str, n_bytes: int, error: float, reason: str = "") -> TensorReport:
    codes = () if reason else (Code(8, 2, 1),)
    return TensorReport(name, (100, 10), "F32", n_bytes, 1000, reason, codes, relative_error=error)


def inspection(*tensors: TensorReport) -> Inspection:
    return Inspection(tensors, 1000, 1000 * len(tensors), "")


def test_inspect_writes_the_plots_there_are_data_for(
    repositories: Callable[..., "Repository"], tmp_path: Path
) -> None:
    found = miracle_hub.inspect(repositories("bert-classifier").compressed, plots=tmp_path / "new" / "plots")
    assert [plot.path.stem for plot in found.plots] == NAMES
    assert [bool(plot.absent) for plot in found.plots] == [False, False, True, False]
    assert "there is no coding.json of a coding run" in found.plots[2].absent
    for plot in found.plots:
        assert plot.path.exists() != bool(plot.absent)
        assert plot.absent or plot.path.read_bytes().startswith(b"\x89PNG")


def test_bars_have_the_rates_and_errors_of_the_tensors(drawn: dict[str, Any], tmp_path: Path) -> None:
    rows = (tensor("a.$weight", 250, 0.09), tensor("b", 500, 0.01), tensor("norm", 4000, 0, "plain"))
    write_plots(inspection(*rows), [], tmp_path)
    for name, expected in (("bits_per_tensor", [2.0, 4.0]), ("squared_error_per_tensor", [0.09, 0.01])):
        assert [bar.get_width() for bar in drawn[name].patches] == expected
        assert [label.get_text() for label in drawn[name].get_yticklabels()] == ["a.$weight", "b"]


def test_many_tensors_are_points(drawn: dict[str, Any], tmp_path: Path) -> None:
    write_plots(inspection(*(tensor(str(i), 250 + i, 0.1) for i in range(61))), [], tmp_path)
    (line,) = drawn["bits_per_tensor"].lines
    assert list(line.get_ydata()) == [8 * (250 + i) / 1000 for i in range(61)]


def test_tensors_stand_above_shannons_bound(drawn: dict[str, Any], tmp_path: Path) -> None:
    write_plots(inspection(tensor("a", 250, 0.09), tensor("b", 500, 0.01)), [], tmp_path)
    axes = drawn["rate_distortion"]
    assert axes.collections[0].get_offsets().tolist() == [[2.0, 0.09], [4.0, 0.01]]
    rates, bound = axes.lines[0].get_data()
    assert rates[0] == 0 and rates[-1] > 4 and list(bound) == [4.0**-rate for rate in rates]


def test_kl_is_that_of_each_group_per_value(drawn: dict[str, Any], tmp_path: Path) -> None:
    journal = [{"coded_values": 100, "kl_bits": 50.0}, {"coded_values": 150, "kl_bits": 100.0}]
    write_plots(inspection(tensor("a", 250, 0.1)), journal, tmp_path)
    (line,) = drawn["kl_per_group"].lines
    assert list(line.get_ydata()) == [0.5, 2.0]


def test_tensors_that_training_coded_have_no_error_to_plot(drawn: dict[str, Any], tmp_path: Path) -> None:
    found = write_plots(inspection(tensor("a", 250, 0.0)), [], tmp_path)
    assert set(drawn) == {"bits_per_tensor"}
    assert [plot.absent for plot in found][1] == "no payload states an error: training coded them"


def test_the_journal_is_found_beside_or_in_the_folder(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out-fit").mkdir()
    assert read_journal(tmp_path / "out") == []
    for folder, rows in (("out-fit", [{"group": 1}]), ("out", [{"group": 2}])):
        (tmp_path / folder / "coding.json").write_text(json.dumps(rows))
        assert read_journal(tmp_path / "out") == rows
    for broken in ("{", "[1]", "{}"):
        (tmp_path / "out" / "coding.json").write_text(broken)
        assert read_journal(tmp_path / "out") == []


def test_journals_that_make_no_sense_are_not_plotted(drawn: dict[str, Any], tmp_path: Path) -> None:
    for row in ({}, {"coded_values": 0, "kl_bits": 1}, {"coded_values": 5, "kl_bits": None}):
        write_plots(inspection(tensor("a", 250, 0.1)), [row], tmp_path)
    assert "kl_per_group" not in drawn


def test_a_folder_that_cannot_be_written_is_named(
    repositories: Callable[..., "Repository"], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputWriteError, match="cannot be written"):
        miracle_hub.inspect(repositories("bert-classifier").compressed, plots=tmp_path / "file" / "plots")
