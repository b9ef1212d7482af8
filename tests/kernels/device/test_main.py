"""`make test-compiled` runs everything where something changed, else a part; or says why nothing can run."""

import json
import shutil
import sys
from pathlib import Path

import pytest

from tests.kernels.device import __main__ as program
from tests.kernels.device.build import ROOT, NoCompiler


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[str, int]]:
    """Architectures that are run, and how many paths of tests; nothing runs. The record is elsewhere."""
    found: list[tuple[str, int]] = []

    def record(architecture: str, paths: list[Path], arguments: list[str]) -> int:
        found.append((architecture, len(paths)))
        return int("fail" in arguments)

    monkeypatch.setattr(program, "tested", record)
    monkeypatch.setattr(program, "PASSED", tmp_path / "passed.json")
    return found


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["device", *arguments])
    return program.main()


EVERYTHING = [("sm_80", 1), ("sm_90", 1)]
PART = [("sm_90", 3)]


def test_what_passed_is_recorded_and_then_a_part_is_enough(
    runs: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "--if-changed") == 0 and sorted(runs) == EVERYTHING
    assert "commit it" in capsys.readouterr().out
    assert json.loads(program.PASSED.read_text()) == program.identity()
    runs.clear()
    assert call(monkeypatch, "--if-changed") == 0 and runs == PART
    runs.clear()
    assert call(monkeypatch) == 0 and sorted(runs) == EVERYTHING


@pytest.mark.parametrize("arguments", [["--smoke"], ["fail"], ["-k", "decode"]])
def test_what_failed_or_was_a_part_is_no_record(
    runs: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    assert call(monkeypatch, *arguments) == int("fail" in arguments)
    assert not program.PASSED.exists() and runs


def test_a_record_of_other_sources_is_none(
    runs: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    program.PASSED.write_text(json.dumps(program.identity() | {"sources": "others"}))
    assert call(monkeypatch, "--if-changed") == 0 and sorted(runs) == EVERYTHING


def test_without_a_compiler_nothing_runs_and_the_last_line_says_so(
    runs: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing() -> None:
        raise NoCompiler("expected g++, found none")

    monkeypatch.setattr(program, "library", missing)
    assert call(monkeypatch) == 0 and not runs
    assert capsys.readouterr().out == "SKIPPED: compiled kernels were not tested: expected g++, found none\n"


@pytest.mark.parametrize(
    "name",
    [
        "kernels/torch-ext/miracle_kernels/noise.py",
        "tests/kernels/test_decode.py",
        "tests/kernels/device/ptx.py",
        "tests/kernels/device/machine/shadow.h",
    ],
)
def test_a_byte_of_kernels_tests_or_machine_makes_another_run(tmp_path: Path, name: str) -> None:
    for folder in ("kernels", "tests/kernels"):
        shutil.copytree(
            ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__", "build")
        )
    before = program.identity(tmp_path)
    assert before == program.identity()
    with (tmp_path / name).open("ab") as file:
        file.write(b"\n")
    assert program.identity(tmp_path)["sources"] != before["sources"]
