"""What `import miracle_hub` offers, and what it does not load."""

import ast
import inspect
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import miracle_hub
from miracle_hub import _HOMES
from tests.limits import HANG_SECONDS

ROOT = Path(__file__).parents[1]


def public_names() -> dict[str, str]:
    """Names that __init__ re-exports (`import x as x`), with the modules they come from."""
    tree = ast.parse((ROOT / "miracle_hub" / "__init__.py").read_text())
    return {
        alias.name: str(node.module)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.asname == alias.name
    }


def test_all_is_sorted_and_lists_exactly_the_public_names() -> None:
    assert miracle_hub.__all__ == sorted(miracle_hub.__all__) == sorted(public_names())


def test_lazy_names_come_from_where_type_checkers_look() -> None:
    modules = public_names()
    assert _HOMES == {name: module for name, module in modules.items() if name != "Code"}
    for name, module in modules.items():
        assert getattr(miracle_hub, name) is getattr(sys.modules[module], name)


def test_every_public_function_and_class_says_what_it_is_for() -> None:
    for name in miracle_hub.__all__:
        found = getattr(miracle_hub, name)
        assert inspect.getdoc(found), name
        if inspect.isfunction(found):
            signature = inspect.signature(found)
            assert signature.return_annotation is not inspect.Signature.empty
            assert all(p.annotation is not inspect.Parameter.empty for p in signature.parameters.values())


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="^module 'miracle_hub' has no attribute 'nothing'$"):
        miracle_hub.nothing  # noqa: B018  # pyright: ignore[reportAttributeAccessIssue]


def test_the_version_is_that_of_the_project_file() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert miracle_hub.__version__ == project["version"]


def test_every_error_is_ours_and_of_the_standard_kind_that_callers_expect() -> None:
    from miracle_hub import errors

    classes = [found for _, found in inspect.getmembers(errors, inspect.isclass)]
    assert all(issubclass(found, errors.MiracleError) and found.__doc__ for found in classes)
    drawn = {line.split("── ")[1].split(" ")[0] for line in str(errors.__doc__).splitlines() if "── " in line}
    assert drawn | {"MiracleError"} == {found.__name__ for found in classes}
    kinds: dict[type, type] = {
        errors.BackendError: RuntimeError,
        errors.TrainingError: RuntimeError,
        errors.WrittenWeightError: RuntimeError,
        errors.ProcessError: RuntimeError,
        errors.OutputExistsError: FileExistsError,
        errors.OutputWriteError: OSError,
        errors.UploadError: OSError,
        errors.RemoteMismatchError: OSError,
    }
    for found in classes:
        if found is not errors.MiracleError:
            assert issubclass(found, kinds.get(found, ValueError))


READING = """
__init__ _autoload errors checks code names options sizes api calibrate calibrate.asked
files files.container files.digests files.folders files.snapshots files.whole
format format.frame format.network format.payload format.spec format.varint
coding coding.backend coding.cpu coding.digest coding.lookup coding.matrix coding.narrowing
coding.numba_backend coding.order coding.philox coding.posterior coding.quantiles coding.rotation
coding.scales coding.sharing
codec codec.base codec.based codec.body codec.companions codec.comparing codec.config codec.constants
codec.curvature
codec.decompress codec.detector codec.dtypes codec.finite codec.guard codec.guarded codec.handed_out
codec.inherited codec.inspection codec.kinds codec.modules codec.naming codec.network codec.parts
codec.payloads codec.plan codec.purpose codec.quantized codec.rates codec.reading codec.report
codec.repository codec.source codec.stored codec.trellis codec.verification
hub hub.resolve
""".split()


def test_reading_a_file_imports_nothing_that_writes_one() -> None:
    """Neither training nor encoders, neither transformers nor matplotlib: the list is all there may be."""
    golden = ROOT / "tests" / "golden"
    code = f"""
import sys
from torch import nn
import miracle_hub
assert not {{"numba", "transformers", "huggingface_hub"}} & sys.modules.keys()
module = nn.Sequential(nn.Linear(12, 20), nn.BatchNorm1d(20), nn.Linear(20, 5))
miracle_hub.load({str(golden / "network_1.safetensors")!r}, module)
assert "huggingface_hub" not in sys.modules
miracle_hub.load_state_dict({str(golden / "repository_2")!r})
assert not {{"transformers", "matplotlib", "triton", "typer", "peft"}} & sys.modules.keys()
print(*sorted(name for name in sys.modules if name.split(".")[0] == "miracle_hub"))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=HANG_SECONDS
    )
    assert done.returncode == 0, done.stderr
    allowed = {"miracle_hub", *(f"miracle_hub.{name}" for name in READING)}
    assert set(done.stdout.split()) <= allowed, sorted(set(done.stdout.split()) - allowed)
