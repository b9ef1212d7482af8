"""The house's rules, read off the syntax trees: who imports whom, and how long things get."""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE, KERNELS = ROOT / "miracle_hub", ROOT / "kernels" / "torch-ext" / "miracle_kernels"
MODULES = sorted([*PACKAGE.rglob("*.py"), *KERNELS.rglob("*.py")])
# The machine of the tests, which is a program of its own: in Python and C++.
DEVICE = ROOT / "tests" / "kernels" / "device"
MACHINE = sorted(path for path in DEVICE.rglob("*") if path.suffix in (".py", ".cpp", ".h"))

# Arrows point down only. "" is `import miracle_hub` itself.
ALLOWED = {
    "errors": set(),
    "checks": {"errors"},
    "code": {"errors"},
    "names": {"errors"},
    "sizes": {"code", "errors"},
    "options": {"checks", "sizes", "names", "code", "errors"},
    "files": {"files", "format", "errors"},
    "format": {"format", "code", "errors"},
    "coding": {"checks", "coding", "code", "errors"},
    "codec": {"codec", "coding", "format", "files", "options", "sizes", "names", "code", "errors"},
    "training": {"checks", "training", "coding", "files", "options", "sizes", "names", "code", "errors"},
    "plugin": {
        *(
            "plugin",
            "training",
            "codec",
            "coding",
            "format",
            "files",
            "options",
            "sizes",
            "names",
            "code",
            "errors",
        ),
    },
    "hub": {"hub", "codec", "format", "files", "names", "code", "errors"},
    "finetune": {
        *("finetune", "evaluate", "hub", "plugin", "training"),
        *("codec", "coding", "format", "files", "options", "sizes", "names", "code", "errors"),
    },
    "evaluate": {"evaluate", "hub", "codec", "coding", "format", "files", "names", "code", "errors"},
    "calibrate": {
        *("calibrate", "evaluate", "hub", "plugin"),
        *("codec", "coding", "format", "files", "options", "sizes", "names", "code", "errors"),
    },
    "api": {
        "calibrate",
        "finetune",
        "evaluate",
        "hub",
        "plugin",
        "codec",
        "files",
        "options",
        "code",
        "errors",
    },
    "cli": {"", "api", "hub", "codec", "options", "code", "errors"},
    "_autoload": {"plugin"},
    "__init__": {
        "_autoload",
        "api",
        "finetune",
        "evaluate",
        "hub",
        "plugin",
        "training",
        "codec",
        "options",
        "code",
    },
}
# Who alone may import a third party.
HOMES = {
    "transformers": {"plugin", "finetune", "evaluate", "calibrate"},
    "huggingface_hub": {"files", "hub", "finetune"},
    "typer": {"cli"},
    "rich": {"cli"},
    "miracle_kernels": {"coding"},
    "numba": {"coding"},
    "llvmlite": {"coding"},
    "safetensors": {"files", "codec", "training"},
    "matplotlib": {"training", "hub"},
    "datasets": {"evaluate"},
    "triton": set(),
    "pickle": set(),
}


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imported(path: Path) -> Iterator[str]:
    """Dotted names of everything a module imports, wherever in the module it does."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports relatively"
            assert node.module is not None
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from names if node.module == "miracle_hub" else [node.module]


def part(path: Path) -> str:
    """The layer of a module: the folder or file right below miracle_hub."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def functions(path: Path) -> Iterator[tuple[ast.FunctionDef | ast.AsyncFunctionDef, int]]:
    """Every function with its length in lines, docstring and decorators not counted."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first, docstring = node.body[0], 0
            if ast.get_docstring(node) is not None:
                docstring = (first.end_lineno or first.lineno) - first.lineno + 1
            yield node, (node.end_lineno or node.lineno) - node.lineno + 1 - docstring


@pytest.mark.parametrize("path", [path for path in MODULES if path.is_relative_to(PACKAGE)], ids=name)
def test_imports_point_down_only(path: Path) -> None:
    for found in imported(path):
        top, _, rest = found.partition(".")
        if top == "miracle_hub":
            assert rest.split(".")[0] in ALLOWED[part(path)], f"{name(path)} imports {found}"
        elif top in HOMES:
            assert part(path) in HOMES[top], f"{name(path)} imports {found}"


def test_every_part_of_the_package_has_its_place_in_the_order() -> None:
    assert {part(path) for path in MODULES if path.is_relative_to(PACKAGE)} == set(ALLOWED)


def test_names_imported_by_text_obey_the_same_order() -> None:
    """`_HOMES` in __init__ and the target of _autoload are imports too."""
    texts = {"transformers": set(), "miracle_hub": set()}
    for path in MODULES:
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                dotted, top = node.value.replace(".", "").replace("_", ""), node.value.split(".")[0]
                if top in texts and "." in node.value and dotted.isidentifier():
                    texts[top].add((part(path), node.value))
    assert {where for where, _ in texts["transformers"]} == {"_autoload"}
    for where, text in texts["miracle_hub"]:
        assert text.split(".")[1] in ALLOWED[where], f"{where} names {text}"


def test_format_and_code_import_no_torch() -> None:
    for path in MODULES:
        if path.is_relative_to(PACKAGE) and part(path) in ("errors", "code", "format"):
            assert not {"torch", "numpy"} & {found.split(".")[0] for found in imported(path)}, name(path)


def test_autoload_imports_the_standard_library_only_until_it_registers() -> None:
    at_import = [
        alias.name if isinstance(node, ast.Import) else str(node.module)
        for node in tree(PACKAGE / "_autoload.py").body
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    ]
    assert {found.split(".")[0] for found in at_import} <= sys.stdlib_module_names


@pytest.mark.parametrize("path", [path for path in MODULES if path.is_relative_to(KERNELS)], ids=name)
def test_kernels_import_only_the_standard_library_torch_and_triton(path: Path) -> None:
    allowed = sys.stdlib_module_names | {"torch", "triton", "miracle_kernels"}
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ImportFrom) and node.level > 0:
            continue
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = (
                [alias.name for alias in node.names] if isinstance(node, ast.Import) else [str(node.module)]
            )
            assert {module.split(".")[0] for module in modules} <= allowed, f"{name(path)}:{node.lineno}"


def test_neither_kernels_nor_tests_are_packages() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "kernels" / "torch-ext" / "__init__.py").exists()
    assert not list((ROOT / "tests").rglob("__init__.py"))


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_no_module_is_longer_than_350_lines(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 350


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_no_function_is_longer_than_40_lines_or_a_triton_kernel_than_60(path: Path) -> None:
    for node, length in functions(path):
        is_kernel = any("triton" in ast.unparse(decorator) for decorator in node.decorator_list)
        assert length <= (60 if is_kernel else 40), f"{name(path)}:{node.lineno} {node.name}: {length} lines"


@pytest.mark.parametrize("path", MACHINE, ids=name)
def test_files_of_the_tests_machine_are_short_and_say_what_they_are_for(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 350 and text.startswith(('"""', "// "))
    if path.suffix == ".py":
        assert all(length <= 40 for _, length in functions(path))
    # A function of C++ starts and ends at the left margin.
    for found in re.finditer(
        r"^(?!namespace|struct|class|enum)\S[^\n]*\{\n.*?^\}", text, re.MULTILINE | re.DOTALL
    ):
        assert path.suffix == ".py" or found[0].count("\n") < 40, found[0].split("\n", 1)[0]


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_every_module_says_what_it_is_for(path: Path) -> None:
    assert not path.read_text(encoding="utf-8") or ast.get_docstring(tree(path))


@pytest.mark.parametrize("path", [path for path in MODULES if path.is_relative_to(PACKAGE)], ids=name)
def test_no_module_runs_what_it_reads(path: Path) -> None:
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in ("eval", "exec", "torch.load", "compile"), (
                f"{name(path)}:{node.lineno} {called}"
            )


@pytest.mark.parametrize("path", [path for path in MODULES if path.is_relative_to(PACKAGE)], ids=name)
def test_no_error_is_swallowed_without_a_name(path: Path) -> None:
    """A bare `except` re-raises; only the registration with transformers may catch everything and warn."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ExceptHandler):
            caught = ast.unparse(node.type) if node.type else "BaseException"
            if caught in ("Exception", "BaseException") and part(path) != "_autoload":
                assert any(isinstance(inner, ast.Raise) for inner in ast.walk(node)), (
                    f"{name(path)}:{node.lineno}"
                )


def documented(path: Path) -> Iterator[tuple[str, bool]]:
    """Public functions, classes, methods and properties of a module, and whether they are documented."""

    def walk(body: list[ast.stmt], prefix: str) -> Iterator[tuple[str, bool]]:
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                if not node.name.startswith("_"):
                    is_setter = any("setter" in ast.unparse(d) for d in node.decorator_list)
                    yield f"{prefix}{node.name}", is_setter or ast.get_docstring(node) is not None
                    if isinstance(node, ast.ClassDef):
                        yield from walk(node.body, f"{node.name}.")

    return walk(tree(path).body, "")


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_every_public_name_says_what_it_is_for(path: Path) -> None:
    assert not [public for public, is_documented in documented(path) if not is_documented]


def test_functions_are_short_by_the_median_and_at_the_ninetieth_percentile() -> None:
    lengths = sorted(length for path in MODULES for _, length in functions(path))
    assert lengths[len(lengths) // 2] <= 7 and lengths[len(lengths) * 9 // 10] <= 18


@pytest.mark.parametrize("path", [path for path in MODULES if path.is_relative_to(PACKAGE)], ids=name)
def test_no_private_name_crosses_modules(path: Path) -> None:
    """Neither imported nor reached for: a leading underscore is its module's own business."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("miracle_hub."):
            found = [alias.name for alias in node.names if alias.name.startswith("_")]
            assert not found, f"{name(path)}:{node.lineno} imports {found}"
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) not in ("self", "cls", "super()"):
            is_private = node.attr.startswith("_") and not node.attr.startswith("__")
            homes = PRIVATE.get(node.attr, set()) if is_private and node.attr not in TORCHS_OWN else set()
            assert not homes or path in homes, f"{name(path)}:{node.lineno} reaches for .{node.attr}"


def private_attributes(path: Path) -> Iterator[str]:
    """Private methods and attributes of self that a module's classes have."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef) and node.name.startswith("_"):
            yield node.name
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            if ast.unparse(node.value) == "self" and node.attr.startswith("_"):
                yield node.attr


TORCHS_OWN = {"_parameters"}
PRIVATE: dict[str, set[Path]] = {}
for module in MODULES:
    for attribute in private_attributes(module):
        PRIVATE.setdefault(attribute, set()).add(module)


def test_no_import_goes_round_in_a_circle() -> None:
    """By what modules import when they are imported; what a function imports later is no circle."""
    graph = {dotted(path): set(at_import(path)) for path in MODULES if path.is_relative_to(PACKAGE)}
    done: set[str] = set()

    def visit(module: str, above: tuple[str, ...]) -> None:
        assert module not in above, " → ".join([*above[above.index(module) :], module])
        if module in graph and module not in done:
            for other in graph[module]:
                visit(other, (*above, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def dotted(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def at_import(path: Path) -> Iterator[str]:
    for node in tree(path).body:
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("miracle_hub"):
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                is_module = (ROOT / Path(*inner.split("."))).with_suffix(".py").exists()
                yield inner if is_module else str(node.module)
