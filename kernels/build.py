"""Builds the folders that the PyPI package `kernels` loads, one per backend, from torch-ext/ and build.toml.

    python kernels/build.py [--output kernels/build]

For kernels without compiled parts Hugging Face's kernel-builder copies the sources and adds two files; so
does this, without Nix. The same sources give the same bytes, and folders that are right are left alone.
"""

import argparse
import base64
import hashlib
import json
import shutil
import tempfile
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent

_OPS = '''"""The namespace of this build's torch ops, so that builds can be loaded side by side. Generated."""

import torch

ops = torch.ops.{id}


def add_op_namespace_prefix(op_name: str) -> str:
    """The op's full name in this build."""
    return f"{id}::{{op_name}}"
'''


def sources(package: Path, suffixes: tuple[str, ...]) -> dict[str, bytes]:
    """Relative path → content of every file of the package that a build carries."""
    return {
        path.relative_to(package).as_posix(): path.read_bytes()
        for path in sorted(package.rglob("*"))
        if path.is_file() and path.name.endswith(suffixes) and path.name != "_ops.py"
    }


def fingerprint(files: dict[str, bytes]) -> str:
    """Twelve hexadecimal digits that change with any name or byte."""
    digest = hashlib.sha256()
    for name, content in sorted(files.items()):
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()[:12]


def metadata(general: dict[str, Any], backend: str, build_id: str, files: dict[str, bytes]) -> bytes:
    """metadata.json as `kernels` 0.17 reads it; the digest is what a signature would vouch for."""
    digests = {
        name: base64.b64encode(hashlib.sha256(files[name]).digest()).decode() for name in sorted(files)
    }
    content = {
        "name": general["name"],
        "id": build_id,
        "version": general["version"],
        "license": general["license"],
        "python-depends": [],
        "backend": {"type": backend},
        "digest": {"algorithm": "sha256", "files": digests},
    }
    return (json.dumps(content, indent=2) + "\n").encode()


def build_files(source: Path) -> dict[str, dict[str, bytes]]:
    """Build folder → relative path → content, for every backend of source/build.toml."""
    config = tomllib.loads((source / "build.toml").read_text(encoding="utf-8"))
    general = config["general"]
    module = general["name"].replace("-", "_")
    suffixes = tuple(f".{suffix}" for suffix in config["torch-noarch"].get("pyext", ["py"]))
    package = sources(source / "torch-ext" / module, suffixes)
    if "__init__.py" not in package:
        raise FileNotFoundError(
            f"{source / 'torch-ext' / module}: expected a package, found no __init__.py; general.name in "
            "build.toml names the folder, with - for _"
        )
    builds = {}
    for backend in general["backends"]:
        build_id = f"_{module}_{backend}_{fingerprint(package)}"
        files = package | {"_ops.py": _OPS.format(id=build_id).encode()}
        files["metadata.json"] = metadata(general, backend, build_id, files)
        builds[f"torch-{backend}"] = files
    return builds


def contents(folder: Path) -> dict[str, bytes]:
    """Relative path → content of everything in a folder but Python's caches."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.parent.name != "__pycache__"
    }


def replace_folder(folder: Path, files: dict[str, bytes]) -> bool:
    """Make a folder hold exactly these files, all or none; whether it had to be written."""
    if contents(folder) == files:
        return False
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        new = Path(scratch) / "new"
        for name, content in files.items():
            path = new / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        if folder.exists():
            folder.rename(Path(scratch) / "old")
        new.rename(folder)
    return True


def build(source: Path, output: Path) -> None:
    """Write output/torch-<backend>/ for every backend, and remove those of backends that are gone."""
    builds = build_files(source)
    output.mkdir(parents=True, exist_ok=True)
    for stale in output.glob("torch-*"):
        if stale.name not in builds:
            shutil.rmtree(stale)
    for name, files in builds.items():
        written = replace_folder(output / name, files)
        print(f"{output / name}: {len(files)} files, {'written' if written else 'as they were'}")


def main() -> None:
    """Build this repository's kernels."""
    parser = argparse.ArgumentParser(description="Build the kernels for the PyPI package `kernels`.")
    parser.add_argument("--output", type=Path, default=ROOT / "build")
    build(ROOT, parser.parse_args().output)


if __name__ == "__main__":
    main()
