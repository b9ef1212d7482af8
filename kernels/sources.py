"""Which sources a compilation is of, and results that are kept under that name, each made once."""

import fcntl
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

KERNELS = Path(__file__).resolve().parent
# Scripts beside the package that decide what is compiled and counted.
_SCRIPTS = ("compile.py", "counting.py", "units.py", "variants.py")


def source_digest(folder: Path = KERNELS) -> str:
    """SHA-256 over names and bytes of everything that is compiled, and of what chooses and counts it."""
    package = folder / "torch-ext"
    files = [*package.rglob("*.py"), *package.rglob("*.json"), *(folder / name for name in _SCRIPTS)]
    digest = hashlib.sha256()
    for path in sorted(files):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(folder).as_posix()}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()


def kept(folder: Path, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `make` gives, made by one process and read by all others and by later runs.

    A lock makes the others wait; the system frees it when its process ends, in whatever way. A result that
    is half written has another name, and errors are not kept.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{hashlib.sha256(name.encode()).hexdigest()[:32]}.json"
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if path.exists():
            return json.loads(path.read_text())
        found = make()
        if "error" not in found:
            partial = path.with_suffix(".partial")
            partial.write_text(json.dumps(found))
            partial.replace(path)
        return found
