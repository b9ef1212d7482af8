"""The card of the kernel repository: its example runs, and its table has the ops as they are."""

import re
from pathlib import Path
from typing import Any

import pytest

import miracle_kernels
from tests import forks

KERNELS = Path(__file__).parents[2] / "kernels"
CARD = (KERNELS / "README.md").read_text(encoding="utf-8")
OPS = sorted(name.removesuffix("_torch") for name in miracle_kernels.__all__ if name.endswith("_torch"))


def test_the_example_runs_and_prints_the_rate_it_says(tmp_path: Path) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", CARD, re.DOTALL)
    done = forks.run(example, folder=tmp_path, refused=Warning)
    assert done.returncode == 0, done.stderr
    (said,) = re.findall(r"print\(.*bits per weight.*# (.*)", example)
    assert done.stdout.startswith(f"{said} bits per weight")


@pytest.mark.parametrize("name", OPS)
def test_the_table_has_the_arguments_of_the_op(name: str) -> None:
    (row,) = re.findall(rf"^\| `{name}\((.*?)\)`", CARD, re.MULTILINE)
    op: Any = getattr(miracle_kernels, name)
    arguments = op._opoverload._schema.arguments
    assert [re.match(r"\w+", word)[0] for word in row.split(", ")] == [known.name for known in arguments]  # pyright: ignore
    written = [known.alias_info is not None and known.alias_info.is_write for known in arguments]
    assert [word.endswith("!") for word in row.split(", ")] == written
    optional = ["Optional" in str(known.type) for known in arguments]
    assert [word.endswith("?") for word in row.split(", ")] == optional


def test_the_card_counts_the_calls_that_are_compiled() -> None:
    report = (KERNELS / "resources.json").read_text(encoding="utf-8")
    (count,) = re.findall(r"lists what (\d+) calls compile to", CARD)
    assert int(count) == report.count('"sm_80": {')
