"""Linear layers that stay compressed in memory: the same model, whatever is done with it."""

from __future__ import annotations

import copy
import json
import math
import pickle
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.pytorch_utils import Conv1D

import miracle_hub
from miracle_hub import MiracleConfig
from miracle_hub.codec.repository import open_repository
from miracle_hub.errors import ChecksumError, FormatError, OptionError
from miracle_hub.format.payload import decode_header, encode_payload
from miracle_hub.names import matches
from miracle_hub.plugin.compressed_linear import (
    CompressedConv1D,
    CompressedLayer,
    CompressedLinear,
    compressed_layers,
)
from tests.limits import HANG_SECONDS

from .client import Client
from .loopback import TOKEN, LoopbackHub

if TYPE_CHECKING:
    from tests.hub.conftest import Repository

Repositories = Callable[..., "Repository"]

_TOKENS = torch.tensor([[5, 6, 7, 8]])
_PIXELS = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
_INPUTS: dict[str, dict[str, Tensor]] = {
    "vit": {"pixel_values": _PIXELS},
    "resnet": {"pixel_values": _PIXELS},
    "t5": {"input_ids": _TOKENS, "decoder_input_ids": _TOKENS},
    "whisper": {
        "input_features": torch.randn(1, 16, 64, generator=torch.Generator().manual_seed(0)),
        "decoder_input_ids": _TOKENS,
    },
    "clip": {"input_ids": _TOKENS, "pixel_values": _PIXELS},
}
_FAMILIES = ["llama", "gpt2", "bert-classifier", "t5", "vit"]
_LAYER = "model.layers.0.self_attn.q_proj"


def keep(**options: Any) -> MiracleConfig:
    return MiracleConfig(keep_compressed=True, **options)


def load(repository: Repository, **arguments: Any) -> Any:
    """The model with compressed layers."""
    return repository.auto.from_pretrained(repository.compressed, quantization_config=keep(), **arguments)


def output(model: Any, architecture: str = "llama") -> Tensor:
    inputs = _INPUTS.get(architecture, {"input_ids": _TOKENS})
    cast = {name: t.to(model.dtype) if t.is_floating_point() else t for name, t in inputs.items()}
    with torch.no_grad():
        return model(**cast)[0]


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    """Equal weights; sums may be taken in another order."""
    assert ours.dtype == theirs.dtype
    rtol, atol = (5e-2, 5e-2) if ours.dtype.itemsize == 2 else (1e-4, 1e-5)
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol)


def assert_same_weights(model: nn.Module, dense: nn.Module) -> None:
    """Bit for bit, layer by layer and tensor by tensor."""
    layers, modules = compressed_layers(model), dict(dense.named_modules())
    for name, layer in layers.items():
        expected = modules[name].weight
        assert isinstance(expected, Tensor)
        assert layer.weight.dtype == expected.dtype and torch.equal(layer.weight, expected), name
    ours, theirs = model.state_dict(), dense.state_dict()
    for name in theirs.keys() - {f"{name}.weight" for name in layers}:
        assert ours[name].dtype == theirs[name].dtype and torch.equal(ours[name], theirs[name]), name


def payloads(folder: Path) -> dict[str, bytes]:
    coded = [t.parts[0].load().numpy().tobytes() for t in open_repository(folder).tensors if t.is_coded]
    names = [t.name for t in open_repository(folder).tensors if t.is_coded]
    return dict(zip(names, coded, strict=True))


def quantization(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


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
    for architecture in _FAMILIES:
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
    assert isinstance(model.get_submodule(_LAYER), nn.Linear)
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
    for architecture in _FAMILIES:
        repository = repositories(architecture)
        model, dense = load(repository), repository.auto.from_pretrained(repository.compressed)
        saved = sum(
            4 * math.prod(layer.packed().shape) - layer.payload.numel()
            for layer in compressed_layers(model).values()
        )
        assert saved > 0
        assert model.get_memory_footprint() == dense.get_memory_footprint() - saved


# The rules of keeping modules compressed, each of which was once a failure.


def test_a_payload_is_a_buffer_that_the_checkpoints_weight_loads_into(model: Any) -> None:
    assert f"{_LAYER}.payload" in dict(model.named_buffers())
    assert f"{_LAYER}.payload" in model.state_dict() and f"{_LAYER}.weight" not in model.state_dict()


def test_weight_can_be_read_by_initialization_and_is_marked_as_initialized(model: Any) -> None:
    layer = model.get_submodule(_LAYER)
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
    tensors[f"{_LAYER}.weight"] = load_file(llama.decompressed / "model.safetensors")[f"{_LAYER}.weight"]
    save_file(tensors, tmp_path / "out" / "model.safetensors", {"format": "pt", "narrowed_from_F32": "*"})
    change_config(tmp_path / "out", digest=None)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", quantization_config=keep())
    assert type(model.get_submodule(_LAYER)) is nn.Linear
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
    assert type(model.lm_head) is nn.Linear and isinstance(model.get_submodule(_LAYER), CompressedLinear)


# What is done with a model.


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "t5"])
def test_generate_gives_the_dense_models_tokens(architecture: str, repositories: Repositories) -> None:
    repository = repositories(architecture)
    options: Any = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    ours = load(repository).generate(_TOKENS, **options)
    theirs = repository.auto.from_pretrained(repository.compressed).generate(_TOKENS, **options)
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
    first, second = layers[_LAYER], layers[_LAYER.replace("layers.0", "layers.1")]
    assert first.packed() is first.packed()
    first.payload = second.payload.clone()
    assert torch.equal(first.weight, second.weight)
    with pytest.raises(FormatError, match=rf"^{_LAYER}\.weight: "):
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
        assert_close(compiled(_TOKENS).logits, output(model))


def test_inference_mode_and_autocast_work(llama: Repository) -> None:
    with torch.inference_mode():
        model, dense = load(llama), llama.auto.from_pretrained(llama.compressed)
        with torch.autocast("cpu", torch.bfloat16):
            assert_close(model(_TOKENS).logits, dense(_TOKENS).logits)


def test_saving_writes_the_same_payloads_and_the_folder_loads_again(
    repositories: Repositories, tmp_path: Path
) -> None:
    for architecture in [*_FAMILIES, "llama-tied", "whisper"]:
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
    layer = model.get_submodule(_LAYER)
    with pytest.raises(OptionError, match=r"weight of a compressed layer.*call model\.dequantize\(\) first"):
        layer.weight.data += 1
    with pytest.raises(KeyError):
        layer.weight = nn.Parameter(torch.zeros(32, 32))
    assert type(layer.weight + 1) is Tensor


# Training.


class Examples(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": _TOKENS[0], "labels": _TOKENS[0]}


def trainer(model: Any, folder: Path) -> Any:
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        str(folder), max_steps=2, report_to=[], use_cpu=True, learning_rate=0.1, disable_tqdm=True
    )
    return Trainer(model, arguments, train_dataset=Examples())


def test_the_trainer_refuses_to_train_the_compressed_model_alone(model: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot perform fine-tuning on purely quantized models"):
        trainer(model, tmp_path)


def test_what_is_not_compressed_gets_its_gradients(llama: Repository, model: Any) -> None:
    dense = llama.auto.from_pretrained(llama.compressed)
    for each in (model, dense):
        each(input_ids=_TOKENS, labels=_TOKENS).loss.backward()
    theirs = dict(dense.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore::UserWarning")  # of peft about gpt2's fan_in_fan_out
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks for it
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_lora_attaches_to_all_linear_layers_and_trains_as_on_the_dense_model(
    architecture: str, repositories: Repositories, tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    repository = repositories(architecture)
    losses = []
    for base in (load(repository), repository.auto.from_pretrained(repository.compressed)):
        n_kept = len(compressed_layers(base))
        torch.manual_seed(0)
        config = peft.LoraConfig(target_modules="all-linear", r=2, lora_dropout=0, task_type="CAUSAL_LM")
        model = peft.get_peft_model(base, config)
        assert sum("lora_A" in name for name, _ in model.named_parameters()) >= n_kept
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        result = trainer(model, tmp_path).train()
        losses.append(result.training_loss)
        changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
        assert changed and all("lora_" in name for name in changed)
        model.save_pretrained(tmp_path / str(n_kept))
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks for it
def test_merging_an_adapter_is_refused_and_works_after_dequantizing(model: Any) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules="all-linear", r=2, init_lora_weights=False)
    adapted = peft.get_peft_model(model, config)
    expected = output(adapted)
    with pytest.raises(OptionError, match="compressed layer"):
        adapted.merge_and_unload()
    with pytest.raises(OptionError, match="compressed layer"):
        adapted.merge_and_unload(safe_merge=True)
    model.dequantize()
    frozen = [p for name, p in adapted.named_parameters() if "lora_" not in name and "base_layer" in name]
    assert frozen and not any(parameter.requires_grad for parameter in frozen)
    assert_close(output(adapted.merge_and_unload()), expected)


# The config.


def change_config(folder: Path, **values: object) -> None:
    """On purpose: without its guard, and without any where tensors are others."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    facts = config["quantization_config"]
    del facts["guard"]["config"]
    if "digest" in values:
        del facts["guard"]
    facts |= values
    path.write_text(json.dumps(config))


def test_the_users_options_win_and_the_repositorys_digest_stays(llama: Repository, tmp_path: Path) -> None:
    shutil.copytree(llama.compressed, tmp_path / "out")
    change_config(tmp_path / "out", keep_compressed=True, backend="triton")
    auto: Any = AutoModelForCausalLM
    by_file = auto.from_pretrained(tmp_path / "out")
    assert compressed_layers(by_file)[_LAYER].backend == "triton"
    by_user = auto.from_pretrained(tmp_path / "out", quantization_config=keep(backend="cpu"))
    assert compressed_layers(by_user)[_LAYER].backend == "cpu"
    assert by_user.config.quantization_config.digest == quantization(llama.compressed)["digest"]
    assert not compressed_layers(auto.from_pretrained(tmp_path / "out", quantization_config=MiracleConfig()))


def test_options_of_loading_are_not_written(model: Any) -> None:
    config = model.config.quantization_config
    assert config.keep_compressed and config.backend == "auto"
    assert not {"keep_compressed", "backend", "dequantize"} & config.to_dict().keys()
    assert "keep_compressed" not in model.config.to_json_string()


def test_loading_as_asked_for_warns_of_nothing(llama: Repository) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load(llama)
    assert not [str(warning.message) for warning in caught]


@pytest.mark.parametrize("options", [{"backend": "gpu"}, {"backend": None}, {"keep_compressed": "yes"}])
def test_an_option_that_is_none_is_a_named_error(options: dict[str, Any]) -> None:
    ((name, value),) = options.items()
    with pytest.raises(
        OptionError, match=rf"^MiracleConfig: {name}: expected .*, found {value!r}; (leave it|choose)"
    ):
        MiracleConfig(**options)


def test_the_plug_in_knows_a_model_is_quantized(model: Any) -> None:
    assert model.is_quantized and model.hf_quantizer.is_serializable() and model.hf_quantizer.is_trainable
    assert model.config.quantization_config.quant_method == "miracle"


def test_a_damaged_payload_is_refused_on_load(llama: Repository, tmp_path: Path) -> None:
    shutil.copytree(llama.compressed, tmp_path / "out")
    path = tmp_path / "out" / "model.safetensors"
    tensors = load_file(path)
    tensors[f"{_LAYER}.weight"][-1] ^= 1
    save_file(tensors, path, {"format": "pt", "narrowed_from_F32": "*"})
    with pytest.raises(ChecksumError, match=rf"^{_LAYER}\.weight: .*download it again"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out", quantization_config=keep())


def test_a_scale_out_of_range_behind_a_right_checksum_is_refused_on_load(
    llama: Repository, tmp_path: Path
) -> None:
    shutil.copytree(llama.compressed, tmp_path / "out")
    path = tmp_path / "out" / "model.safetensors"
    tensors = load_file(path)
    data = tensors[f"{_LAYER}.weight"].numpy().tobytes()
    header, start = decode_header(data, "w")
    damaged = encode_payload(header, b"\xff\xff" + data[start + 2 :])
    tensors[f"{_LAYER}.weight"] = torch.frombuffer(bytearray(damaged), dtype=torch.uint8)
    save_file(tensors, path, {"format": "pt", "narrowed_from_F32": "*"})
    with pytest.raises(FormatError, match=rf"^{_LAYER}\.weight: scale 0 .*expected 0 or a number"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out", quantization_config=keep())


@pytest.mark.parametrize(
    "first", ["", "import transformers.quantizers.auto", "import miracle_hub.plugin.quantizer"]
)
def test_the_config_is_imported_from_the_package_in_a_fresh_process(
    first: str, llama: Repository, tmp_path: Path
) -> None:
    code = f"""
{first}
from miracle_hub import MiracleConfig
from transformers import AutoModel
config = MiracleConfig(keep_compressed=True)
model = AutoModel.from_pretrained({str(llama.compressed)!r}, quantization_config=config)
print(type(model.layers[0].mlp.up_proj).__name__)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=HANG_SECONDS
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == CompressedLinear.__name__


def test_gpt2s_own_linear_layer_is_kept(repositories: Repositories) -> None:
    model = load(repositories("gpt2"))
    layer = model.transformer.h[0].attn.c_attn
    assert isinstance(layer, CompressedConv1D) and isinstance(layer, Conv1D | CompressedLayer)
    assert "nf=96, nx=32" in repr(layer) and layer.weight.shape == (32, 96)


@pytest.mark.parametrize("names", [5, [1], ("a",)], ids=str)
def test_names_of_modules_are_a_list_of_names_or_a_regular_expression(names: Any) -> None:
    with pytest.raises(
        OptionError,
        match="^MiracleConfig: modules_to_not_convert: expected a list of names or a regular expression, ",
    ):
        keep(modules_to_not_convert=names)
