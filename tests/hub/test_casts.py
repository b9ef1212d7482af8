"""Casting a model whose layers stay compressed: every way does the same, and none touches a payload."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch

from miracle_hub import MiracleConfig
from miracle_hub.plugin.compressed_linear import compressed_layers

if TYPE_CHECKING:
    from tests.hub.conftest import Repository

_TOKENS = torch.tensor([[5, 6, 7, 8]])
_CASTS: dict[str, tuple[Callable[[Any], Any], torch.dtype]] = {
    "half": (lambda model: model.half(), torch.float16),
    "bfloat16": (lambda model: model.bfloat16(), torch.bfloat16),
    "float": (lambda model: model.half().float(), torch.float32),
    "double": (lambda model: model.double(), torch.float64),
    "to a dtype": (lambda model: model.to(torch.float16), torch.float16),
    "to dtype=": (lambda model: model.to(dtype=torch.bfloat16), torch.bfloat16),
    "to a device": (lambda model: model.to("cpu"), torch.float32),
    "to both": (lambda model: model.to("cpu", torch.float16), torch.float16),
    "to a tensor": (lambda model: model.to(torch.zeros(1, dtype=torch.float64)), torch.float64),
    "type": (lambda model: model.type(torch.bfloat16), torch.bfloat16),
    "a copy's half": (lambda model: copy.deepcopy(model).half(), torch.float16),
    "a pickle's float": (lambda model: pickle.loads(pickle.dumps(model.half())).float(), torch.float32),
    "a layer's half": (lambda model: model.apply(lambda m: m.half() if m is not model else m), torch.float16),
}


@pytest.fixture(scope="module")
def kept(llama: Repository) -> Any:
    config = MiracleConfig(keep_compressed=True)
    return llama.auto.from_pretrained(llama.compressed, quantization_config=config)


@pytest.mark.parametrize("way", _CASTS)
def test_a_cast_is_that_of_the_dense_model_and_leaves_payloads_alone(way: str, kept: Any) -> None:
    cast, dtype = _CASTS[way]
    model, exact = copy.deepcopy(kept), compressed_layers(kept)
    changed = cast(model)
    assert type(changed) is type(kept) and changed.dtype == dtype
    assert (changed is model) == (not way.startswith(("a copy", "a pickle")))
    layers = compressed_layers(changed)
    assert layers.keys() == exact.keys() != set()
    for name, layer in layers.items():
        assert torch.equal(layer.weight, exact[name].weight.to(dtype)) and layer.weight.dtype == dtype
        assert torch.equal(layer.payload, exact[name].payload)
    assert {p.dtype for p in changed.parameters()} == {dtype}
    with torch.no_grad():
        assert changed(_TOKENS).logits.dtype == dtype
    assert compressed_layers(kept) == exact and kept.dtype == torch.float32


def test_a_cast_of_a_copy_is_not_one_of_the_model(kept: Any) -> None:
    copied = copy.deepcopy(kept)
    copied.half()
    assert (copied.dtype, kept.dtype) == (torch.float16, torch.float32)
    assert pickle.loads(pickle.dumps(copied)).float().dtype == torch.float32
    assert copied.dtype == torch.float16


def test_after_dequantize_casts_are_the_models_own(kept: Any) -> None:
    model = copy.deepcopy(kept).dequantize()
    assert "half" not in vars(model) and model.half().dtype == torch.float16
