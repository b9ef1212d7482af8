"""Outputs as tests write them and look at them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from miracle_hub.codec.decompress import decompress_folder
from miracle_hub.codec.report import Report
from miracle_hub.files.whole import output_folder
from miracle_hub.options import DecompressOptions

Compress = Callable[..., Report]


def decompress(source: Path, out: Path, **options: Any) -> int:
    return decompress_folder(source, out, DecompressOptions(**{"progress": False, **options}))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write(out: Path, overwrite: bool = False) -> None:
    with output_folder(out, overwrite) as temporary:
        (temporary / "new.txt").write_text("new")
