"""The plug-in in processes of its own: found without an import, harmless when it cannot work."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import AutoModel
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

from tests import forks
from tests.limits import HANG_SECONDS

if TYPE_CHECKING:
    from tests.hub.conftest import Repository

# What each process does last: the digest of what it loaded.
_LOAD = """
import hashlib
from transformers import AutoModel
model = AutoModel.from_pretrained({folder!r})
values = b"".join(t.numpy().tobytes() for _, t in sorted(model.state_dict().items()))
print("loaded", hashlib.sha256(values).hexdigest())
"""
_NO_AUTOLOAD = {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
# Refuses every module of the package, as an environment without it does.
_HIDE = """
import sys
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "miracle_hub":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Hide())
"""


@pytest.fixture(scope="module")
def load(llama: Repository) -> str:
    return _LOAD.format(folder=str(llama.compressed))


@pytest.fixture(scope="module")
def expected(llama: Repository) -> str:
    """What a process prints that loaded the right weights."""
    return digest_line(llama.decompressed)


def digest_line(folder: Path) -> str:
    tensors = AutoModel.from_pretrained(folder).state_dict()
    values = b"".join(tensor.numpy().tobytes() for _, tensor in sorted(tensors.items()))
    return f"loaded {hashlib.sha256(values).hexdigest()}"


def environment_of_a_user(**more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in _NO_AUTOLOAD}
    return {**kept, "HF_HUB_OFFLINE": "1", **more}


def run(
    code: str, folder: Path, *options: str, python: Path | str = sys.executable, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run `code` in a new interpreter and in `folder`, which is outside of the repository."""
    return subprocess.run(
        [str(python), *options, "-c", code],
        cwd=folder,
        env=environment_of_a_user(**environment),
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
    )


# The second imports torch, which calls the plug-in, in the middle of its own import.
@pytest.mark.parametrize("first", ["", "import transformers.quantizers.auto"])
def test_the_user_imports_nothing_of_this_package(
    first: str, load: str, expected: str, tmp_path: Path
) -> None:
    done = run(first + load, tmp_path, "-W", "error")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == expected


@pytest.mark.parametrize(
    "first",
    [
        "import transformers.core_model_loading",
        "import transformers.modeling_utils",
        "from transformers import AutoModel; AutoModel.from_pretrained({dense!r})",
    ],
)
def test_the_plug_in_registers_without_importing_the_decoder(
    first: str, llama: Repository, tmp_path: Path
) -> None:
    code = f"""
import sys
{first.format(dense=str(llama.decompressed))}
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
assert "miracle" in AUTO_QUANTIZER_MAPPING
print(*sys.modules)
"""
    done = run(code, tmp_path, "-W", "error")
    assert done.returncode == 0, done.stderr
    imported = done.stdout.split()
    assert "miracle_hub.plugin.quantizer" in imported
    assert not {"numba", "miracle_hub.codec", "miracle_hub.coding", "miracle_hub.api"} & set(imported)


def test_activating_again_is_harmless() -> None:
    code = """
import sys, torch
from miracle_hub._autoload import activate
def waiting():
    return sum(type(finder).__name__ == "_PostImport" for finder in sys.meta_path)
activate(); activate()
assert waiting() == 2  # for transformers, and for PEFT
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
activate(); activate()
assert waiting() == 1 and "miracle" in AUTO_QUANTIZER_MAPPING
"""
    done = forks.run(code, environment=environment_of_a_user(), refused=Warning)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "first", ["import miracle_hub", "from transformers import AutoModel; import miracle_hub"]
)
def test_without_autoloading_one_import_is_enough(
    first: str, load: str, expected: str, tmp_path: Path
) -> None:
    done = run(first + load, tmp_path, **_NO_AUTOLOAD)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == expected


def assert_size_mismatch(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode != 0
    assert "loaded" not in done.stdout
    assert "RuntimeError: You set `ignore_mismatched_sizes` to `False`" in done.stderr
    assert "MISMATCH" in done.stderr and "Unknown quantization type, got miracle" in done.stderr


def test_with_the_package_hidden_loading_fails(load: str, tmp_path: Path) -> None:
    assert_size_mismatch(run(_HIDE + load, tmp_path, "-I", **_NO_AUTOLOAD))


def test_in_an_environment_without_the_package_loading_fails(load: str, tmp_path: Path) -> None:
    """A virtual environment with links to everything installed here but this package."""
    venv.create(tmp_path / "environment", with_pip=False, symlinks=True)
    python = tmp_path / "environment" / "bin" / "python"
    if not python.exists():
        pytest.skip("virtual environments are laid out in another way here")
    (site_packages,) = (tmp_path / "environment" / "lib").glob("python*/site-packages")
    for path in {Path(sysconfig.get_path("purelib")), Path(sysconfig.get_path("platlib"))}:
        for entry in path.iterdir():
            if "miracle" not in entry.name and not (site_packages / entry.name).exists():
                (site_packages / entry.name).symlink_to(entry)
    is_absent = "import importlib.util\nassert importlib.util.find_spec('miracle_hub') is None\n"
    assert_size_mismatch(run(is_absent + load, tmp_path, "-I", python=python))


def test_a_plug_in_that_cannot_be_imported_only_warns(llama: Repository) -> None:
    code = f"""
import sys
class Break:
    def find_spec(self, name, path=None, target=None):
        if name == "miracle_hub.plugin.quantizer":
            raise ImportError("broken on purpose")
sys.meta_path.insert(0, Break())
from transformers import AutoModel
AutoModel.from_pretrained({str(llama.decompressed)!r})
print("dense models load")
"""
    done = forks.run(code, environment=environment_of_a_user())
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "dense models load"
    assert "RuntimeWarning: miracle-hub could not register with transformers" in done.stderr
    assert "broken on purpose" in done.stderr and "pip install -U miracle-hub transformers" in done.stderr


def test_other_weights_would_have_another_digest(llama: Repository, expected: str) -> None:
    assert expected != digest_line(llama.source)


def test_without_the_package_ignoring_mismatched_sizes_loads_random_weights(
    llama: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit that README, the card and the troubleshooting page tell: nothing of ours runs there."""
    for mapping in (AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING):
        monkeypatch.delitem(mapping, "miracle")
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModel.from_pretrained(llama.compressed)
    auto: Any = AutoModel
    model, info = auto.from_pretrained(
        llama.compressed, ignore_mismatched_sizes=True, output_loading_info=True
    )
    right = AutoModel.from_pretrained(llama.decompressed).state_dict()
    mismatched = {name for name, *_ in info["mismatched_keys"]}
    assert mismatched
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, right[name].to(tensor.dtype)) == (name not in mismatched), name


def test_with_the_package_ignoring_mismatched_sizes_changes_nothing(llama: Repository) -> None:
    model: Any = AutoModel.from_pretrained(llama.compressed, ignore_mismatched_sizes=True)
    right = AutoModel.from_pretrained(llama.decompressed).state_dict()
    assert all(torch.equal(tensor, right[name]) for name, tensor in model.state_dict().items())
