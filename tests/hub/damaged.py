"""Compressed folders that say otherwise than they were written."""

import json
from pathlib import Path


def change_config(folder: Path, **values: object) -> None:
    """As who does so on purpose: without its guard, and without any where payloads are others."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    facts = config["quantization_config"]
    del facts["guard"]["config"]
    if "digest" in values:
        del facts["guard"]
    facts |= values
    path.write_text(json.dumps(config))
