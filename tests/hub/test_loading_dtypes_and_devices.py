"""Whatever dtype is stored or asked for, and wherever the weights go: as from a dense checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import miracle_hub
from miracle_hub.codec.repository import open_repository

if TYPE_CHECKING:
    from tests.hub.conftest import Repository

_DTYPES = [torch.float32, torch.bfloat16, torch.float16]
_TOKENS = torch.tensor([[5, 6, 7, 8]])


def assert_twins(repository: Repository, **arguments: Any) -> Any:
    """The model of the compressed folder, equal to that of the decompressed one in values and dtypes."""
    model = repository.auto.from_pretrained(repository.compressed, **arguments)
    twin = repository.auto.from_pretrained(repository.decompressed, **arguments)
    theirs = twin.state_dict()
    assert model.dtype == twin.dtype and model.config.dtype == twin.config.dtype
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor, theirs[name]), name
    return model


@pytest.mark.parametrize("stored", _DTYPES, ids=str)
@pytest.mark.parametrize("architecture", ["llama", "mixtral", "t5"])
def test_the_dtype_of_the_source_is_the_default(
    architecture: str, stored: torch.dtype, repositories: Callable[..., Repository]
) -> None:
    repository = repositories(architecture, stored)
    for arguments in ({}, {"dtype": "auto"}):
        model = assert_twins(repository, **arguments)
        assert model.dtype == stored
        assert model.get_input_embeddings().weight.dtype == stored


@pytest.mark.parametrize("wanted", _DTYPES, ids=str)
@pytest.mark.parametrize("stored", _DTYPES, ids=str)
def test_another_dtype_rounds_as_from_a_dense_checkpoint(
    stored: torch.dtype, wanted: torch.dtype, repositories: Callable[..., Repository]
) -> None:
    for architecture in ("llama", "mixtral", "vit"):
        model = assert_twins(repositories(architecture, stored), dtype=wanted)
        assert {parameter.dtype for parameter in model.parameters()} == {wanted}


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("architecture", ["t5", "gpt-oss"])
def test_modules_kept_in_float32_are_kept(
    architecture: str, stored: torch.dtype, repositories: Callable[..., Repository]
) -> None:
    model = assert_twins(repositories(architecture, stored), dtype=torch.float16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float16, torch.float32}


def test_counters_and_running_statistics_keep_their_dtypes(repositories: Callable[..., Repository]) -> None:
    model = assert_twins(repositories("resnet"), dtype=torch.bfloat16)
    counters = [b for name, b in model.named_buffers() if name.endswith("num_batches_tracked")]
    assert counters and all(counter.dtype == torch.int64 for counter in counters)


def test_vectors_stored_in_16_bits_come_back_in_32(llama: Repository) -> None:
    narrowed = [tensor for tensor in open_repository(llama.compressed).tensors if tensor.is_narrowed]
    assert narrowed
    parameters = dict(assert_twins(llama).named_parameters())
    assert all(parameters[tensor.name].dtype == torch.float32 for tensor in narrowed)


def test_a_config_without_dtype_does_not_change_the_result(llama: Repository, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama.source)
    model.save_pretrained(tmp_path / "source")
    config = tmp_path / "source" / "config.json"
    config.write_text(config.read_text().replace('"dtype": "float32"', '"dtype": null'))
    miracle_hub.compress(
        tmp_path / "source", tmp_path / "out", bits_per_weight=7, window_bits=8, progress=False
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("wide", ["lm_head", "norm", "embed"])
def test_of_several_dtypes_and_no_stated_one_it_is_the_sources(
    wide: str, llama: Repository, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama.source).bfloat16()
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.float() if wide in name else parameter.data
    model.save_pretrained(tmp_path / "source")
    config = tmp_path / "source" / "config.json"
    stated = json.loads(config.read_text())
    del stated["dtype"]
    config.write_text(json.dumps(stated))
    miracle_hub.compress(
        tmp_path / "source", tmp_path / "out", bits_per_weight=8, window_bits=8, progress=False
    )
    ours, dense = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("out", "source"))
    assert ours.dtype == dense.dtype == (torch.float32 if wide == "lm_head" else torch.bfloat16)


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}], ids=str)
@pytest.mark.parametrize("architecture", ["llama-tied", "mixtral"])
def test_a_device_map_does_not_change_the_weights(
    architecture: str, device_map: Any, repositories: Callable[..., Repository]
) -> None:
    pytest.importorskip("accelerate")
    assert_twins(repositories(architecture), device_map=device_map)


@pytest.mark.parametrize("architecture", ["llama", "mixtral"])
def test_weights_offloaded_to_disk_are_the_decoded_ones(
    architecture: str, repositories: Callable[..., Repository], tmp_path: Path
) -> None:
    pytest.importorskip("accelerate")
    repository = repositories(architecture)
    device_map = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    device_map |= {"model.norm": "disk", "model.rotary_emb": "cpu", "lm_head": "disk"}
    offloaded = repository.auto.from_pretrained(
        repository.compressed, device_map=device_map, offload_folder=tmp_path / "offload"
    )
    whole = repository.auto.from_pretrained(repository.decompressed)
    with torch.no_grad():
        # Same weights, other alignment in memory: sums may be taken in another order.
        torch.testing.assert_close(offloaded(_TOKENS).logits, whole(_TOKENS).logits)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("architecture", ["llama", "mixtral"])
def test_weights_on_a_gpu_are_those_on_the_cpu(
    architecture: str, repositories: Callable[..., Repository]
) -> None:
    pytest.importorskip("accelerate")
    repository = repositories(architecture)
    on_gpu = repository.auto.from_pretrained(repository.compressed, device_map="cuda").state_dict()
    for name, tensor in repository.auto.from_pretrained(repository.compressed).state_dict().items():
        assert on_gpu[name].is_cuda and torch.equal(on_gpu[name].cpu(), tensor), name
