"""A few kills, races, small disks and random folders, so that the driver of `make chaos` stays alive."""

import re
import subprocess
import sys
from pathlib import Path

from tests.limits import HANG_SECONDS

ROOT = Path(__file__).parents[2]


def test_a_few_kills_races_small_disks_and_random_folders_find_every_output_whole_or_absent() -> None:
    # Some hundreds of damaged files are read by tests/codec/test_flips.py.
    options = ["--kills", "10", "--races", "2", "--disks", "3", "--damages", "0", "--folders", "2"]
    done = subprocess.run(
        [sys.executable, "-m", "tests.chaos", *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.search(r"^(\d+) kills", done.stdout, re.MULTILINE)
    assert found and int(found[1]) >= 10, done.stdout
