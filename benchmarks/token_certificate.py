"""Certificates on tokens: what stories260K at 4 bits per weight is certified to cost, on texts of two kinds.

    python benchmarks/token_certificate.py

Held out is the beginning of tiny Shakespeare, which the model never saw; fitted the TinyStories sample, which
it was trained on, so that the size of its file enters the bound. Windows have 512 tokens. Model and texts are
read from the data folder (MIRACLE_DATA, else ../shared/data).
"""

import math
import tempfile
from pathlib import Path
from typing import Any

from record import DATA, record

import miracle_hub

_MODEL = DATA / "tinyllama_260k" / "hf"
_TEXTS = {
    "Shakespeare, held out": (DATA / "text" / "tinyshakespeare.txt", False),
    "TinyStories, fitted": (DATA / "tinystories" / "tinystories_sample.txt", True),
}
_CHARACTERS, _WINDOW, _VOCABULARY = 200_000, 512, 512


def row(folder: Path, name: str) -> dict[str, Any]:
    """What a stranger gets who certifies the file on these texts."""
    path, fitted = _TEXTS[name]
    texts = folder / "texts.txt"
    texts.write_text(path.read_text(encoding="utf-8")[:_CHARACTERS], encoding="utf-8")
    found: Any = miracle_hub.certify(
        folder / "out", data=texts, fitted=fitted, max_length=_WINDOW, progress=False
    )
    print(found.statement, flush=True)
    return {"texts": name, "fitted": fitted, "statement": found.statement, **figures(found)}


def figures(certificate: Any) -> dict[str, Any]:
    """Its numbers."""
    return {name: value for name, value in vars(certificate).items() if isinstance(value, int | float)}


def main() -> None:
    """Measure and record."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        report = miracle_hub.compress(
            _MODEL, folder / "out", bits_per_weight=4, calibrate=None, progress=False
        )
        rows = [row(folder, texts) for texts in _TEXTS]
    guessing = round(math.log(_VOCABULARY), 4)
    record(
        "token_certificate",
        {"bytes": report.compressed_bytes, "nats_of_guessing": guessing, "rows": rows},
    )


if __name__ == "__main__":
    main()
