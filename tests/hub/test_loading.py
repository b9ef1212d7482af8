"""Loading a compressed folder is loading its decompressed folder, whatever the architecture."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    pipeline,
)

import miracle_hub
from miracle_hub.codec.repository import open_repository

if TYPE_CHECKING:
    from tests.hub.conftest import Repository

_TOKENS = torch.tensor([[5, 6, 7, 8]])


class Loaded(NamedTuple):
    """A model from the compressed folder and its twin from the decompressed one."""

    model: Any
    info: dict[str, Any]
    twin: Any
    twin_info: dict[str, Any]


def load_both(auto: Any, repository: Repository, **arguments: Any) -> Loaded:
    ours = auto.from_pretrained(repository.compressed, output_loading_info=True, **arguments)
    dense = auto.from_pretrained(repository.decompressed, output_loading_info=True, **arguments)
    return Loaded(*ours, *dense)


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert torch.equal(ours[name], tensor), name


def folder_tensors(folder: Path) -> dict[str, Tensor]:
    return {k: v for path in folder.glob("*.safetensors") for k, v in load_file(path).items()}


@pytest.fixture(scope="module")
def loaded(repository: Repository) -> Loaded:
    return load_both(repository.auto, repository)


def test_every_tensor_equals_the_decompressed_folders(loaded: Loaded) -> None:
    assert_same(loaded.model.state_dict(), loaded.twin.state_dict())
    assert_same(dict(loaded.model.named_buffers()), dict(loaded.twin.named_buffers()))


def test_load_state_dict_equals_the_decompressed_folder(repository: Repository) -> None:
    assert_same(miracle_hub.load_state_dict(repository.compressed), folder_tensors(repository.decompressed))


def test_no_key_is_missing_or_unexpected(loaded: Loaded) -> None:
    assert loaded.info == loaded.twin_info
    assert not any(loaded.info.values())


def test_something_was_compressed(repository: Repository) -> None:
    tensors = open_repository(repository.compressed).tensors
    coded = sum(tensor.n_weights for tensor in tensors if tensor.is_coded)
    assert coded > 0.5 * sum(tensor.n_weights for tensor in tensors)


def test_nothing_says_quantized_afterwards(loaded: Loaded) -> None:
    for config in (loaded.model.config, loaded.model.config.get_text_config()):
        assert not hasattr(config, "quantization_config")
        assert not getattr(config, "_is_quantized", False)
    assert not loaded.model.is_quantized
    assert not hasattr(loaded.model, "hf_quantizer")
    assert not hasattr(loaded.model, "quantization_method")


def test_parameters_train_as_the_twins_do(loaded: Loaded) -> None:
    twins = dict(loaded.twin.named_parameters())
    for name, parameter in loaded.model.named_parameters():
        assert isinstance(parameter, nn.Parameter)
        assert parameter.requires_grad == twins[name].requires_grad, name
        assert parameter.is_contiguous() == twins[name].is_contiguous(), name


def test_saved_again_is_an_ordinary_checkpoint(
    loaded: Loaded, repository: Repository, tmp_path: Path
) -> None:
    loaded.model.save_pretrained(tmp_path / "ours")
    loaded.twin.save_pretrained(tmp_path / "theirs")
    assert_same(folder_tensors(tmp_path / "ours"), folder_tensors(tmp_path / "theirs"))
    assert "quantization_config" not in json.loads((tmp_path / "ours" / "config.json").read_text())
    again = repository.auto.from_pretrained(tmp_path / "ours")
    assert_same(again.state_dict(), loaded.model.state_dict())


@pytest.mark.parametrize("architecture", ["llama-tied", "gpt2", "bert-masked-lm", "t5"])
def test_tied_weights_stay_tied(architecture: str, repositories: Callable[..., Repository]) -> None:
    repository = repositories(architecture)
    model = repository.auto.from_pretrained(repository.compressed)
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


def test_untied_weights_stay_apart(llama: Repository) -> None:
    model = llama.auto.from_pretrained(llama.compressed)
    embeddings, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert not torch.equal(embeddings, head)


@pytest.mark.parametrize("architecture", ["gpt-oss", "llama4"])
def test_stacked_experts_without_a_weight_suffix_are_compressed(
    architecture: str, repositories: Callable[..., Repository]
) -> None:
    stored = {t.name: t for t in open_repository(repositories(architecture).compressed).tensors}
    experts = [tensor for name, tensor in stored.items() if name.endswith("experts.gate_up_proj")]
    assert experts and all(tensor.is_coded for tensor in experts)
    assert all(len(tensor.shape) == 3 for tensor in experts)


@pytest.mark.parametrize("architecture", ["mixtral", "qwen3-moe"])
def test_single_experts_are_compressed_one_by_one(
    architecture: str, repositories: Callable[..., Repository]
) -> None:
    repository = repositories(architecture)
    coded = [t.name for t in open_repository(repository.compressed).tensors if t.is_coded]
    assert any(".experts.3." in name and name.endswith(".weight") for name in coded)
    model = repository.auto.from_pretrained(repository.compressed)
    assert not any(".experts.3." in name for name, _ in model.named_parameters())


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bert-masked-lm", "mixtral", "t5"])
def test_a_base_model_takes_its_part(architecture: str, repositories: Callable[..., Repository]) -> None:
    both = load_both(AutoModel, repositories(architecture))
    assert both.info == both.twin_info
    # A pooler that the checkpoint never had is new and random in both.
    new = both.info["missing_keys"]
    assert all("pooler" in name for name in new)
    ours, theirs = both.model.state_dict(), both.twin.state_dict()
    assert_same({k: ours[k] for k in ours if k not in new}, {k: theirs[k] for k in theirs if k not in new})


def test_a_full_model_takes_a_base_models_weights(llama: Repository, tmp_path: Path) -> None:
    AutoModel.from_pretrained(llama.source).save_pretrained(tmp_path / "base")
    miracle_hub.compress(
        tmp_path / "base", tmp_path / "out", bits_per_weight=7, window_bits=8, progress=False
    )
    auto: Any = AutoModelForCausalLM
    model, info = auto.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert info["missing_keys"] == {"lm_head.weight"} and not info["unexpected_keys"]
    assert_same(model.model.state_dict(), AutoModel.from_pretrained(tmp_path / "out").state_dict())


def classifier_loss(model: PreTrainedModel) -> Tensor:
    return model(input_ids=_TOKENS, labels=torch.tensor([1])).loss


@pytest.mark.parametrize("architecture", ["llama", "bert-masked-lm", "gpt2"])
def test_a_new_head_is_initialized_and_trains(
    architecture: str, repositories: Callable[..., Repository]
) -> None:
    both = load_both(AutoModelForSequenceClassification, repositories(architecture), num_labels=2)
    assert both.info == both.twin_info
    new = both.info["missing_keys"]
    assert "score.weight" in new or "classifier.weight" in new
    ours, theirs = both.model.state_dict(), both.twin.state_dict()
    assert_same({k: ours[k] for k in ours if k not in new}, {k: theirs[k] for k in theirs if k not in new})
    parameters = dict(both.model.named_parameters())
    for name in new:
        if name.endswith("weight"):
            assert 0.5 < parameters[name].std().item() / both.model.config.initializer_range < 2
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    optimizer = torch.optim.SGD(both.model.parameters(), lr=0.1)
    both.model.config.pad_token_id = 0
    classifier_loss(both.model).backward()
    optimizer.step()
    changed = {name for name, parameter in parameters.items() if not torch.equal(parameter, before[name])}
    assert new <= changed
    assert len(changed) > len(parameters) // 2


def test_another_number_of_labels_replaces_the_head_only(repositories: Callable[..., Repository]) -> None:
    both = load_both(
        AutoModelForSequenceClassification,
        repositories("bert-classifier"),
        num_labels=40,
        ignore_mismatched_sizes=True,
    )
    assert both.info == both.twin_info
    assert {name for name, *_ in both.info["mismatched_keys"]} == {"classifier.weight", "classifier.bias"}
    assert_same(both.model.bert.state_dict(), both.twin.bert.state_dict())


def test_training_continues_from_the_decoded_weights(llama: Repository) -> None:
    both = load_both(AutoModelForCausalLM, llama)
    for model in (both.model, both.twin):
        model.train()
        model(input_ids=_TOKENS, labels=_TOKENS).loss.backward()
    for ours, theirs in zip(both.model.parameters(), both.twin.parameters(), strict=True):
        assert ours.grad is not None and torch.isfinite(ours.grad).all() and ours.grad.any()
        # Same weights, other alignment in memory: sums may be taken in another order.
        torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "t5", "mixtral", "gpt-oss"])
def test_generate_gives_the_twins_tokens(architecture: str, repositories: Callable[..., Repository]) -> None:
    repository = repositories(architecture)
    both = load_both(repository.auto, repository)
    ours, theirs = (
        model.generate(_TOKENS, max_new_tokens=4, do_sample=False, pad_token_id=0)
        for model in (both.model, both.twin)
    )
    assert torch.equal(ours, theirs)


def test_a_pipeline_loads_the_folder_by_its_path(llama: Repository, tmp_path: Path) -> None:
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(64)}, unk_token="w3"))
    words.pre_tokenizer = Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w2")
    llama.auto.from_pretrained(llama.source).save_pretrained(tmp_path / "source")
    tokenizer.save_pretrained(tmp_path / "source")
    miracle_hub.compress(
        tmp_path / "source", tmp_path / "out", bits_per_weight=7, window_bits=8, progress=False
    )
    generate: Any = pipeline("text-generation", model=str(tmp_path / "out"))
    assert generate("w5 w6", max_new_tokens=3, do_sample=False)[0]["generated_text"].startswith("w5 w6")
    assert_same(generate.model.state_dict(), llama.auto.from_pretrained(llama.compressed).state_dict())


def test_a_class_of_its_own_name_loads_too(llama: Repository) -> None:
    model = LlamaForSequenceClassification.from_pretrained(llama.compressed, num_labels=2)
    assert_same(model.model.state_dict(), AutoModel.from_pretrained(llama.compressed).state_dict())


@pytest.mark.parametrize("architecture", ["llama", "mixtral", "gpt-oss"])
@pytest.mark.parametrize(("source_shard", "shard"), [("30KB", "5GB"), ("5GB", "8KB"), ("30KB", "8KB")])
def test_shards_do_not_matter(
    architecture: str, source_shard: str, shard: str, repositories: Callable[..., Repository]
) -> None:
    repository = repositories(architecture, source_shard=source_shard, shard=shard)
    n_source = len(list(repository.source.glob("*.safetensors")))
    n_compressed = len(list(repository.compressed.glob("*.safetensors")))
    assert (n_source > 1, n_compressed > 1) == (source_shard == "30KB", shard == "8KB")
    both = load_both(repository.auto, repository)
    assert not any(both.info.values())
    assert_same(both.model.state_dict(), both.twin.state_dict())


def test_a_user_may_pass_the_config(llama: Repository) -> None:
    config = llama.auto.from_pretrained(llama.source).config
    config.quantization_config = json.loads((llama.compressed / "config.json").read_text())[
        "quantization_config"
    ]
    model = llama.auto.from_pretrained(llama.compressed, config=config)
    assert_same(model.state_dict(), llama.auto.from_pretrained(llama.decompressed).state_dict())


def test_renamed_tensors_are_decoded(llama: Repository, tmp_path: Path) -> None:
    shutil.copytree(llama.compressed, tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    renamed = {name.replace("mlp.up_proj.weight", "feed.kernel"): t for name, t in tensors.items()}
    assert renamed.keys() != tensors.keys()
    save_file(renamed, tmp_path / "out" / "model.safetensors", {"format": "pt"})
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    config["quantization_config"] |= {"digest": None}
    del config["quantization_config"]["guard"]
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    model, info = llama.auto.from_pretrained(
        tmp_path / "out", key_mapping={r"feed\.kernel": "mlp.up_proj.weight"}, output_loading_info=True
    )
    assert not any(info.values())
    assert_same(model.state_dict(), llama.auto.from_pretrained(llama.decompressed).state_dict())


def test_payloads_are_stored_under_the_names_of_the_tensors(repository: Repository) -> None:
    def names(folder: Path) -> set[str]:
        found: set[str] = set()
        for path in folder.glob("*.safetensors"):
            with safe_open(path, "pt") as file:
                found |= set(file.keys())
        return found

    assert names(repository.compressed) == names(repository.source)
