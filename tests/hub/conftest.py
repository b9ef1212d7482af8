"""Tiny random models of many architectures, compressed and decompressed once per session."""

import copy
import fcntl
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import PreTrainedModel

import miracle_hub

# Every matrix that is to be coded needs 1,024 weights.
_DECODER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_ENCODER: dict[str, Any] = {
    key: _DECODER[key] for key in _DECODER if key not in ("num_key_value_heads", "bos_token_id")
}
_VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
}
_EXPERTS: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}
_SEQUENCE_TO_SEQUENCE: dict[str, Any] = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "vocab_size": 64,
    "decoder_start_token_id": 1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_CLIP: dict[str, Any] = {
    "text_config": {**_ENCODER, "bos_token_id": 1},
    "vision_config": _VISION,
    "projection_dim": 32,
}
# Name → class to save, class to load, config class, its arguments.
ARCHITECTURES: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "AutoModelForCausalLM", "LlamaConfig", _DECODER),
    "llama-tied": (
        "LlamaForCausalLM",
        "AutoModelForCausalLM",
        "LlamaConfig",
        {**_DECODER, "tie_word_embeddings": True},
    ),
    "gpt2": (
        "GPT2LMHeadModel",
        "AutoModelForCausalLM",
        "GPT2Config",
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 64}
        | {"bos_token_id": 1, "eos_token_id": 2},
    ),
    "bert-masked-lm": ("BertForMaskedLM", "AutoModelForMaskedLM", "BertConfig", _ENCODER),
    "bert-classifier": (
        "BertForSequenceClassification",
        "AutoModelForSequenceClassification",
        "BertConfig",
        {**_ENCODER, "num_labels": 3},
    ),
    "t5": (
        "T5ForConditionalGeneration",
        "AutoModelForSeq2SeqLM",
        "T5Config",
        {"d_model": 32, "d_ff": 64, "d_kv": 8, "num_layers": 2, "num_heads": 4, "vocab_size": 64}
        | {"decoder_start_token_id": 0},
    ),
    "vit": ("ViTForImageClassification", "AutoModelForImageClassification", "ViTConfig", _VISION),
    "resnet": (
        "ResNetForImageClassification",
        "AutoModelForImageClassification",
        "ResNetConfig",
        {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1], "layer_type": "basic"},
    ),
    "mixtral": ("MixtralForCausalLM", "AutoModelForCausalLM", "MixtralConfig", {**_DECODER, **_EXPERTS}),
    "qwen3-moe": (
        "Qwen3MoeForCausalLM",
        "AutoModelForCausalLM",
        "Qwen3MoeConfig",
        {**_DECODER, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 8},
    ),
    "gpt-oss": ("GptOssForCausalLM", "AutoModelForCausalLM", "GptOssConfig", {**_DECODER, **_EXPERTS}),
    "llama4": (
        "Llama4ForCausalLM",
        "AutoModelForCausalLM",
        "Llama4TextConfig",
        {**_DECODER, **_EXPERTS, "intermediate_size_mlp": 64},
    ),
    "whisper": (
        "WhisperForConditionalGeneration",
        "AutoModelForSpeechSeq2Seq",
        "WhisperConfig",
        {**_SEQUENCE_TO_SEQUENCE, "num_mel_bins": 16, "max_source_positions": 32, "max_target_positions": 32},
    ),
    "clip": ("CLIPModel", "AutoModel", "CLIPConfig", _CLIP),
}


@dataclass(frozen=True)
class Repository:
    """A model saved by transformers, its compressed folder, and that one decompressed."""

    source: Path
    compressed: Path
    decompressed: Path
    auto: Any


def random_model(architecture: str, dtype: torch.dtype) -> PreTrainedModel:
    """A model none of whose tensors is constant, so that a tensor left uninitialized shows."""
    saved, _, config, arguments = ARCHITECTURES[architecture]
    torch.manual_seed(0)
    # Some configs keep and change the dictionaries they are given.
    model = getattr(transformers, saved)(getattr(transformers, config)(**copy.deepcopy(arguments)))
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.is_floating_point() and tensor.ndim:
            tensor.data.copy_(0.05 * torch.randn(tensor.shape) + (tensor.ndim == 1))
    return model.to(dtype)


@pytest.fixture(scope="session")
def repositories(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Repository]:
    """`repositories(architecture, dtype, ...)`, made once for the same arguments, by whatever process."""
    root = tmp_path_factory.getbasetemp()
    root = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "repositories"
    root.mkdir(exist_ok=True)

    def make(
        architecture: str,
        dtype: torch.dtype = torch.float32,
        source_shard: str = "5GB",
        shard: str = "5GB",
    ) -> Repository:
        folder = root / f"{architecture}-{dtype}-{source_shard}-{shard}"
        auto = getattr(transformers, ARCHITECTURES[architecture][1])
        made = Repository(folder / "source", folder / "out", folder / "dense", auto)
        with open(f"{folder}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not made.decompressed.exists():  # what is made last
                random_model(architecture, dtype).save_pretrained(made.source, max_shard_size=source_shard)
                options: Any = {"bits_per_weight": 7, "window_bits": 8, "max_shard_size": shard}
                miracle_hub.compress(made.source, made.compressed, **options, progress=False)
                miracle_hub.decompress(made.compressed, made.decompressed, progress=False)
        return made

    return make


@pytest.fixture(scope="session", params=ARCHITECTURES)
def repository(request: pytest.FixtureRequest, repositories: Callable[..., Repository]) -> Repository:
    """Each architecture in turn."""
    return repositories(request.param)


@pytest.fixture(scope="session")
def llama(repositories: Callable[..., Repository]) -> Repository:
    return repositories("llama")
