"""A name that takes nothing is refused, and what it may have meant is offered: modules, options."""

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

import miracle_hub
from miracle_hub import MiracleConfig
from miracle_hub.errors import OptionError
from miracle_hub.names import check_taken, near, near_selection, offer, unmatched
from miracle_hub.training.config import VariationalConfig
from miracle_hub.training.targets import find_targets

PARTS = st.lists(st.sampled_from(["layers", "query", "key", "norm", "mlp", "0", "1", "10", "x"]), min_size=1)
NAMES = st.lists(PARTS.map(".".join).map("{}.weight".format), min_size=1, max_size=8)
ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789._"


@st.composite
def edited(draw: st.DrawFn, name: str) -> str:
    """One character more, less or another, or two that changed places."""
    at, other = draw(st.integers(0, len(name) - 1)), draw(st.sampled_from(ALPHABET))
    kinds = (
        name[:at] + name[at + 1 :],
        name[:at] + other + name[at:],
        name[:at] + other + name[at + 1 :],
        name[:at] + name[at : at + 2][::-1] + name[at + 2 :],
    )
    return draw(st.sampled_from(kinds))


@settings(max_examples=60, deadline=None)
@given(names=NAMES, data=st.data())
def test_one_edited_character_of_a_true_name_is_an_error_that_offers_the_true_name(
    names: list[str], data: st.DataObject
) -> None:
    parts = data.draw(st.sampled_from(names)).split(".")
    start = data.draw(st.integers(0, len(parts) - 1))
    true = ".".join(parts[start : data.draw(st.integers(start + 1, len(parts)))])
    wrong = data.draw(edited(true))
    assume(wrong and unmatched([wrong], names))
    for given_ in ([wrong], [true, wrong], [true, true, wrong]):
        with pytest.raises(OptionError) as raised:
            check_taken(given_, names, "option", "the model")
        assert f"found {wrong!r}, which takes none; near it: " in str(raised.value)
        assert repr(true) in str(raised.value)
    check_taken([true], names, "option", "the model")


def test_what_is_near_is_offered_and_else_what_there_is() -> None:
    assert near("Query", ["query", "key"]) == ["query"] and near("attentoin.qury", ["attention.query"])
    assert offer("qury", ["query", "key"]) == "near it: 'query'"
    assert offer("zzz", ["query", "key"]) == "there are: query, key"
    assert offer("zzz", map(str, range(99))).endswith("10, 11, …") and offer("a", []) == "there are: none"


def test_the_end_of_a_name_as_a_regular_expression_is_told_apart() -> None:
    """What most people try first: names of modules as a string."""
    names = ["encoder.0.query.weight", "encoder.1.query.weight"]
    assert near_selection("query", names) == "'query' is the end of a name: write ['query'], or '.*query'"
    assert near_selection(r"encoder\.0\.qury", names) == "near it: 'encoder.0.query'"


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.norm, self.head = nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 2)
        self.act = nn.ReLU()


def targets(**options: Any) -> Callable[[], object]:
    return lambda: find_targets(Net(), VariationalConfig(rate=2.0, window_bits=4, **options))


def made(**options: Any) -> Callable[[], object]:
    return lambda: miracle_hub.make_variational(Net(), rate=2.0, window_bits=4, **options)


SELECTED = "expected modules or tensors of Net, found 'bdoy', which takes none; near it: 'body'; correct it"
REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "target": (targets(target_modules=["bdoy"]), f"target_modules: {SELECTED}"),
    "one of three": (targets(target_modules=["head", "body", "bdoy"]), f"target_modules: {SELECTED}"),
    "exclude": (targets(exclude_modules=["bdoy"]), f"exclude_modules: {SELECTED}"),
    "exclude by an expression": (targets(exclude_modules="bdoy"), f"exclude_modules: {SELECTED}"),
    "save": (targets(modules_to_save=["head", "bdoy"]), f"modules_to_save: {SELECTED}"),
    "expression": (targets(target_modules="bdoy"), "found none for 'bdoy'"),
    "the expression's name": (targets(target_modules="bdoy"), "(near it: 'body')"),
    "keyword": (targets(target_modules="all-liner"), "(near it: 'all-linear')"),
    "vectors": (
        targets(target_modules=["body", "norm"]),
        "expected modules of Net with matrices to code, found 'norm', which takes vectors alone, such as "
        "norm.weight; name what is to be coded in full, or leave it out",
    ),
    "no weights": (
        targets(target_modules=["body", "act"]),
        "found 'act', which takes no weights; name what is to be",
    ),
    "sharing": (made(streams="network", sharing={"bdoy.weight": 2}), "near it: 'body.weight'; correct it"),
    "option": (made(target_module=["body"]), "check the spelling (near it: 'target_modules')"),
    "config": (
        lambda: miracle_hub.make_variational(Net(), MiracleConfig(rate=1.0, paramterization="mean-kl")),
        "found 'paramterization'; check the spelling (near it: 'parametrization')",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_name_that_takes_nothing_is_refused_with_what_is_near(case: str) -> None:
    call, message = REFUSED[case]
    with pytest.raises(OptionError) as raised:
        call()
    assert message in str(raised.value)


def test_a_module_without_weights_can_be_excluded() -> None:
    assert len(find_targets(Net(), VariationalConfig(rate=2.0, window_bits=4, exclude_modules=["act"]))) == 2
