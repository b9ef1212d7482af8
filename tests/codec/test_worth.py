"""What errors are worth without data: a head more than other matrices, convolutions whatever their size."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from miracle_hub.codec.inspection import inspect_folder
from miracle_hub.codec.knowledge import weighed
from miracle_hub.codec.ladder import SIZE_EXPONENT
from miracle_hub.codec.rates import Curve, Option
from miracle_hub.codec.worth import HEAD, by_worth, head_of, is_convolutional, worths
from miracle_hub.format.spec import TensorSpec

Shapes = dict[str, tuple[int, ...]]

WORDS = 1000
TABLE: Shapes = {"model.embed_tokens.weight": (WORDS, 64), "model.layers.0.mlp.up_proj.weight": (256, 64)}
BLOCK: Shapes = {"a.conv1.weight": (16, 16, 3, 3), "a.conv2.weight": (32, 16, 3, 3), "a.bn.weight": (16,)}


def specs(shapes: Shapes) -> list[TensorSpec]:
    return [TensorSpec(name, "F32", shape) for name, shape in shapes.items()]


def config(*architectures: Any, **others: Any) -> dict[str, Any]:
    return {"architectures": list(architectures), "vocab_size": WORDS, **others}


def curves(names: str = "abcd") -> list[Curve]:
    return [Curve(name, 4, (Option(None, 8, 1.0), Option(None, 16, 0.5))) for name in names]


HEADS: list[tuple[str, Shapes, dict[str, Any], str | None]] = [
    ("tied", TABLE, config("LlamaForCausalLM"), "model.embed_tokens.weight"),
    ("gpt2", {"wte.weight": (WORDS, 64), "wpe.weight": (64, 64)}, config("GPT2LMHeadModel"), "wte.weight"),
    ("untied", TABLE | {"lm_head.weight": (WORDS, 64)}, config("LlamaForCausalLM"), "lm_head.weight"),
    ("neox", TABLE | {"embed_out.weight": (WORDS, 64)}, config("GPTNeoXForCausalLM"), "embed_out.weight"),
    (
        "composite",
        TABLE,
        {"architectures": ["LlavaForConditionalGeneration"], "text_config": {"vocab_size": WORDS}},
        "model.embed_tokens.weight",
    ),
    ("encoder", TABLE, config("BertModel"), None),
    ("masked", TABLE, config("BertForMaskedLM"), None),
    ("classifier", TABLE, config("BertForSequenceClassification"), None),
    ("no head of several", TABLE | {"b.embed.weight": (WORDS, 64)}, config("XForCausalLM"), None),
    ("other words", TABLE, config("LlamaForCausalLM", vocab_size=WORDS + 1), None),
    ("biases", {"model.bias": (WORDS,)}, config("LlamaForCausalLM"), None),
    ("nothing said", TABLE, {}, None),
    ("nonsense", TABLE, {"architectures": "LlamaForCausalLM", "vocab_size": "many", "text_config": 3}, None),
    ("more nonsense", TABLE, config(None, 3, ["LlamaForCausalLM"], vocab_size=True), None),
]


@pytest.mark.parametrize(("shapes", "said", "found"), [row[1:] for row in HEADS], ids=[r[0] for r in HEADS])
def test_a_head_is_known_by_the_class_and_the_words(
    shapes: Shapes, said: dict[str, Any], found: str | None
) -> None:
    assert head_of(specs(shapes), said) == found
    assert worths(specs(shapes), said) == ({found: HEAD} if found else {})


@pytest.mark.parametrize(
    ("shapes", "expected"),
    [
        (BLOCK | {"linear.weight": (10, 64)}, True),
        ({"c1": (20, 1, 5, 5), "c2": (50, 20, 5, 5), "ip1": (500, 800), "ip2": (10, 500)}, True),
        ({"patches": (64, 3, 16, 16), "query": (64, 64), "key": (64, 64)}, False),
        ({"conv1": (64, 80, 3), "conv2": (64, 64, 3), "query": (64, 64)}, False),
        ({"experts": (8, 64, 64), "bias": (64,)}, False),
        ({"bias": (64,), "scalar": ()}, False),
        ({}, False),
    ],
)
def test_a_network_is_convolutional_where_half_of_its_matrices_are(shapes: Shapes, expected: bool) -> None:
    assert is_convolutional(specs(shapes)) is expected


def test_convolutional_networks_weigh_all_tensors_alike() -> None:
    found = worths(specs(BLOCK | {"linear.weight": (10, 64), "empty": (0, 3, 3, 3)}), config("ResNetModel"))
    sizes = {"a.conv1.weight": 2304, "a.conv2.weight": 4608, "a.bn.weight": 16, "linear.weight": 640}
    assert found.keys() == sizes.keys()
    assert all(found[n] * size**SIZE_EXPONENT == pytest.approx(1) for n, size in sizes.items())


def test_of_what_is_worth_as_usual_curves_are_as_they_were() -> None:
    plain = curves()
    found = by_worth(plain, {"b": 4.0})
    assert [a is b for a, b in zip(found, plain, strict=True)] == [True, False, True, True]
    assert [o.error for o in found[1].options] == [4.0, 2.0]
    assert [o.n_bytes for o in found[1].options] == [8, 16]


@given(st.lists(st.tuples(st.integers(10, 10**8), st.floats(0.01, 100)), min_size=4, max_size=4))
def test_costs_that_the_rule_foresaw_change_nothing(of: list[tuple[int, float]]) -> None:
    """What calibration measures is trusted by its ratio to the rule, whatever the rule is."""
    sizes = {name: size for name, (size, _) in zip("abcd", of, strict=True)}
    worth = {name: factor for name, (_, factor) in zip("abcd", of, strict=True)}
    ruled = by_worth(curves(), worth)
    costs = {name: torch.tensor([sizes[name] ** SIZE_EXPONENT * worth[name]]) for name in "abc"}
    for before, after in zip(ruled, weighed(ruled, costs, sizes, worth), strict=True):
        pairs = zip(before.options, after.options, strict=True)
        assert all(math.isclose(a.error, b.error, rel_tol=1e-5) for a, b in pairs)


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(shape[0]))


def test_a_head_gets_more_bits_than_the_same_table_of_an_encoder(
    save_model: Callable[..., Path], compress: Callable[..., Any], tmp_path: Path
) -> None:
    tensors = {name: randn(*shape) for name, shape in TABLE.items()}
    rates: list[dict[str, float]] = []
    for name in ("LlamaModel", "LlamaForCausalLM", "LlamaForCausalLM"):
        source = save_model(tensors, f"{name}-{len(rates)}", config=config(name, model_type="llama"))
        report = compress(source, tmp_path / f"out-{len(rates)}")
        assert report.bits_per_weight <= 3.0
        rates.append({t.name: t.rate for t in inspect_folder(tmp_path / f"out-{len(rates)}").tensors})
    encoder, causal, again = rates
    assert causal == again
    assert causal["model.embed_tokens.weight"] > encoder["model.embed_tokens.weight"]
    assert causal["model.layers.0.mlp.up_proj.weight"] < encoder["model.layers.0.mlp.up_proj.weight"]
