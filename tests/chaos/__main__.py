"""Kills, races, full disks, damaged files and random models: python -m tests.chaos (make chaos).

All random choices come from --seed; a failure prints the number of the kill, which --first repeats.
"""

import argparse
import shutil
import time
from collections import Counter

from .environment import WORK  # first: it sets what other modules read when they are imported

# isort: split
from .damages import damage
from .disks import starve
from .folders import random_folders
from .kills import one_kill
from .races import one_race


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=400)
    parser.add_argument("--races", type=int, default=24)
    parser.add_argument("--disks", type=int, default=48, help="how many sizes of disk")
    parser.add_argument("--damages", type=int, default=10_000, help="files damaged and read")
    parser.add_argument("--folders", type=int, default=200, help="random model folders")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first kill")
    options = parser.parse_args()
    started, counts, n_kills, number = time.monotonic(), Counter[str](), 0, options.first
    while n_kills < options.kills:
        n_kills += one_kill(options.seed, number, counts)
        number += 1
    for race in range(options.races):
        one_race(options.seed, race, counts)
    for disk in range(options.disks):
        starve(options.seed, disk, counts)
    counts += random_folders(options.seed, options.folders)
    table = damage(options.seed, options.damages)
    for what, count in sorted(counts.items()):
        print(f"{count:5} {what}")
    print(table)
    print(f"{n_kills} kills, {time.monotonic() - started:.0f} s")
    shutil.rmtree(WORK, ignore_errors=True)


if __name__ == "__main__":
    main()
