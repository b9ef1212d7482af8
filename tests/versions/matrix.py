"""Loading, saving and fitting with other versions of transformers and huggingface_hub: make matrix.

Each pair has an environment of its own in .matrix/, made by pip, which also finds out whether the package's
bounds allow the pair; all else, torch first of all, is borrowed from .venv. What passed is in passed.json,
and a test holds pyproject.toml to it.
"""

import json
import re
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

ROOT = Path(__file__).parents[2]
PASSED = Path(__file__).with_name("passed.json")
# As pip takes them. transformers refuses to be imported beside another version of kernels than its own.
ROWS: dict[str, list[str]] = {
    "oldest": ["transformers==5.8.0", "huggingface-hub==1.5.0", "kernels==0.12.*", "datasets==4.*"],
    "5.17": ["transformers==5.17.*", "huggingface-hub==1.*", "kernels==0.16.*"],
    "newest-1": ["transformers", "huggingface-hub==1.*"],
    "newest": ["transformers", "huggingface-hub"],
}
TESTS = ["loading", "loading_backends", "loading_dtypes_and_devices", "loading_errors", "plugin"]
TESTS += ["keep_compressed", "stages", "staged_hub", "hub", "hub_errors", "hub_faults", "loopback", "push"]
TESTS += ["mixin", "trainer", "distillation", "fit"]
# datasets 4, the last that takes huggingface_hub 1.5, leaves CSV files open.
OPTIONS = {"oldest": ["-W", "ignore:unclosed file:ResourceWarning"]}
# It makes an environment from what is installed in that of the tests, which here is borrowed.
SKIPPED = "tests/hub/test_plugin.py::test_in_an_environment_without_the_package_loading_fails"
_VERSIONS = """
import json, importlib.metadata as m
print(json.dumps({name: m.version(name) for name in ("transformers", "huggingface_hub", "torch")}))
"""


def run(*command: object) -> str:
    done = subprocess.run([*map(str, command)], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode and "pytest" not in command:
        sys.exit(f"{' '.join(map(str, command))} ended with status {done.returncode}")
    return done.stdout


def environment(name: str) -> Path:
    """The interpreter of a pair's environment, brought up to date."""
    folder = ROOT / ".matrix" / name
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
    packages = sysconfig.get_path("purelib", "venv", {"base": str(folder), "platbase": str(folder)})
    borrowed = f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n"
    (Path(packages) / "zz_borrowed.pth").write_text(borrowed)
    wanted = ["--upgrade", "--upgrade-strategy", "only-if-needed", "-c", "constraints.txt", "-e", "."]
    run(python, "-m", "pip", "install", "--quiet", *wanted, *ROWS[name])
    return python


def test(name: str) -> dict[str, object]:
    """Run the tests of one pair; versions and counts."""
    python = environment(name)
    versions = json.loads(run(python, "-c", _VERSIONS))
    files = [f"tests/hub/test_{test}.py" for test in TESTS]
    output = run(
        python,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--deselect",
        SKIPPED,
        *OPTIONS.get(name, []),
        *files,
    )
    print(output)
    counts = {kind: 0 for kind in ("passed", "failed", "error", "skipped")}
    counts |= {kind: int(n) for n, kind in re.findall(r"(\d+) (passed|failed|error|skipped)", output)}
    return versions | counts


def main() -> None:
    rows = {name: test(name) for name in sys.argv[1:] or ROWS}
    for name, row in rows.items():
        print(f"{name}:", *(f"{key} {value}" for key, value in row.items()))
    if any(row["failed"] or row["error"] or not row["passed"] for row in rows.values()):
        sys.exit("a pair that the package allows does not pass")
    rows = (json.loads(PASSED.read_text()) if PASSED.exists() else {}) | rows
    PASSED.write_text(json.dumps({name: rows[name] for name in ROWS if name in rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
