"""The machine as a shared library: compiled by g++ once for every state of its sources."""

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

SOURCES = Path(__file__).with_name("machine")
ROOT = Path(__file__).parents[3]
# Which .gitignore knows.
KEPT = ROOT / "build" / "device"
# Contraction would round a product and a sum once where the program rounds twice.
_OPTIONS = ("-std=c++20", "-O2", "-ffp-contract=off", "-shared", "-fPIC")


class NoCompiler(Exception):
    """The machine cannot be built here; the text says why."""


def sources_digest() -> str:
    """SHA-256 over the names and bytes of the machine's sources and the compiler's options."""
    digest = hashlib.sha256(repr(_OPTIONS).encode())
    for path in sorted(SOURCES.iterdir()):
        digest.update(f"{path.name}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def compiler() -> str:
    """The C++ compiler's path.

    Raises:
        NoCompiler: there is none.
    """
    found = shutil.which(os.environ.get("CXX", "g++"))
    if found is None:
        raise NoCompiler("expected g++ (or CXX) to build the machine of tests/kernels/device, found none")
    return found


@cache
def library() -> ctypes.CDLL:
    """The machine, built if it is not.

    Raises:
        NoCompiler: there is no C++ compiler, or it fails.
    """
    path = KEPT / f"machine-{sources_digest()[:32]}.so"
    if not path.exists():
        _build(path)
    loaded = ctypes.CDLL(str(path))
    loaded.device_operation.argtypes = [ctypes.c_char_p]
    loaded.device_launch.argtypes = [ctypes.c_void_p]
    return loaded


def _build(path: Path) -> None:
    """Whole or not at all: processes that build at the same time replace each other's file by the same."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        partial = Path(folder) / path.name
        sources = sorted(map(str, SOURCES.glob("*.cpp")))
        done = subprocess.run(
            [compiler(), *_OPTIONS, *sources, "-o", str(partial)], capture_output=True, text=True
        )
        if done.returncode:
            raise NoCompiler(f"{compiler()} cannot build the machine of tests/kernels/device: {done.stderr}")
        partial.replace(path)
