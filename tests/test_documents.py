"""The documents are true: snippets run, commands and links exist, what is generated is current."""

import ast
import inspect
import json
import re
import runpy
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import typer

import miracle_hub.errors
from miracle_hub import MiracleHubMixin, MiracleTrainer, VariationalConfig, cli
from miracle_hub.code import FORMAT_VERSION, MAX_STEP_WEIGHTS, MAX_WIDTH_LOG2, MAX_WINDOW_BITS
from miracle_hub.coding.quantiles import QUANTILES_SHA256
from miracle_hub.coding.scales import LARGEST_SCALE, SMALLEST_SCALE
from miracle_hub.format import network, payload
from miracle_hub.options import CompressOptions, LoadOptions
from tests import forks

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "kernels").glob("*.md")])
FORMAT = (ROOT / "FORMAT.md").read_text(encoding="utf-8")
TROUBLES = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
CODE = [
    path for folder in ("miracle_hub", "kernels", "tests") for path in sorted((ROOT / folder).rglob("*.py"))
]
# Every block in a namespace of its own, and all in one process.
RUN = """
import json, sys
for block in json.load(sys.stdin):
    exec(compile(block, "block", "exec"), {"__name__": "__main__"})
"""


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def prose(page: Path) -> str:
    """A page without its blocks."""
    return re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)


def headings(page: Path) -> list[str]:
    return re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """Of headings, as GitHub makes them."""
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings(page)}


def with_python() -> list[Path]:
    return [page for page in PAGES if blocks(page, "python")]


@pytest.mark.parametrize("page", with_python(), ids=name)
def test_every_snippet_runs_in_the_order_of_its_page(page: Path, tmp_path: Path) -> None:
    done = forks.run(
        RUN, given=json.dumps(blocks(page, "python")), folder=tmp_path, refused=DeprecationWarning
    )
    assert done.returncode == 0, done.stderr


def commands() -> list[tuple[Path, str]]:
    """Lines of console blocks, and commands in the midst of text."""
    found = []
    for page in PAGES:
        lines = [line for block in blocks(page, "console") for line in block.splitlines()]
        lines += re.findall(r"`((?:make|miracle|python|pip) [^`]+)`", prose(page))
        found += [(page, line.split("#")[0].strip()) for line in lines if line.split("#")[0].strip()]
    return found


TORCHRUN = "torchrun --nproc-per-node 2 "


@pytest.mark.parametrize(
    ("page", "line"), commands(), ids=lambda value: value if isinstance(value, str) else name(value)
)
def test_every_command_exists_with_its_options(page: Path, line: str) -> None:
    program, *words = line.removeprefix(TORCHRUN).removeprefix("--no-python ").replace("'", "").split()
    if program == "train.py":  # the user's own
        return
    if program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        assert set(words) <= set(targets)
    elif program == "python":
        assert (ROOT / words[0]).is_file()
    elif program == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        assert words[0] == "install"
        for extra in re.findall(r"\.\[(\w+)\]", line):
            assert extra in extras["optional-dependencies"]
    else:
        assert program == "miracle"
        verb = vars(typer.main.get_command(cli.app))["commands"][words[0]]
        if len(words) > 1:  # it parses; nothing runs
            verb.make_context(words[0], words[1:])


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_and_anchors_between_pages_resolve(page: Path) -> None:
    text = prose(page)
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r"^\[[\w-]+\]: (\S+)$", text, re.MULTILINE)
    for link in links:
        target, _, anchor = link.partition("#")
        if not target.startswith("https://"):
            found = page.parent / target if target else page
            assert found.exists(), link
            assert not anchor or anchor in anchors(found), link
    defined = set(re.findall(r"^\[([\w-]+)\]: \S+$", text, re.MULTILINE))
    assert set(re.findall(r"\]\[([\w-]+)\]", text)) == defined


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_files_that_a_page_names_exist(page: Path) -> None:
    roots = (ROOT, ROOT / "miracle_hub", ROOT / "kernels", ROOT / "tests" / "golden")
    for named in re.findall(r"`([\w./-]+/[\w.-]*|\w+\.py)`", prose(page)):
        ours = named.endswith((".py", "/", ".md", ".json")) and not named.startswith(("build/", "../"))
        assert not ours or any((root / named).exists() for root in roots), named


def test_the_page_of_choices_has_every_option_of_compress() -> None:
    page = (ROOT / "docs" / "choosing.md").read_text(encoding="utf-8")
    table = page.split("## Options of `compress`")[1].split("##")[0]
    named = set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE))
    told_elsewhere = {"bits_per_weight", "size", "revision", "overwrite", "progress"}
    assert named == {field.name for field in fields(CompressOptions)} - told_elsewhere


def parameters() -> set[str]:
    """Every argument of what the package offers."""
    offered = [getattr(miracle_hub, public) for public in miracle_hub.__all__]
    methods = [MiracleTrainer.compress, *vars(MiracleHubMixin).values()]
    called = [*offered, *(method for method in methods if inspect.isfunction(method))]
    return {argument for each in called for argument in inspect.signature(each).parameters}


@pytest.mark.parametrize("page", [page for page in PAGES if page.parent.name != "kernels"], ids=name)
def test_arguments_that_a_page_names_are_arguments(page: Path) -> None:
    """In the midst of text; those of snippets, commands and kernels have tests of their own."""
    others = {"ignore_mismatched_sizes", "train_sampling_strategy", "use_cpu"}  # of transformers
    options = {field.name for field in (*fields(VariationalConfig), *fields(LoadOptions))}
    for inline in re.findall(r"`([^`]+)`", prose(page)):
        for named in re.findall(r"\b([a-z_]+)=", inline):
            assert named in parameters() | options | others, inline


def test_every_page_of_docs_is_reached_from_the_readme() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for page in (ROOT / "docs").glob("*.md"):
        assert f"(docs/{page.name})" in text, page.name


def test_the_readme_is_short_and_begins_with_its_two_commands_and_a_picture() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 170
    first_screen = "\n".join(lines[:20])
    assert "make demo" in first_screen and "make test" in first_screen and "](docs/figures/" in first_screen


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    """benchmarks/report.py, whose imports are its neighbors."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        return runpy.run_path(str(ROOT / "benchmarks" / "report.py")) | {"figures": sys.modules["figures"]}
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))


def test_the_results_are_those_of_the_benchmarks(report: dict[str, Any]) -> None:
    found = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    assert found == report["results_page"](), "run `make docs`"
    for path, table in ((report["README"], report["summary"]), (report["CHOOSING"], report["expectations"])):
        assert path.read_text(encoding="utf-8") == report["renewed"](path, table()), "run `make docs`"


def test_the_figures_show_the_results(report: dict[str, Any]) -> None:
    figures = report["figures"]
    assert {path.stem for path in figures.FIGURES.glob("*.svg")} == set(figures.DRAWN)
    for figure in figures.DRAWN:
        text = (figures.FIGURES / f"{figure}.svg").read_text(encoding="utf-8")
        assert figures.shown(figure) in text, "run `make docs`"
        assert len(text) < 100_000


def test_equal_results_are_equal_figures(report: dict[str, Any]) -> None:
    assert report["figures"].svg("lenet") == report["figures"].svg("lenet")


def test_the_file_tree_is_that_of_the_modules() -> None:
    written = runpy.run_path(str(ROOT / "docs" / "tree.py"))
    assert (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8") == written["page"](), (
        "run `make docs`"
    )
    named = set(re.findall(r"^ *(\w+\.py) +\S", written["tree"](), re.MULTILINE))
    folders = (ROOT / "miracle_hub", ROOT / "kernels" / "torch-ext", ROOT / "benchmarks")
    modules = {path.name for folder in folders for path in folder.rglob("*.py")}
    assert modules - {"__init__.py"} <= named


def limit(what: str) -> str:
    """A cell of the table of limits in FORMAT.md."""
    (found,) = re.findall(rf"^\| {what} \| (.+) \|$", FORMAT, re.MULTILINE)
    return found


def power(exponent: int) -> str:
    return "2" + str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def test_the_format_has_the_limits_of_the_code() -> None:
    assert limit("L") == f"1 to {MAX_WINDOW_BITS}" and limit("V") == f"1 to {MAX_STEP_WEIGHTS}"
    assert limit("dimensions").startswith(f"at most {vars(payload)['_MAX_DIMENSIONS']},")
    assert limit("weights") == f"at most {power(vars(payload)['_MAX_WEIGHTS'].bit_length() - 1)}"
    assert limit("segments") == f"1 to {vars(payload)['_MAX_SEGMENTS']}"
    assert f"up to {power(MAX_WIDTH_LOG2)} " in limit("rotation width")
    smallest, largest = (
        power(round(bound).bit_length() - 1) for bound in (1 / SMALLEST_SCALE, LARGEST_SCALE)
    )
    assert limit("scale") == f"0, or within [2⁻{smallest[1:]}, {largest}]"
    assert f"1 to {vars(network)['_MAX_TENSORS']:,})" in FORMAT
    assert f"1 to\n{power(vars(network)['_MAX_VALUES'].bit_length() - 1)} of them" in FORMAT
    assert f"never stands for more than {8 * MAX_STEP_WEIGHTS:,} weights" in FORMAT
    schema = json.loads((ROOT / "miracle_hub" / "format" / "schema.json").read_text(encoding="utf-8"))
    digests = schema["$defs"]["quantization_config"]["properties"]["stage_digests"]
    assert f"at most {digests['maxItems'] - 1} refinements" in FORMAT


def test_the_format_has_the_versions_and_the_table_of_the_code() -> None:
    versions = dict(re.findall(r"^\| (repository|payload|network) \| (.+?) \|", FORMAT, re.MULTILINE))
    assert max(map(int, re.findall(r"\d+", versions["repository"]))) == FORMAT_VERSION
    assert versions["payload"] == f"{payload.VERSION}; {payload.DIFFERENCE_VERSION} is a difference"
    assert max(map(int, re.findall(r"\d+", versions["network"]))) == network.VERSION
    magics = f"`{payload.MAGIC.decode()}` for a payload, `{network.MAGIC.decode()}` for a network's stream"
    assert f"| 4 | magic: {magics} |" in FORMAT
    assert (payload.VERSION, payload.DIFFERENCE_VERSION) == (1, 2)
    of_payloads = "1 for a payload, 2 for one that is a difference"
    assert f"| 1 | version: {of_payloads}; for a stream 1, or 2 of two codes |" in FORMAT
    assert QUANTILES_SHA256 in FORMAT
    dtypes = ", ".join(f"{number} {dtype}" for number, dtype in enumerate(payload.DTYPES))
    assert f"dtype ({dtypes})" in FORMAT


def test_code_cites_sections_of_the_format_that_exist_and_no_other_page() -> None:
    sections, cited = set(headings(ROOT / "FORMAT.md")), set()
    for path in CODE:
        text = re.sub(r"\s*\n\s*#?\s*", " ", path.read_text(encoding="utf-8"))
        cited |= set(re.findall(r'FORMAT\.md, "([^"(]+)"', text))
        assert path == Path(__file__) or not re.search(r'README, "', text), name(path)
    assert cited and cited <= sections


def classes() -> list[str]:
    kernels = ast.parse((ROOT / "kernels/torch-ext/miracle_kernels/errors.py").read_text(encoding="utf-8"))
    own = [kind for kind, value in vars(miracle_hub.errors).items() if isinstance(value, type)]
    return own + [node.name for node in kernels.body if isinstance(node, ast.ClassDef)]


def entry(error: str) -> str:
    """What the page of troubles says about a class."""
    (found,) = re.findall(rf"^### {error}\n(.*?)(?=^##|\Z)", TROUBLES, re.MULTILINE | re.DOTALL)
    return found


def templates() -> Iterator[re.Pattern[str]]:
    """Every message of the package, with anything for what is filled in."""
    for path in sorted((ROOT / "miracle_hub").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [
                    re.escape(str(p.value)) if isinstance(p, ast.Constant) else ".*" for p in node.values
                ]
                if sum(len(part) for part in parts if part != ".*") > 15:
                    yield re.compile("".join(parts), re.DOTALL)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and len(node.value) > 30:
                yield re.compile(re.escape(node.value))


@pytest.mark.parametrize("error", classes())
def test_every_error_has_its_entry(error: str) -> None:
    assert len(entry(error).split()) >= 5


def test_only_errors_have_entries_and_their_examples_are_messages_of_the_package() -> None:
    assert set(re.findall(r"^### (\w+)$", TROUBLES, re.MULTILINE)) == set(classes())
    said, examples = list(templates()), re.findall(r"```text\n(.*?)\n```", TROUBLES, re.DOTALL)
    assert len(examples) > 15
    for example in examples:
        assert any(template.fullmatch(example) for template in said), example
