"""What is done with a model whose layers stay compressed: it is copied, compiled, saved, made dense."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import miracle_hub
from miracle_hub.errors import FormatError, OptionError
from miracle_hub.plugin.compressed_linear import compressed_layers
from tests.hub.kept import (
    FAMILIES,
    LAYER,
    TOKENS,
    Repositories,
    assert_close,
    assert_same_weights,
    keep,
    load,
    output,
    payloads,
    quantization,
)

if TYPE_CHECKING:
    from tests.hub.conftest import Repository


@pytest.fixture
def model(llama: Repository) -> Any:
    return load(llama)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "t5"])
def test_generate_gives_the_dense_models_tokens(architecture: str, repositories: Repositories) -> None:
    repository = repositories(architecture)
    options: Any = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    ours = load(repository).generate(TOKENS, **options)
    theirs = repository.auto.from_pretrained(repository.compressed).generate(TOKENS, **options)
    assert torch.equal(ours, theirs)


def test_shards_do_not_matter(repositories: Repositories) -> None:
    repository = repositories("llama", source_shard="30KB", shard="8KB")
    assert len(list(repository.compressed.glob("*.safetensors"))) > 1
    assert_same_weights(load(repository), repository.auto.from_pretrained(repository.compressed))


@pytest.mark.parametrize("device_map", ["cpu", "auto"])
@pytest.mark.parametrize("architecture", ["llama-tied", "t5"])
def test_a_device_map_does_not_matter(architecture: str, device_map: str, repositories: Repositories) -> None:
    pytest.importorskip("accelerate")
    repository = repositories(architecture)
    model = load(repository, device_map=device_map)
    assert_same_weights(model, repository.auto.from_pretrained(repository.compressed))


def test_layers_offloaded_to_disk_compute_the_same(repositories: Repositories, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    repository = repositories("bert-masked-lm")
    device_map = {"bert.embeddings": "cpu", "bert.encoder": "disk", "cls": "cpu"}
    for buffers in (False, True):
        model = load(
            repository, device_map=device_map, offload_folder=tmp_path / str(buffers), offload_buffers=buffers
        )
        assert compressed_layers(model)
        assert_close(output(model), output(repository.auto.from_pretrained(repository.compressed)))


def test_a_state_dict_can_be_loaded_into_another_model(llama: Repository, tmp_path: Path) -> None:
    """Payloads of another length too; what was parsed before is forgotten."""
    options: Any = {"bits_per_weight": 5, "window_bits": 8, "progress": False}
    miracle_hub.compress(llama.source, tmp_path / "out", **options)
    auto: Any = AutoModelForCausalLM
    model, other = load(llama), auto.from_pretrained(tmp_path / "out", quantization_config=keep())
    before = output(model)
    assert not torch.equal(output(other), before)
    other.load_state_dict(model.state_dict())
    assert torch.equal(output(other), before)
    with pytest.raises(RuntimeError, match=r"Missing key.*payload"):
        other.load_state_dict(llama.auto.from_pretrained(llama.compressed).state_dict())


def test_a_changed_buffer_is_parsed_again(llama: Repository, model: Any) -> None:
    layers = compressed_layers(model)
    first, second = layers[LAYER], layers[LAYER.replace("layers.0", "layers.1")]
    assert first.packed() is first.packed()
    first.payload = second.payload.clone()
    assert torch.equal(first.weight, second.weight)
    with pytest.raises(FormatError, match=rf"^{LAYER}\.weight: "):
        first.payload.zero_()
        first.packed()
    first.payload = layers["model.layers.0.mlp.up_proj"].payload
    with pytest.raises(OptionError, match=r"expected a payload of shape \(32, 32\), found \(64, 32\)"):
        first.packed()


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_model_can_be_copied_and_pickled(
    architecture: str, duplicate: Callable, repositories: Repositories
) -> None:
    repository = repositories(architecture)
    try:
        duplicate(repository.auto.from_pretrained(repository.source))
    except AttributeError as error:
        pytest.skip(f"this version of transformers cannot do it with a dense model: {error}")
    model = load(repository)
    twin = duplicate(model)
    assert torch.equal(output(twin), output(model))
    assert_same_weights(twin.dequantize(), copy.deepcopy(model).dequantize())


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.filterwarnings("ignore")  # of the compiler about itself
def test_a_compiled_model_computes_the_same(architecture: str, repositories: Repositories) -> None:
    model = load(repositories(architecture))
    compiled: Any = torch.compile(model, backend="eager")
    with torch.no_grad():
        assert_close(compiled(TOKENS).logits, output(model))


def test_inference_mode_and_autocast_work(llama: Repository) -> None:
    with torch.inference_mode():
        model, dense = load(llama), llama.auto.from_pretrained(llama.compressed)
        with torch.autocast("cpu", torch.bfloat16):
            assert_close(model(TOKENS).logits, dense(TOKENS).logits)


def test_saving_writes_the_same_payloads_and_the_folder_loads_again(
    repositories: Repositories, tmp_path: Path
) -> None:
    for architecture in [*FAMILIES, "llama-tied", "whisper"]:
        repository, out = repositories(architecture), tmp_path / architecture
        load(repository).save_pretrained(out)
        assert payloads(out) == payloads(repository.compressed)
        before, after = quantization(repository.compressed), quantization(out)
        del before["guard"]  # transformers writes the files, without guards
        # From transformers 5.12 on vit has other names in memory: which are written cannot be known.
        allowed = [before, before | {"digest": None}] if architecture == "vit" else [before]
        assert after in allowed
        dense = repository.auto.from_pretrained(repository.compressed)
        again = repository.auto.from_pretrained(out, quantization_config=keep())
        assert compressed_layers(again).keys() == compressed_layers(load(repository)).keys()
        assert_same_weights(again, dense)
        assert_same_weights(repository.auto.from_pretrained(out), dense)
        loaded = miracle_hub.load_state_dict(out)
        assert all(torch.equal(t, loaded[n]) for n, t in load_state(repository.decompressed).items())


def load_state(folder: Path) -> dict[str, Tensor]:
    return {name: t for path in folder.glob("*.safetensors") for name, t in load_file(path).items()}


def test_saving_what_converters_made_dense_writes_it_plain(
    repositories: Repositories, tmp_path: Path
) -> None:
    repository = repositories("mixtral")
    load(repository).save_pretrained(tmp_path)
    stored = payloads(repository.compressed)
    kept = payloads(tmp_path)
    assert kept.keys() < stored.keys() and all(kept[name] == stored[name] for name in kept)
    assert_same_weights(
        repository.auto.from_pretrained(tmp_path, quantization_config=keep()),
        repository.auto.from_pretrained(repository.compressed),
    )


def test_saving_writes_a_dense_tensor_that_was_changed(llama: Repository, model: Any, tmp_path: Path) -> None:
    with torch.no_grad():
        model.get_input_embeddings().weight[0] += 1
    model.save_pretrained(tmp_path)
    assert payloads(llama.compressed).keys() - payloads(tmp_path).keys() == {"model.embed_tokens.weight"}
    again: Any = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again.get_input_embeddings().weight, model.get_input_embeddings().weight)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bert-classifier"])
def test_dequantize_gives_the_ordinary_dense_model(
    architecture: str, repositories: Repositories, tmp_path: Path
) -> None:
    repository = repositories(architecture)
    model, dense = load(repository), repository.auto.from_pretrained(repository.compressed)
    model.dequantize()
    assert not compressed_layers(model) and not model.is_quantized
    for config in (model.config, model.config.get_text_config()):
        assert not hasattr(config, "quantization_config") and not getattr(config, "_is_quantized", False)
    assert_same_weights(model, dense)
    ours, theirs = dict(model.named_parameters()), dict(dense.named_parameters())
    assert list(ours) == list(theirs) or ours.keys() == theirs.keys()
    assert all(ours[name].requires_grad for name in ours)
    model.save_pretrained(tmp_path)
    assert_same_weights(repository.auto.from_pretrained(tmp_path), dense)
    other = load(repository).dequantize(dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in other.parameters()} == {torch.bfloat16}


def test_an_assignment_to_the_data_of_a_decoded_weight_is_refused(model: Any) -> None:
    layer = model.get_submodule(LAYER)
    with pytest.raises(OptionError, match=r"weight of a compressed layer.*call model\.dequantize\(\) first"):
        layer.weight.data += 1
    with pytest.raises(KeyError):
        layer.weight = nn.Parameter(torch.zeros(32, 32))
    assert type(layer.weight + 1) is Tensor
