"""The built kernel repository loads with the PyPI package `kernels`, and needs no Triton to be right."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.limits import HANG_SECONDS

KERNELS = Path(__file__).parents[2] / "kernels"
PACKAGE = KERNELS / "torch-ext" / "miracle_kernels"
BACKENDS = ("cpu", "cuda", "rocm")

# Both ways to the same sources in one process: the build and the installed package.
LOAD = """
from pathlib import Path
import torch
import miracle_kernels
from kernels import get_local_kernel
loaded = get_local_kernel(Path({path!r}), backend="cpu")
"""
ARGUMENTS = """
states = torch.arange(0, 2**24, 9973)
quantiles = torch.randn(65536, generator=torch.Generator().manual_seed(0)).half()
arguments = (states, quantiles, 9, 5, 7)
"""
NO_TRITON = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocker())
"""


def build(output: Path, script: Path = KERNELS / "build.py") -> Path:
    subprocess.run(
        [sys.executable, str(script), "--output", str(output)],
        check=True,
        capture_output=True,
        timeout=HANG_SECONDS,
    )
    return output


def run(code: str) -> str:
    finished = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=HANG_SECONDS
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def copied(folder: Path) -> Path:
    """The kernel repository's sources in another place, to change them; gives its build script."""
    folder.mkdir()
    shutil.copytree(KERNELS / "torch-ext", folder / "torch-ext")
    for name in ("build.toml", "build.py"):
        shutil.copy(KERNELS / name, folder)
    return folder / "build.py"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("kernel") / "build")


def test_every_backend_has_the_package_and_two_generated_files(built: Path) -> None:
    sources = {path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py")}
    tables = {path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.json")}
    assert {folder.name for folder in built.iterdir()} == {f"torch-{backend}" for backend in BACKENDS}
    for backend in BACKENDS:
        assert set(contents(built / f"torch-{backend}")) == sources | tables | {"_ops.py", "metadata.json"}


def test_the_same_sources_give_the_same_bytes_and_are_not_written_twice(built: Path, tmp_path: Path) -> None:
    again = build(tmp_path / "build")
    assert contents(again) == contents(built)
    before = {path: path.stat().st_mtime_ns for path in again.rglob("*")}
    (again / "torch-cpu" / "__pycache__").mkdir()
    build(again)
    assert {path: path.stat().st_mtime_ns for path in before if path.name != "torch-cpu"} == {
        path: time for path, time in before.items() if path.name != "torch-cpu"
    }


def test_damaged_stale_and_left_over_files_do_not_survive_a_build(built: Path, tmp_path: Path) -> None:
    again = build(tmp_path / "build")
    (again / "torch-cpu" / "codebook.py").write_text("broken")
    (again / "torch-cuda" / "left_over.py").write_text("")
    (again / "torch-xpu").mkdir()
    assert contents(build(again)) == contents(built)


def test_tuning_tables_are_carried_and_caches_are_not(built: Path, tmp_path: Path) -> None:
    script = copied(tmp_path / "kernels")
    package = script.parent / "torch-ext" / "miracle_kernels"
    (package / "tuning").mkdir(exist_ok=True)
    (package / "tuning" / "some-gpu.json").write_text('{"tiles": {}}')
    (package / "__pycache__").mkdir(exist_ok=True)
    (package / "__pycache__" / "codebook.pyc").write_bytes(b"0")
    found = contents(build(tmp_path / "build", script) / "torch-cuda")
    assert found["tuning/some-gpu.json"] == b'{"tiles": {}}'
    assert not [name for name in found if "__pycache__" in name]


def test_other_sources_get_another_namespace(built: Path, tmp_path: Path) -> None:
    script = copied(tmp_path / "kernels")
    with (script.parent / "torch-ext" / "miracle_kernels" / "errors.py").open("a") as file:
        file.write("# changed\n")
    metadata = build(tmp_path / "build", script) / "torch-cpu" / "metadata.json"
    original = built / "torch-cpu" / "metadata.json"
    assert json.loads(metadata.read_text())["id"] != json.loads(original.read_text())["id"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_metadata_is_valid_and_its_digest_is_the_files(built: Path, backend: str) -> None:
    rust = pytest.importorskip("kernels._rust")
    folder = built / f"torch-{backend}"
    metadata = rust.Metadata.read_from_file(folder / "metadata.json")
    assert str(metadata.backend.backend_type) == backend
    metadata.digest.validate(rust.Digest.hash_variant(metadata.digest.algorithm, folder))


def test_a_loaded_build_equals_the_package_under_a_namespace_of_its_own(built: Path) -> None:
    pytest.importorskip("kernels")
    checks = """
ours, theirs = miracle_kernels.codebook, loaded.codebook
assert torch.equal(theirs(*arguments), miracle_kernels.codebook_torch(*arguments))
assert torch.equal(ours(*arguments), theirs(*arguments))
assert Path(loaded.__file__).parent == Path({path!r}) / "torch-cpu"
print(ours._qualname, theirs._qualname)
"""
    path = str(built)
    ours, theirs = run((LOAD + ARGUMENTS + checks).format(path=path)).split()
    build_id = json.loads((built / "torch-cpu" / "metadata.json").read_text())["id"]
    assert (ours, theirs) == ("miracle_kernels::codebook", f"{build_id}::codebook")


def test_a_loaded_build_imports_nothing_from_the_installed_package(built: Path) -> None:
    pytest.importorskip("kernels")
    code = (
        LOAD.replace("import miracle_kernels\n", "")
        + "import sys\nassert 'miracle_kernels' not in sys.modules\n"
    )
    run(code.format(path=str(built)))


def test_without_triton_the_reference_works_and_the_kernel_says_what_is_missing() -> None:
    checks = """
import torch
import miracle_kernels
from miracle_kernels.codebook import codebook_triton
assert "triton" not in sys.modules
assert torch.equal(miracle_kernels.codebook(*arguments), miracle_kernels.codebook_torch(*arguments))
try:
    codebook_triton(*arguments)
except miracle_kernels.KernelUnavailableError as error:
    print(error)
"""
    found = run(NO_TRITON + "import torch\n" + ARGUMENTS + checks)
    assert found.startswith("codebook: expected the Python package triton, found none; pip install triton")


def test_without_triton_a_build_loads_too(built: Path) -> None:
    pytest.importorskip("kernels")
    checks = "assert torch.equal(loaded.codebook(*arguments), loaded.codebook_torch(*arguments))\n"
    run(NO_TRITON + LOAD.format(path=str(built)) + ARGUMENTS + checks)
