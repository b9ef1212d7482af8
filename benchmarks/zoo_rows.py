"""The rows of the zoo's table in results/zoo.json: one per model, method and setting, merged over runs."""

import json
from typing import Any

import record

MODELS = ("minilm", "smollm2", "whisper-base", "resnet20", "resnet44", "stories260k", "lenet5")
OURS = ("data-free", "self", "calibrated")
PEERS = ("round-to-nearest", "hqq", "gptqmodel", "llama.cpp", "nncodec")
METHODS = ("dense", *OURS, *PEERS)

Row = dict[str, Any]


def key(row: Row) -> tuple[str, str, str]:
    """What a row is the measurement of."""
    return row["model"], row["method"], row["setting"]


def merged(before: list[Row], after: list[Row]) -> list[Row]:
    """All rows, new ones instead of those that measured the same; by model, method, and falling bytes."""
    rows = {key(row): row for row in [*before, *after]}.values()
    return sorted(rows, key=_place)


def _place(row: Row) -> tuple[int, int, int]:
    return MODELS.index(row["model"]), METHODS.index(row["method"]), -(row["bytes"] or 0)


def known(split: str) -> list[Row]:
    """Rows of earlier runs."""
    path = record.RESULTS / f"{_file(split)}.json"
    return json.loads(path.read_text())["results"]["rows"] if path.exists() else []


def keep(row: Row, split: str) -> None:
    """Write a row among those of earlier runs at once, so that a killed run loses one row only."""
    record.record(_file(split), {"split": split, "rows": merged(known(split), [row])})


def _file(split: str) -> str:
    return "zoo" if split == "test" else f"zoo-{split}"
