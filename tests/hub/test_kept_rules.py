"""The rules of keeping modules compressed, each of which was once a failure."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

import miracle_hub
from miracle_hub.errors import FormatError, OptionError
from miracle_hub.names import matches
from miracle_hub.plugin.compressed_linear import CompressedLinear, compressed_layers
from tests.hub.damaged import change_config
from tests.hub.kept import LAYER, Repositories, assert_same_weights, keep, load

if TYPE_CHECKING:
    from tests.hub.conftest import Repository


@pytest.fixture
def model(llama: Repository) -> Any:
    return load(llama)


def test_a_payload_is_a_buffer_that_the_checkpoints_weight_loads_into(model: Any) -> None:
    assert f"{LAYER}.payload" in dict(model.named_buffers())
    assert f"{LAYER}.payload" in model.state_dict() and f"{LAYER}.weight" not in model.state_dict()


def test_weight_can_be_read_by_initialization_and_is_marked_as_initialized(model: Any) -> None:
    layer = model.get_submodule(LAYER)
    before = layer.weight
    assert getattr(layer.weight, "_is_hf_initialized", False)
    model.apply(model._init_weights)
    assert torch.equal(layer.weight, before)


def test_weights_are_not_decoded_while_the_model_is_loaded(
    repositories: Repositories, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded = []
    monkeypatch.setattr("miracle_hub.codec.packed.decode_payload", lambda *a, **k: decoded.append(a))
    for architecture in ("gpt2", "t5", "llama"):
        load(repositories(architecture))
    assert not decoded


def test_a_payload_of_any_length_loads(llama: Repository, tmp_path: Path) -> None:
    for rate in (5, 8):
        options: Any = {"bits_per_weight": rate, "window_bits": 8, "progress": False}
        miracle_hub.compress(llama.source, tmp_path / str(rate), **options)
        auto: Any = AutoModelForCausalLM
        model, info = auto.from_pretrained(
            tmp_path / str(rate), quantization_config=keep(), output_loading_info=True
        )
        assert compressed_layers(model) and not any(info.values())
        assert_same_weights(model, auto.from_pretrained(tmp_path / str(rate)))


@pytest.mark.parametrize("architecture", ["llama", "bert-masked-lm", "gpt2"])
def test_a_new_head_is_an_initialized_linear_layer(architecture: str, repositories: Repositories) -> None:
    folder, auto = repositories(architecture).compressed, AutoModelForSequenceClassification
    arguments: dict[str, Any] = {"num_labels": 40, "output_loading_info": True}
    model, info = auto.from_pretrained(folder, quantization_config=keep(), **arguments)
    dense, dense_info = auto.from_pretrained(folder, **arguments)
    assert info == dense_info
    (head,) = (name for name in ("score", "classifier") if hasattr(model, name))
    assert type(getattr(model, head)) is nn.Linear
    assert 0.5 < getattr(model, head).weight.std().item() / model.config.initializer_range < 2
    kept, weights = compressed_layers(model), dense.state_dict()
    assert kept and head not in kept
    assert all(torch.equal(kept[name].weight, weights[f"{name}.weight"]) for name in kept)


def test_a_head_of_another_shape_is_replaced_as_on_a_dense_load(repositories: Repositories) -> None:
    folder, auto = repositories("bert-classifier").compressed, AutoModelForSequenceClassification
    arguments: dict[str, Any] = {"num_labels": 40, "ignore_mismatched_sizes": True}
    arguments["output_loading_info"] = True
    model, info = auto.from_pretrained(folder, quantization_config=keep(), **arguments)
    assert info == auto.from_pretrained(folder, **arguments)[1]
    assert type(model.classifier) is nn.Linear


@pytest.mark.parametrize("architecture", ["llama-tied", "gpt2", "bert-masked-lm", "t5"])
def test_tied_weights_are_dense_and_stay_tied(architecture: str, repositories: Repositories) -> None:
    model = load(repositories(architecture))
    head = model.get_output_embeddings()
    assert type(head) is nn.Linear and head.weight is model.get_input_embeddings().weight
    model.tie_weights()
    assert head.weight is model.get_input_embeddings().weight


def test_modules_not_to_convert_are_dense(llama: Repository) -> None:
    for wanted in (["lm_head"], ["layers.0"], r"model\.layers\.\d+\.mlp", ["q_proj", "layers.1.mlp"]):
        config = keep(modules_to_not_convert=wanted)
        model = llama.auto.from_pretrained(llama.compressed, quantization_config=config)
        skipped = compressed_layers(load(llama)).keys() - compressed_layers(model).keys()
        assert skipped == {name for name in compressed_layers(load(llama)) if matches(name, wanted)} != set()
        assert_same_weights(model, llama.auto.from_pretrained(llama.compressed))


def test_a_name_that_takes_nothing_of_the_model_is_refused_with_what_is_near(llama: Repository) -> None:
    for wanted in (["lm_head", "q_porj"], "q_porj"):
        with pytest.raises(OptionError, match="found 'q_porj', which takes none; near it: 'q_proj'"):
            llama.auto.from_pretrained(
                llama.compressed, quantization_config=keep(modules_to_not_convert=wanted)
            )


def test_a_readers_regular_expression_is_not_written_to_config_json(
    llama: Repository, tmp_path: Path
) -> None:
    config = keep(modules_to_not_convert=r".*\.mlp")
    model = llama.auto.from_pretrained(llama.compressed, quantization_config=config)
    model.save_pretrained(tmp_path / "again")
    facts = json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"]
    assert facts["modules_to_not_convert"] is None
    assert_same_weights(model, llama.auto.from_pretrained(tmp_path / "again"))


def test_a_config_json_that_is_not_ours_is_refused_by_name(llama: Repository, tmp_path: Path) -> None:
    shutil.copytree(llama.compressed, tmp_path / "out")
    path = tmp_path / "out" / "config.json"
    facts = json.loads(path.read_text())
    del facts["quantization_config"]
    path.write_text(json.dumps(facts))
    with pytest.raises(FormatError) as raised:
        llama.auto.from_pretrained(tmp_path / "out", quantization_config=keep())
    assert str(raised.value) == (
        "quantization_config: expected a MiracleConfig to load a compressed repository with, found a "
        "config.json without one of miracle: run miracle compress first, or, if the repository is "
        "compressed, its config.json has lost it: download it again"
    )


def test_a_plain_weight_makes_an_ordinary_layer(llama: Repository, tmp_path: Path) -> None:
    shutil.copytree(llama.compressed, tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    tensors[f"{LAYER}.weight"] = load_file(llama.decompressed / "model.safetensors")[f"{LAYER}.weight"]
    save_file(tensors, tmp_path / "out" / "model.safetensors", {"format": "pt", "narrowed_from_F32": "*"})
    change_config(tmp_path / "out", digest=None)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", quantization_config=keep())
    assert type(model.get_submodule(LAYER)) is nn.Linear
    assert_same_weights(model, AutoModelForCausalLM.from_pretrained(llama.compressed))


@pytest.mark.parametrize("architecture", ["mixtral", "qwen3-moe"])
def test_weights_that_a_converter_changes_are_dense(architecture: str, repositories: Repositories) -> None:
    kept = compressed_layers(load(repositories(architecture)))
    assert kept and not any("experts" in name for name in kept)


def test_renamed_weights_are_kept(llama: Repository, tmp_path: Path) -> None:
    shutil.copytree(llama.compressed, tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    renamed = {name.replace("mlp.up_proj.weight", "feed.kernel"): t for name, t in tensors.items()}
    metadata = {"format": "pt", "narrowed_from_F32": "*"}
    save_file(renamed, tmp_path / "out" / "model.safetensors", metadata)
    change_config(tmp_path / "out", digest=None)
    auto: Any = AutoModelForCausalLM
    model, info = auto.from_pretrained(
        tmp_path / "out",
        key_mapping={r"feed\.kernel": "mlp.up_proj.weight"},
        output_loading_info=True,
        quantization_config=keep(),
    )
    assert not any(info.values())
    assert isinstance(model.model.layers[0].mlp.up_proj, CompressedLinear)
    assert_same_weights(model, AutoModelForCausalLM.from_pretrained(llama.compressed))


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bert-masked-lm", "t5"])
def test_a_base_model_takes_its_part(architecture: str, repositories: Repositories) -> None:
    folder, auto = repositories(architecture).compressed, AutoModel
    model, info = auto.from_pretrained(folder, quantization_config=keep(), output_loading_info=True)
    assert info == auto.from_pretrained(folder, output_loading_info=True)[1]
    dense = auto.from_pretrained(folder).state_dict()
    kept = compressed_layers(model)
    assert kept and all(torch.equal(kept[name].weight, dense[f"{name}.weight"]) for name in kept)


def test_a_full_model_takes_a_base_models_payloads(llama: Repository, tmp_path: Path) -> None:
    AutoModel.from_pretrained(llama.source).save_pretrained(tmp_path / "base")
    miracle_hub.compress(
        tmp_path / "base", tmp_path / "out", bits_per_weight=7, window_bits=8, progress=False
    )
    auto: Any = AutoModelForCausalLM
    model, info = auto.from_pretrained(tmp_path / "out", output_loading_info=True, quantization_config=keep())
    assert info["missing_keys"] == {"lm_head.weight"} and not info["unexpected_keys"]
    assert type(model.lm_head) is nn.Linear and isinstance(model.get_submodule(LAYER), CompressedLinear)
