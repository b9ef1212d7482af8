"""pyproject.toml allows what `make matrix` has tested, and nothing else."""

import json
import re
import runpy
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
PASSED = json.loads(Path(__file__).with_name("passed.json").read_text())


def number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


def passing(package: str) -> list[tuple[int, ...]]:
    return sorted(number(row[package]) for row in PASSED.values())


def bounds(package: str) -> dict[str, tuple[int, ...]]:
    """By operator."""
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    own = next(text for text in dependencies if re.match(package.replace("_", "-") + r"\b", text))
    return {operator: number(version) for operator, version in re.findall(r"([<>]=?)([\d.]+)", own)}


def test_the_bounds_are_the_oldest_and_newest_versions_that_pass() -> None:
    for package in ("transformers", "huggingface_hub"):
        found, least = bounds(package), passing(package)[0]
        assert least[: len(found[">="])] == found[">="] and not any(least[len(found[">="]) :]), package
        major = passing(package)[-1][0]
        assert found["<"] == (major + 1,), package


def test_every_pair_passed() -> None:
    assert PASSED.keys() == runpy.run_path(str(Path(__file__).with_name("matrix.py")))["ROWS"].keys()
    assert all(row["passed"] and not row["failed"] and not row["error"] for row in PASSED.values())
    assert {version[0] for version in passing("huggingface_hub")} == {1, 2}
    assert any(version[:2] == (5, 17) for version in passing("transformers"))
