"""Plans of files over kinds of models, codes and sizes: at least 99 % of what is asked, and never more."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    ViTConfig,
    ViTForImageClassification,
)

from miracle_hub import VariationalConfig
from miracle_hub.errors import BudgetError
from miracle_hub.finetune.budget import plan_file

SMALL: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
WIDE: dict[str, Any] = SMALL | {"hidden_size": 128, "intermediate_size": 192}


def bert_with_row_scales() -> nn.Module:
    return BertForSequenceClassification(BertConfig(**WIDE, vocab_size=90, max_position_embeddings=16))


def tied_bert() -> nn.Module:
    config = BertConfig(**SMALL, intermediate_size=32, vocab_size=90, max_position_embeddings=16)
    return BertForMaskedLM(config)


def tied_gpt() -> nn.Module:
    options: dict[str, Any] = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 60, "n_positions": 16}
    return GPT2LMHeadModel(GPT2Config(**options, bos_token_id=0, eos_token_id=0))


def vit() -> nn.Module:
    return ViTForImageClassification(ViTConfig(**SMALL, intermediate_size=32, image_size=16, patch_size=4))


def convolutions() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.Conv2d(16, 24, 3), nn.Linear(24, 10))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "bert with row scales": bert_with_row_scales,
    "tied bert": tied_bert,
    "tied gpt": tied_gpt,
    "vit": vit,
    "half vit": lambda: vit().half(),
    "convolutions": convolutions,
    "lstm": lambda: nn.Sequential(nn.Linear(9, 24), nn.LSTM(24, 16, 2)),
    "perceptron": lambda: nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 4)),
    "few long rows": lambda: nn.Linear(300, 10),
    "two rows": lambda: nn.Linear(769, 2),
    "one row": lambda: nn.Linear(900, 1),
}
OPTIONS: list[dict[str, Any]] = [
    {},
    {"scales": "tensor", "window_bits": 8, "parametrization": "mean-kl"},
    {"target_modules": "all", "parametrization": "mean-var"},
    {"code": "block", "window_bits": 12},
    {"streams": "network"},
    {"streams": "network", "code": "block", "window_bits": 16, "parametrization": "test-channel"},
    {"streams": "network", "sharing": {}, "window_bits": 10},
]
MADE: dict[str, nn.Module] = {}


def model_of(kind: str) -> nn.Module:
    if kind not in MADE:
        torch.manual_seed(0)
        MADE[kind] = MODELS[kind]()
    return MADE[kind]


def range_of(model: nn.Module, options: dict[str, Any]) -> tuple[int, int]:
    """The least and the most that the error says."""
    with pytest.raises(BudgetError) as raised:
        plan_file(model, VariationalConfig(size=1, **options))
    found = re.search(r"can have ([\d,]+) \(.* to ([\d,]+) bytes", str(raised.value))
    assert found
    least, most = (int(found[i].replace(",", "")) for i in (1, 2))
    return least, most


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kind", MODELS)
@settings(deadline=None, max_examples=3, derandomize=True, database=None)
@given(place=st.floats(0, 1))
def test_every_size_of_the_range_is_used_to_99_percent(
    kind: str, options: dict[str, Any], place: float
) -> None:
    """But where a few bytes are 1 % of it, or nothing but the highest rate for all is left to choose."""
    model = model_of(kind)
    if "sharing" in options:
        options = options | {"sharing": {max(dict(model.named_parameters()), key=len): 2.5}}
    least, most = range_of(model, options)
    size = max(int(least * (most / least) ** place), 400)
    for wanted in (size,) if least <= size <= 0.99 * most else (least, most):
        plan = plan_file(model, VariationalConfig(size=wanted, **options))
        assert plan.budget_bytes == wanted and 0.99 * wanted <= plan.n_bytes <= wanted


def test_a_size_between_two_that_are_possible_is_refused_with_both() -> None:
    model, options = nn.Linear(8, 1), {"streams": "network", "code": "block", "window_bits": 24}
    refused = set()
    for size in range(*range_of(model, options)):
        try:
            plan = plan_file(model, VariationalConfig(size=size, **options))
        except BudgetError as error:
            refused.add(size)
            found = re.fullmatch(
                rf"size: {size} bytes were asked for, but the file of this model, which is small or has few "
                r"rows, can have (\d+) or (\d+) bytes and nothing in between; ask for one of them, or code "
                "other modules",
                str(error),
            )
            assert found
            below, above = int(found[1]), int(found[2])
            assert below < size < above
            for possible in (below, above):
                given = VariationalConfig(size=possible, **options)
                assert plan_file(model, given).n_bytes == possible
        else:
            assert 0.99 * size <= plan.n_bytes <= size
    assert refused
