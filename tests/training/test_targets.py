"""What becomes variational: the selections of PEFT, and what is refused before anything is changed."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from transformers import GPT2Config, GPT2LMHeadModel

from miracle_hub.errors import BudgetError, OptionError
from miracle_hub.training.config import VariationalConfig
from miracle_hub.training.convert import make_variational
from miracle_hub.training.model import variational_of
from miracle_hub.training.targets import find_targets

MATRICES = ["embed.weight", "body.0.weight", "body.2.weight", "conv.weight", "head.weight"]


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 8)
        self.body = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8, bias=False))
        self.conv, self.head = nn.Conv1d(8, 8, 3), nn.Linear(8, 4)
        self.gain = nn.Parameter(torch.ones(8))
        self.register_parameter("absent", None)
        self.counts = nn.Parameter(torch.arange(8), requires_grad=False)

    def get_output_embeddings(self) -> nn.Module:
        return self.head


def names(model: nn.Module, **options: Any) -> list[str]:
    config = VariationalConfig(rate=4.0, window_bits=4, **options)
    return [target.name for target in find_targets(model, config)]


ALL = [name for name, p in Mixed().named_parameters() if p.is_floating_point()]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, MATRICES),
        ({"streams": "network"}, ALL),
        ({"target_modules": "all"}, ALL),
        ({"target_modules": "all-matrices", "streams": "network"}, MATRICES),
        ({"target_modules": "all-linear"}, ["body.0.weight", "body.2.weight"]),
        # Vectors of modules that are named stay plain in a file of tensors, unless they are named themselves.
        ({"target_modules": ["body"]}, ["body.0.weight", "body.2.weight"]),
        (
            {"target_modules": ["body"], "streams": "network"},
            ["body.0.weight", "body.0.bias", "body.1.weight", "body.1.bias", "body.2.weight"],
        ),
        ({"target_modules": ["0.bias", "gain"]}, ["gain", "body.0.bias"]),
        ({"target_modules": r"body\.\d"}, ["body.0.weight", "body.2.weight"]),
        (
            {"target_modules": r".*bias", "streams": "network"},
            ["body.0.bias", "body.1.bias", "conv.bias", "head.bias"],
        ),
        ({"target_modules": r"ody\.0|conv"}, ["conv.weight"]),
        ({"exclude_modules": ["body", "conv"]}, ["embed.weight", "head.weight"]),
        ({"exclude_modules": r"(body|conv).*", "modules_to_save": "head"}, ["embed.weight"]),
        ({"modules_to_save": ["head"], "target_modules": ["head", "conv"]}, ["conv.weight"]),
    ],
    ids=str,
)
def test_modules_are_chosen_by_keyword_list_or_regular_expression(
    options: dict[str, Any], expected: list[str]
) -> None:
    assert sorted(names(Mixed(), **options)) == sorted(expected)


@pytest.mark.parametrize("wanted", ["all-linear", ["c_attn", "h.1.mlp.c_fc"], r".*\.h\.0\.mlp\.c_(fc|proj)"])
def test_selections_are_those_of_peft(wanted: str | list[str]) -> None:
    from peft import LoraConfig
    from peft.tuners.lora import LoraLayer
    from peft.tuners.lora.model import LoraModel

    config = GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=8, vocab_size=16)
    ours = {name.removesuffix(".weight") for name in names(GPT2LMHeadModel(config), target_modules=wanted)}
    lora = LoraModel(
        GPT2LMHeadModel(config), LoraConfig(target_modules=wanted, fan_in_fan_out=True), "default"
    )
    theirs = {
        name.removeprefix("model.") for name, module in lora.named_modules() if isinstance(module, LoraLayer)
    }
    assert ours == theirs and ours


def test_tied_parameters_are_one_target_with_all_owners() -> None:
    model = Mixed()
    model.body[2].weight = model.body[0].weight
    model.head.extra = model.head.bias
    config = VariationalConfig(rate=4.0, window_bits=4, streams="network")
    found = {target.name: target.owners for target in find_targets(model, config)}
    assert found["body.0.weight"] == ((model.body[0], "weight"), (model.body[2], "weight"))
    assert found["head.bias"] == ((model.head, "bias"), (model.head, "extra"))
    assert not {"body.2.weight", "head.extra"} & found.keys()


def test_the_head_of_a_language_model_is_not_linear_even_if_it_is_tied() -> None:
    config = GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=8, vocab_size=16)
    tied, untied = GPT2LMHeadModel(config), GPT2LMHeadModel(config)
    untied.lm_head.weight = nn.Parameter(tied.lm_head.weight.detach().clone())
    for model in (tied, untied):
        assert all(".h.0." in name for name in names(model, target_modules="all-linear"))
    assert "lm_head.weight" in names(untied) and "lm_head.weight" not in names(tied)


def lazy() -> nn.Module:
    return nn.Sequential(nn.LazyLinear(4))


def empty() -> nn.Module:
    model = nn.Linear(4, 4)
    model.bias = nn.Parameter(torch.zeros(0))
    return model


def with_a(value: float) -> nn.Module:
    model = nn.Linear(4, 4)
    with torch.no_grad():
        model.weight[1, 2] = value
    return model


def small_float() -> nn.Module:
    model = nn.Linear(4, 4, bias=False)
    model.weight = nn.Parameter(model.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    return model


def inner_variational() -> nn.Module:
    inner = make_variational(nn.Linear(8, 8), VariationalConfig(rate=2.0, window_bits=4))
    return nn.Sequential(nn.Linear(8, 8), nn.Sequential(inner))


REFUSED: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], str]] = {
    "nothing": (
        Mixed,
        {"target_modules": "hed", "exclude_modules": ["body"]},
        "target_modules: expected modules with weights to code, found none for 'hed' (excluded: [['body']]) "
        "in Mixed; choose one of all, all-matrices, all-linear, or of its modules with parameters: gain, "
        "counts, embed, body.0, body.1, body.2, conv, head",
    ),
    "no-parameters": (nn.ReLU, {}, "or of its modules with parameters: it has none"),
    "lazy": (
        lazy,
        {},
        "0.weight: expected weights to start from, found none; run the model once, or load its weights",
    ),
    "meta": (
        lambda: nn.Linear(4, 4, device="meta"),
        {},
        "weight: expected weights to start from, found none",
    ),
    "empty": (empty, {"target_modules": "all"}, "bias: expected weights, found none; exclude the module"),
    "nan": (
        lambda: with_a(float("nan")),
        {},
        "weight: expected finite weights, found 1 of 16 that are NaN or infinite; repair the model first",
    ),
    "infinite": (
        lambda: with_a(float("-inf")),
        {},
        "weight: expected finite weights, found 1 of 16 that are",
    ),
    "float8": (
        small_float,
        {},
        "weight: expected one of torch.float32, torch.bfloat16, torch.float16, torch.float64, found "
        "torch.float8_e4m3fn; exclude the module, or cast it",
    ),
    "sparse": (
        lambda: nn.Embedding(4, 4, sparse=True),
        {},
        "weight: expected dense gradients, found sparse=True; make the embedding dense, or exclude the "
        "module",
    ),
    "parametrized": (
        lambda: nn.Sequential(nn.Tanh(), weight_norm(nn.Linear(4, 4))),
        {},
        "1.weight: expected a plain parameter, found one that is parametrized already; remove that first, or "
        "exclude the module",
    ),
    "parametrized-linear": (
        lambda: nn.Sequential(nn.Linear(4, 4), weight_norm(nn.Linear(4, 4))),
        {"target_modules": "all-linear"},
        "1.weight: expected a plain parameter, found one that is parametrized already",
    ),
    "variational": (
        lambda: make_variational(Mixed(), VariationalConfig(rate=4.0, window_bits=4)),
        {},
        "model: expected one without posteriors, found those of embed; call remove_variational(model) first",
    ),
    "inner-variational": (
        inner_variational,
        {"target_modules": "0"},
        "model: expected one without posteriors, found those of 1.0; call remove_variational(model) first",
    ),
    "sharing": (
        Mixed,
        {"sharing": {"haed.weight": 2.0}, "streams": "network", "target_modules": ["head", "gain"]},
        "sharing: expected (the end of) the name of a coded parameter, found 'haed.weight'; near it: "
        "'head.weight'; correct it, or leave it out",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_converted_is_named_and_nothing_is_changed(case: str) -> None:
    make, options, message = REFUSED[case]
    model = make()
    before = [(name, type(module), list(module._parameters)) for name, module in model.named_modules()]
    with pytest.raises(OptionError, match=re.escape(message)):
        make_variational(model, VariationalConfig(rate=4.0, window_bits=4, **options))
    assert [(name, type(m), list(m._parameters)) for name, m in model.named_modules()] == before


def test_a_budget_below_one_block_names_the_tensor_and_nothing_is_changed() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 2))
    message = "1.weight: 12 bits for 128 values are less than a block code with windows of 16 bits"
    with pytest.raises(BudgetError, match=message):
        make_variational(model, VariationalConfig(rate=0.1, code="block", window_bits=16))
    assert type(model[0]) is nn.Linear and isinstance(model[0].weight, nn.Parameter)


def test_what_is_excluded_may_be_parametrized_or_sparse() -> None:
    model = nn.Sequential(nn.Embedding(4, 4, sparse=True), weight_norm(nn.Linear(4, 4)), nn.Linear(4, 4))
    config = VariationalConfig(rate=4.0, window_bits=4, exclude_modules=["0", "1"])
    make_variational(model, config)
    assert [stream.members[0].name for stream in variational_of(model).streams] == ["2.weight"]
    embedding: Any = model[0]
    model(torch.arange(4)).sum().backward()
    assert embedding.weight.grad.is_sparse
