"""Hostile configurations: JSON too deep, names that are none, expressions that would never end."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from miracle_hub.codec.inspection import inspect_folder
from miracle_hub.errors import FormatError, OptionError, SourceError
from miracle_hub.names import matches
from miracle_hub.plugin.config import MiracleConfig
from tests.codec.attacks import readers, refused


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    return tmp_path / "model"


@pytest.mark.parametrize("nested", ["[" * 10**5, '{"a":' * 101 + "1" + "}" * 101])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_json_nested_too_deep_is_refused(nested: str, name: str, folder: Path) -> None:
    if name == "config.json":
        save_file({"w": torch.zeros(3)}, folder / "model.safetensors")
    (folder / name).write_text(nested)
    found = refused(folder, SourceError if name == "config.json" else FormatError)
    assert found.startswith(f"{folder / name}: expected ")
    if name == "config.json" and nested[0] == "{":
        assert found == (
            f"{folder / name}: expected at most 100 levels of JSON, found more; the file is hostile or "
            "damaged"
        )


def test_json_of_as_many_levels_as_allowed_comes_through(folder: Path) -> None:
    save_file({"w": torch.zeros(3)}, folder / "model.safetensors")
    facts = {
        "quantization_config": {"quant_method": "miracle"},
        "a": json.loads('{"a":' * 99 + "1" + "}" * 99),
    }
    (folder / "config.json").write_text(json.dumps(facts))
    for read in readers(folder):
        read()


def test_a_config_that_is_a_folder_is_refused(folder: Path) -> None:
    save_file({"w": torch.zeros(3)}, folder / "model.safetensors")
    (folder / "config.json").mkdir()
    assert refused(folder, SourceError) == (
        f"{folder / 'config.json'}: expected a file, found something else; download it again"
    )


@pytest.mark.parametrize("names", [5, [5], "layer", {"a": 1}])
def test_modules_that_are_no_list_of_names_are_refused(names: object, folder: Path) -> None:
    save_file({"w": torch.zeros(3, dtype=torch.uint8)}, folder / "model.safetensors")
    facts = {"quant_method": "miracle", "modules_to_not_convert": names}
    (folder / "config.json").write_text(json.dumps({"quantization_config": facts}))
    with pytest.raises(FormatError) as raised:
        inspect_folder(folder)
    assert str(raised.value) == (
        f"{folder / 'config.json'}: modules_to_not_convert: expected a list of names, found {str(names)!r}; "
        "download it again"
    )


@pytest.mark.parametrize("name", ["to_dict", "from_dict", "get_loading_attributes", "__class__"])
def test_a_figure_of_a_config_replaces_no_method(name: str) -> None:
    figures: dict[str, Any] = {name: 1}
    with pytest.raises(OptionError) as raised:
        MiracleConfig(**figures)
    assert str(raised.value) == (
        f"MiracleConfig: expected figures and options, found {name!r}, the name of a method; config.json is "
        "hostile or damaged: download it again"
    )


def test_a_figure_of_a_config_may_have_any_other_name() -> None:
    figures: dict[str, Any] = {"self": 1, "größe": 2}
    assert MiracleConfig(**figures).to_dict().items() >= figures.items()


def test_a_strangers_regular_expression_is_never_run() -> None:
    facts: dict[str, Any] = {"quant_method": "miracle", "modules_to_not_convert": "(a+)+b"}
    with pytest.raises(OptionError, match="^config.json: modules_to_not_convert: expected a list of names, "):
        MiracleConfig.from_dict(facts)
    facts["modules_to_not_convert"] = ["layer[0", "(a+)+b"]
    assert MiracleConfig.from_dict(facts).modules_to_not_convert == ["layer[0", "(a+)+b"]
    assert matches("layer[0.query", ["layer[0"]) and not matches("a" * 40, ["(a+)+b"])
