"""Every option is written once: dataclass, verb and command line say the same, in the same words."""

import ast
import inspect
import re
from collections.abc import Iterator
from dataclasses import FrozenInstanceError, fields, replace
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from typer.testing import CliRunner

import miracle_hub
from miracle_hub import CompressOptions, DecompressOptions, FitOptions, LoadOptions, MiracleConfig, cli
from miracle_hub.errors import BudgetError, MiracleError, OptionError
from miracle_hub.options import chosen, helps
from miracle_hub.training.config import VariationalConfig

VERBS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "compress": (CompressOptions, ("source", "out")),
    "decompress": (DecompressOptions, ("source", "out")),
    "fit": (FitOptions, ("source", "out", "data")),
}
# Who has `bits_per_weight` or `size` as a parameter or field, all of them of whole files.
OF_WHOLE_FILES = {
    *("api.compress", "finetune/fit.fit", "finetune/models.compress_model", "finetune/trainer.compress"),
    *("options.CompressOptions", "options.FitOptions", "training/config.VariationalConfig"),
    *("sizes.budget_bytes", "sizes.check_budget", "sizes.parse_size", "sizes.asked_for"),
    *("codec/report.Report", "codec/budget.Budget"),
}
# What only Python can be given, beside its options.
IN_PYTHON = {"compress": "model"}
ONE = "fit: expected exactly one of bits_per_weight, size and rate"
ROOT = Path(inspect.getfile(miracle_hub)).parent


def one_line(text: str | None) -> str:
    return re.sub(r"[\s│]+", " ", text or "").lower()


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_has_the_options_of_its_dataclass_with_their_types_and_defaults(verb: str) -> None:
    kind, inputs = VERBS[verb]
    parameters = dict(inspect.signature(getattr(miracle_hub, verb)).parameters)
    for name in ("options", *filter(None, [IN_PYTHON.get(verb)])):
        assert parameters.pop(name).default is None
    assert list(parameters) == [*inputs, *(field.name for field in fields(kind))]
    hints, own = get_type_hints(getattr(miracle_hub, verb)), get_type_hints(kind)
    for field in fields(kind):
        parameter = parameters[field.name]
        assert parameter.kind is inspect.Parameter.KEYWORD_ONLY
        assert (parameter.default, type(parameter.default)) == (field.default, type(field.default))
        assert hints[field.name] == own[field.name], field.name


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_says_of_every_option_what_its_field_says(verb: str) -> None:
    documented = one_line(getattr(miracle_hub, verb).__doc__)
    for name, text in helps(VERBS[verb][0]).items():
        assert text.endswith(".") and f" {name}: {one_line(text)}" in documented, name


@pytest.mark.parametrize("verb", VERBS)
def test_the_command_line_says_of_every_option_what_its_field_says(verb: str) -> None:
    kind, inputs = VERBS[verb]
    assert list(inspect.signature(getattr(cli, verb)).parameters) == [*inputs, *helps(kind)]
    shown = CliRunner().invoke(cli.app, [verb, "--help"], env={"COLUMNS": "400", "NO_COLOR": "1"})
    for name, text in helps(kind).items():
        option = f"--{name.replace('_', '-')} "
        line = next(line for line in shown.output.splitlines() if option in line)
        assert one_line(text) in one_line(line)
        # What is on by default can be switched off, and only that.
        assert ("--no-" in line) == (getattr(kind, name) is True)


@pytest.mark.parametrize(
    ("kind", "given"),
    [
        (CompressOptions, {"size": 1}),
        (DecompressOptions, {}),
        (FitOptions, {"rate": 1.0}),
        (LoadOptions, {}),
    ],
)
def test_options_are_values(kind: Any, given: dict[str, Any]) -> None:
    options = kind(**given)
    assert options == kind(**given) and hash(options) == hash(kind(**given))
    with pytest.raises(FrozenInstanceError):
        options.backend = "cpu"
    with pytest.raises(MiracleError):
        replace(options, **{"size": "many"} if "size" in helps(kind) else {"backend": "gpu"})


def test_a_verb_takes_its_options_together_or_as_keywords_and_not_both(tmp_path: Path) -> None:
    given = {field.name: field.default for field in fields(CompressOptions)}
    assert chosen(CompressOptions, None, {**given, "size": 9, "source": "x"}) == CompressOptions(size=9)
    whole = CompressOptions(size=9)
    assert chosen(CompressOptions, whole, {**given, "source": "x"}) is whole
    with pytest.raises(OptionError) as raised:
        miracle_hub.compress(tmp_path, tmp_path / "out", window_bits=9, options=whole)
    assert str(raised.value) == (
        "options: expected either options or keywords, found options and window_bits; give all of them in "
        "CompressOptions, or none"
    )


def test_reading_a_state_dict_has_the_options_of_all_readers() -> None:
    found = inspect.signature(miracle_hub.load_state_dict).parameters
    documented = one_line(miracle_hub.load_state_dict.__doc__)
    for name in ("stages", "verify", "backend"):
        assert found[name].default == getattr(LoadOptions, name)
        assert f" {name}: {one_line(helps(LoadOptions)[name])}" in documented
    ours = inspect.signature(MiracleConfig).parameters
    for name in ("backend", "keep_compressed", "modules_to_not_convert"):
        assert ours[name].default == getattr(LoadOptions, name)


def parameters(path: Path) -> Iterator[tuple[str, str]]:
    """Every parameter of a function and every field of a class, with whose it is."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            arguments = node.args
            for argument in [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]:
                yield node.name, argument.arg
        elif isinstance(node, ast.ClassDef):
            for statement in node.body:
                if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                    yield node.name, statement.target.id


def test_bits_per_weight_and_size_are_of_whole_files_and_nothing_is_called_bits() -> None:
    found: dict[str, set[str]] = {"bits_per_weight": set(), "size": set(), "bits": set()}
    for path in ROOT.rglob("*.py"):
        module = path.relative_to(ROOT).as_posix().removesuffix(".py")
        for owner, name in parameters(path):
            if name in found:
                found[name].add(f"{module}.{owner}")
    assert not found["bits"]
    assert found["bits_per_weight"] | found["size"] == OF_WHOLE_FILES
    shown = [cli.app.registered_commands[i].callback for i in range(len(cli.app.registered_commands))]
    for command in shown:
        assert command is not None and "bits" not in inspect.signature(command).parameters


@pytest.mark.parametrize(
    ("kind", "given", "error", "message"),
    [
        (FitOptions, {}, BudgetError, f"{ONE}, found none; give one of them"),
        (
            FitOptions,
            {"rate": 1.0, "size": "1MB"},
            BudgetError,
            f"{ONE}, found size and rate; give one of them",
        ),
        (
            FitOptions,
            {"bits_per_weight": 0},
            BudgetError,
            "bits_per_weight: expected a number above 0 and below 64, found 0; 2 to 4 suit most models",
        ),
        (
            FitOptions,
            {"rate": 1, "task": "regression"},
            OptionError,
            "task: expected one of ('text-classification', 'causal-lm'), found 'regression'; choose one of ",
        ),
        (FitOptions, {"rate": 1, "groups": 0}, OptionError, "groups: expected 1 or more, found 0; choose"),
        (
            FitOptions,
            {"rate": 1, "batch_size": 2.5},
            OptionError,
            "batch_size: expected 1 or more, found 2.5",
        ),
        (
            FitOptions,
            {"rate": 1, "refit_steps": -1},
            OptionError,
            "refit_steps: expected 0 or more, found -1",
        ),
        (FitOptions, {"rate": 1, "steps": "5"}, OptionError, "steps: expected -1 or more, found '5'; choose"),
        (
            FitOptions,
            {"rate": 1, "seed": -1},
            OptionError,
            "seed: expected 0 to 4294967295, found -1; choose",
        ),
        (
            FitOptions,
            {"rate": 1, "learning_rate": float("nan")},
            OptionError,
            "learning_rate: expected a positive number, found nan; ",
        ),
        (FitOptions, {"rate": 1, "epochs": 0}, OptionError, "epochs: expected a positive number, found 0; "),
        (FitOptions, {"rate": 0}, BudgetError, "rate: expected more than 0 and at most 24 bits per coded "),
        (
            CompressOptions,
            {"size": 1, "backend": "gpu"},
            OptionError,
            "backend: expected one of ('auto', 'cpu', 'triton'), found 'gpu'; choose one of them",
        ),
        (
            CompressOptions,
            {"size": 1, "window_bits": 8.0},
            OptionError,
            "window_bits: expected 8 to 16, found 8.0; longer windows are slower and lose a little less, 14 ",
        ),
        (
            CompressOptions,
            {"size": 1, "stages": True},
            OptionError,
            "stages: expected 1 to 9, found True; 1 suits who loads all at once",
        ),
        (DecompressOptions, {"stages": 10}, OptionError, "stages: expected 1 to 9, found 10; leave it out"),
        (DecompressOptions, {"max_shard_size": "x"}, OptionError, "max_shard_size: expected a positive "),
        (LoadOptions, {"stages": 0}, OptionError, "stages: expected 1 to 9, found 0; leave it out for all"),
        (
            LoadOptions,
            {"keep_compressed": "yes"},
            OptionError,
            "keep_compressed: expected True or False, found 'yes'; leave it out",
        ),
        (LoadOptions, {"backend": "gpu"}, OptionError, "backend: expected one of ('auto', 'cpu', 'triton')"),
    ],
    ids=str,
)
def test_an_option_out_of_range_is_named(
    kind: Any, given: dict[str, Any], error: type[MiracleError], message: str
) -> None:
    with pytest.raises(error) as raised:
        kind(**given)
    assert str(raised.value).startswith(message)


def test_an_option_that_has_a_new_name_says_it() -> None:
    from torch import nn

    with pytest.raises(OptionError) as raised:
        miracle_hub.make_variational(nn.Linear(4, 4), bits=9, streams="network")
    assert str(raised.value) == "make_variational: bits is now message_bits; write message_bits=…"
    with pytest.raises(OptionError, match="^MiracleConfig: bits is now message_bits; write message_bits=…$"):
        MiracleConfig(bits=9).variational()


def test_a_config_for_transformers_has_the_options_of_a_variational_model() -> None:
    given: dict[str, Any] = {"size": "9kB", "target_modules": ["layer.1"], "streams": "network"}
    assert MiracleConfig(**given).variational() == VariationalConfig(**given)
