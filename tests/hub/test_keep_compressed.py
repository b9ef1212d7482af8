"""Linear layers that stay compressed in memory: the same model, whatever is done with it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from miracle_hub.plugin.compressed_linear import (
    CompressedConv1D,
    CompressedLayer,
    CompressedLinear,
    compressed_layers,
)
from tests.hub.kept import (
    FAMILIES,
    LAYER,
    Repositories,
    assert_close,
    assert_same_weights,
    load,
    output,
    payloads,
)

from .client import Client
from .loopback import LoopbackHub
from .loopback_parts import TOKEN

if TYPE_CHECKING:
    from tests.hub.conftest import Repository


@pytest.fixture
def model(llama: Repository) -> Any:
    return load(llama)


def test_every_architecture_has_the_dense_models_weights_and_outputs(
    repository: Repository, request: pytest.FixtureRequest
) -> None:
    architecture = request.node.callspec.params["repository"]
    model, info = load(repository, output_loading_info=True)
    dense = repository.auto.from_pretrained(repository.compressed)
    assert not any(info.values())
    assert bool(compressed_layers(model)) == (architecture != "resnet")
    assert_same_weights(model, dense)
    assert_close(output(model, architecture), output(dense, architecture))


@pytest.mark.parametrize("wanted", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "t5"])
def test_another_dtype_rounds_as_a_dense_load_does(
    architecture: str, stored: torch.dtype, wanted: torch.dtype, repositories: Repositories
) -> None:
    repository = repositories(architecture, stored)
    model = load(repository, dtype=wanted)
    dense = repository.auto.from_pretrained(repository.compressed, dtype=wanted)
    assert_same_weights(model, dense)
    assert_close(output(model, architecture), output(dense, architecture))


def test_every_linear_layer_with_a_payload_is_kept_and_nothing_else(repositories: Repositories) -> None:
    for architecture in FAMILIES:
        repository = repositories(architecture)
        model, dense = load(repository), repository.auto.from_pretrained(repository.compressed)
        coded = {name.removesuffix(".weight") for name in payloads(repository.compressed)}
        linear = {n for n, m in dense.named_modules() if type(m) in (nn.Linear, Conv1D)}
        kept = compressed_layers(model).keys()
        tied = {name for pair in model.all_tied_weights_keys.items() for name in pair}
        assert kept and kept <= linear
        if architecture != "vit":  # whose names differ in the file
            assert kept == {name for name in linear & coded if f"{name}.weight" not in tied}
        for name, module in model.named_modules():
            if name not in kept and not any(name.startswith(f"{k}.") for k in kept):
                assert type(module) is type(dict(dense.named_modules())[name])


def test_layers_hold_their_payloads_bytes_and_no_weight(llama: Repository, model: Any) -> None:
    stored = payloads(llama.compressed)
    for name, layer in compressed_layers(model).items():
        assert layer.payload.numpy().tobytes() == stored[f"{name}.weight"]
        assert "weight" not in dict(layer.named_parameters())
        assert not layer.payload.requires_grad
    assert isinstance(model.get_submodule(LAYER), nn.Linear)
    assert "payload_bytes=" in repr(model) and "in_features=32, out_features=32, bias=False" in repr(model)


def test_a_repository_on_the_hub_loads_by_its_id(llama: Repository, tmp_path: Path) -> None:
    code = """
import json, sys
from huggingface_hub import HfApi
from miracle_hub import MiracleConfig
from transformers import AutoModelForCausalLM
HfApi().create_repo("user/llama")
HfApi().upload_folder(repo_id="user/llama", folder_path=sys.argv[1])
config = MiracleConfig(keep_compressed=True)
model = AutoModelForCausalLM.from_pretrained("user/llama", quantization_config=config)
print(json.dumps(type(model.lm_head).__name__))
"""
    with LoopbackHub() as hub:
        client = Client(hub.url, tmp_path)
        assert client.python(code, llama.compressed, HF_TOKEN=TOKEN) == CompressedLinear.__name__


def test_the_model_takes_less_memory(repositories: Repositories) -> None:
    for architecture in FAMILIES:
        repository = repositories(architecture)
        model, dense = load(repository), repository.auto.from_pretrained(repository.compressed)
        saved = sum(
            4 * math.prod(layer.packed().shape) - layer.payload.numel()
            for layer in compressed_layers(model).values()
        )
        assert saved > 0
        assert model.get_memory_footprint() == dense.get_memory_footprint() - saved


def test_gpt2s_own_linear_layer_is_kept(repositories: Repositories) -> None:
    model = load(repositories("gpt2"))
    layer = model.transformer.h[0].attn.c_attn
    assert isinstance(layer, CompressedConv1D) and isinstance(layer, Conv1D | CompressedLayer)
    assert "nf=96, nx=32" in repr(layer) and layer.weight.shape == (32, 96)
