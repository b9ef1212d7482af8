"""Writes the file tree in docs/architecture.md from the first lines of modules: `python docs/tree.py`."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "architecture.md"
# What no docstring says: folders without a module of their own.
FOLDERS = {
    "miracle_hub": "",
    "kernels": "A Hugging Face kernel repository",
    "torch-ext": "What it imports as; `build.py` copies it",
    "benchmarks": "One script per claim; results/ has their JSON",
    "docs": "The pages, and what makes them",
}
_TOP = ("miracle_hub", "kernels", "benchmarks", "docs")
_COLUMN = 34


def first_line(path: Path) -> str:
    """What a module says it is for; a package's own __init__ speaks for its folder."""
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return docstring.split("\n", 1)[0].rstrip(".")


def lines(folder: Path, depth: int = 0) -> Iterator[str]:
    """The lines of one folder: its modules in order of name, then the folders in it."""
    own = folder / "__init__.py"
    yield _line(f"{folder.name}/", first_line(own) if own.exists() else FOLDERS.get(folder.name, ""), depth)
    for path in sorted(folder.glob("*.py")):
        if path != own:
            yield _line(path.name, first_line(path), depth + 1)
    for inner in sorted(path for path in folder.iterdir() if path.is_dir() and path.name != "build"):
        if any(inner.rglob("*.py")):
            yield from lines(inner, depth + 1)


def _line(name: str, text: str, depth: int) -> str:
    return f"{'  ' * depth + name:<{_COLUMN}} {text}".rstrip()


def tree() -> str:
    """All folders of code."""
    return "\n".join(line for folder in _TOP for line in lines(ROOT / folder))


def page() -> str:
    """The page with its tree written anew."""
    text = PAGE.read_text(encoding="utf-8")
    block = f"<!-- tree -->\n```text\n{tree()}\n```\n<!-- /tree -->"
    return re.sub(r"<!-- tree -->.*<!-- /tree -->", lambda _: block, text, flags=re.DOTALL)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
