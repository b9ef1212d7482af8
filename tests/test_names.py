"""One rule selects names, PEFT's, wherever names are selected."""

import inspect
import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft.tuners.tuners_utils import check_target_module_exists
from safetensors.torch import save_file
from torch import nn

import miracle_hub
from miracle_hub.errors import OptionError
from miracle_hub.names import is_named, matches, unmatched
from miracle_hub.options import CompressOptions, FitOptions, LoadOptions
from miracle_hub.training.config import VariationalConfig
from miracle_hub.training.targets import find_targets

NAME = "encoder.layers.1.attention.weight"


@pytest.mark.parametrize(
    ("wanted", "is_taken"),
    [
        ([NAME], True),  # the parameter itself
        (["attention.weight"], True),  # its end after a dot
        (["weight"], True),
        (["encoder.layers.1.attention"], True),  # its module
        (["attention"], True),
        (["layers.1"], True),  # a module above it
        (["encoder"], True),
        (["absent", "layers.1"], True),
        (["ayers.1"], False),  # not after a dot
        (["tention.weight"], False),
        (["layers"], True),
        (["layers.10", "layers.", "1.weight", ""], False),
        ([], False),
        (r"encoder\.layers\.\d+", True),
        (r".*\.attention", True),
        (r".*weight", True),
        (r"layers\.1", False),  # a regular expression matches whole names
        (r"attention", False),
        (r"encoder\.layers\.1\.", False),
    ],
)
def test_a_selection_means_whole_names_or_ends_after_a_dot_of_a_tensor_or_a_module_above(
    wanted: str | list[str], is_taken: bool
) -> None:
    assert matches(NAME, wanted) is is_taken


def test_layer_1_does_not_take_layer_10() -> None:
    for wanted in (["layers.1"], r".*layers\.1"):
        assert matches("encoder.layers.1.weight", wanted)
        assert not matches("encoder.layers.10.weight", wanted)


def test_a_module_is_not_the_tensor_itself() -> None:
    assert is_named(NAME, ["attention.weight"]) and is_named(NAME, r".*\.weight")
    assert not is_named(NAME, ["attention"]) and not is_named(NAME, r".*\.attention")


PARTS = st.lists(st.sampled_from(["a", "ab", "b", "1", "10"]), min_size=1, max_size=4).map(".".join)
PATTERNS = st.one_of(
    st.lists(PARTS, max_size=3), PARTS.map(lambda name: name.replace("1", r"\d")), PARTS.map(".*{}".format)
)


@given(PARTS, PATTERNS.filter(bool))
def test_names_of_modules_are_selected_as_peft_does(module: str, wanted: str | list[str]) -> None:
    """PEFT asks this of every module; a tensor is taken where its module or one above is."""
    config = SimpleNamespace(target_modules=wanted, exclude_modules=None, modules_to_save=None)

    def theirs(name: str) -> bool:
        return bool(check_target_module_exists(config, name))

    above = list(itertools.accumulate(module.split("."), "{}.{}".format))
    assert is_named(module, wanted) == theirs(module)
    assert matches(module, wanted) == any(map(theirs, above))


@given(st.lists(PARTS, max_size=4), PATTERNS)
def test_unmatched_is_what_takes_none(names: list[str], wanted: str | list[str]) -> None:
    each = [wanted] if isinstance(wanted, str) else [[one] for one in wanted]
    taking_none = [one for one in each if not any(matches(name, one) for name in names)]
    assert unmatched(wanted, names) == [one if isinstance(one, str) else one[0] for one in taking_none]


@pytest.mark.parametrize(
    ("make", "option"),
    [
        (lambda wanted: CompressOptions(size=1, modules_to_not_convert=wanted), "modules_to_not_convert"),
        (lambda wanted: FitOptions(rate=1, target_modules=wanted), "target_modules"),
        (lambda wanted: LoadOptions(modules_to_not_convert=wanted), "modules_to_not_convert"),
        (lambda wanted: VariationalConfig(rate=1, target_modules=wanted), "target_modules"),
        (lambda wanted: VariationalConfig(rate=1, exclude_modules=wanted), "exclude_modules"),
        (lambda wanted: VariationalConfig(rate=1, modules_to_save=wanted), "modules_to_save"),
    ],
    ids=["compress", "fit", "load", "target", "exclude", "save"],
)
def test_what_is_no_selection_is_refused_by_the_name_of_the_option(make: Any, option: str) -> None:
    with pytest.raises(OptionError) as raised:
        make("layer.(1")
    assert str(raised.value) == (
        f"{option}: expected a regular expression, found 'layer.(1' (missing ), unterminated subpattern at "
        "position 6); write a list of names, such as ['layer.1'], to have them taken as they are"
    )
    for wanted in (5, [5], {"a": 1}):
        with pytest.raises(OptionError) as raised:
            make(wanted)
        assert str(raised.value) == (
            f"{option}: expected a list of names or a regular expression, found {wanted!r}; write ['name'] "
            "for one"
        )


SELECTIONS = [["layers.1"], ["layers.1.weight", "head"], r"layers\.\d", r"(.*\.)?1(\.weight)?", ["weight"]]


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(40, 40, bias=False) for _ in range(12))
        self.head = nn.Linear(40, 40, bias=False)


@pytest.mark.parametrize("wanted", SELECTIONS, ids=str)
def test_compress_and_fit_select_the_same_tensors(wanted: str | list[str], tmp_path: Path) -> None:
    model = Layers()
    tensors: dict[str, Any] = {**model.state_dict(), "other.weight": torch.randn(40, 40)}
    expected = {name for name in model.state_dict() if matches(name, wanted)}
    fitted = VariationalConfig(rate=1.0, target_modules=wanted)
    assert {target.name for target in find_targets(model, fitted)} == expected
    excluded = VariationalConfig(rate=1.0, exclude_modules=wanted, target_modules=["layers", "head"])
    if expected != set(model.state_dict()):
        found = {target.name for target in find_targets(model, excluded)}
        assert found == set(model.state_dict()) - expected
    (tmp_path / "in").mkdir()
    save_file(tensors, tmp_path / "in" / "model.safetensors")
    (tmp_path / "in" / "config.json").write_text('{"model_type": "bert"}')
    if matches("other.weight", wanted):
        return
    bits_per_weight = (32 * len(expected) + 3 * (len(tensors) - len(expected))) / len(tensors)
    miracle_hub.compress(
        tmp_path / "in", tmp_path / "out", bits_per_weight=bits_per_weight, window_bits=8,
        modules_to_not_convert=wanted, progress=False,
    )  # fmt: skip
    plain = {t.name for t in miracle_hub.inspect(tmp_path / "out").tensors if t.reason}
    assert plain == expected
    # A list is told as it was given, and a regular expression by what it took: readers run none.
    facts = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    told = facts["modules_to_not_convert"]
    assert told == wanted if isinstance(wanted, list) else set(told) == expected


def test_every_selection_of_the_package_is_by_this_rule() -> None:
    """Nobody else compares the ends of names, or runs a user's regular expression."""
    root = Path(inspect.getfile(miracle_hub)).parent
    for path in root.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        if path.name != "names.py":
            assert 'endswith(f".{' not in text and "re.fullmatch(wanted" not in text, path
