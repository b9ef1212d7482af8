"""The README is true: its examples run, its commands exist, its file tree and numbers are the real ones."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from miracle_hub.coding.quantiles import QUANTILES_SHA256
from tests.limits import HANG_SECONDS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_every_python_block_runs(tmp_path: Path) -> None:
    assert blocks("python")
    for block in blocks("python"):
        done = subprocess.run(
            [sys.executable, "-W", "error::DeprecationWarning", "-c", block],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=HANG_SECONDS,
        )
        assert done.returncode == 0, done.stderr


def test_every_command_of_the_readme_exists() -> None:
    commands = [line.split("#")[0].split() for block in blocks("console") for line in block.splitlines()]
    makefile = (ROOT / "Makefile").read_text()
    for words in filter(None, commands):
        if words[0] == "make":
            assert re.search(rf"^{words[1]}:", makefile, re.MULTILINE), words
            continue
        assert words[0] == "miracle"
        help_text = subprocess.run(
            [str(Path(sys.executable).with_name("miracle")), words[1], "--help"],
            capture_output=True,
            text=True,
            timeout=HANG_SECONDS,
            check=True,
            env={"COLUMNS": "200", "PATH": ""},
        ).stdout
        for option in (word for word in words if word.startswith("--")):
            assert option in help_text


def test_the_file_tree_names_every_module_and_nothing_else() -> None:
    named = set(re.findall(r"^ +(\w+\.py) ", README.split("## Files")[1], re.MULTILINE))
    folders = (ROOT / "miracle_hub").rglob("*.py"), (ROOT / "kernels" / "torch-ext").rglob("*.py")
    scripts = (ROOT / "kernels").glob("*.py")
    modules = {path.name for paths in (*folders, scripts) for path in paths} - {"__init__.py"}
    assert named == modules


def test_the_format_section_has_the_hash_of_the_table() -> None:
    assert QUANTILES_SHA256 in README


def test_the_measured_numbers_are_those_of_the_results() -> None:
    results = ROOT / "benchmarks" / "results" / "minilm.json"
    if not results.exists():
        pytest.skip("benchmarks/results/minilm.json is not there: run `make bench`")
    for row in json.loads(results.read_text())["results"]["compressed"]:
        line = f"| {row['asked']} | {row['bytes']:,} | {row['spearman']['test']:.2f} |"
        assert line in README, line
