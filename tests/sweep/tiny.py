"""A tiny random model of any architecture of transformers, made from its config class alone."""

import dataclasses
import importlib
import inspect
import re
from collections.abc import Iterator
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

# The value of a field by its name; the first pattern that matches all of it counts.
_SIZES = {
    r"\w*(key_value_heads|kv_heads)|kv_n_heads": 2,
    r"\w*heads": 4,
    r"first_k_dense_replace|\w*start_layer\w*": 0,
    r"\w*layers?|depth|\w*num_blocks": 2,
    r"\w*intermediate_size|\w*ffn_dim|d_ff|ffn_hidden_size|mlp_dim": 64,
    r"\w*head_dim|d_kv|\w*head_size": 8,
    r"\w*lora_rank": 8,
    r"\w*vocab_size|codebook_size|num_embeddings|n_embed": 128,
    r"max_position_embeddings|n_positions|max_seq_len|\w*positions?": 64,
    r"\w*hidden_size|d_model|\w*hidden_dim|n_embd|\w*embed_dim|projection_dim|width|\w*_dim|dim": 32,
    r"num\w*experts|n_routed_experts": 4,
    r"num_experts_per_tok|moe_top_k|top_k_experts|moe_k": 2,
    r"n_group|topk_group|n_shared_experts|num_shared_experts": 1,
    r"image_size|input_size": 32,
    r"\w*patch_size": 8,
    r"\w*num_queries|num_query_tokens": 4,
    r"\w*token_id|\w*token_index": 100,
}
# Some architectures have tables whose size no field says: they take minutes and show nothing more.
MOST_WEIGHTS = 20_000_000


def tiny_config(config: PretrainedConfig) -> PretrainedConfig:
    """The same config, small, and so its parts; what follows from sizes follows again."""
    given: dict[str, Any] = {}
    for field in dataclasses.fields(config):  # pyright: ignore[reportArgumentType]
        value = vars(config).get(field.name)
        if isinstance(value, PretrainedConfig):
            given[field.name] = tiny_config(value)
        elif isinstance(value, int) and not isinstance(value, bool):
            given[field.name] = _small(field.name, value)
    return type(config)(**given)


def _small(name: str, value: int) -> int:
    for pattern, small in _SIZES.items():
        if re.fullmatch(pattern, name):
            return min(value, small)
    return value


def classes_of(config: PretrainedConfig) -> list[type[PreTrainedModel]]:
    """The classes of models that have this class of configs, in the order of their module."""
    module = type(config).__module__.replace("configuration_", "modeling_")
    try:
        found = vars(importlib.import_module(module)).values()
    except ModuleNotFoundError:
        return []
    models = [c for c in found if inspect.isclass(c) and issubclass(c, PreTrainedModel)]
    own = [c for c in models if c.__module__ == module and c.config_class is type(config)]
    return [c for c in own if not c.__name__.endswith("PreTrainedModel")]


def parts(config: PretrainedConfig) -> Iterator[PretrainedConfig]:
    """The configs of a config's parts, at any depth."""
    for value in vars(config).values():
        if isinstance(value, PretrainedConfig):
            yield value
            yield from parts(value)


def tiny_model(config: PretrainedConfig) -> PreTrainedModel:
    """The first class of a config that can be built.

    Raises:
        ValueError: there is none; it says why.
    """
    reasons = []
    for model_class in classes_of(config):
        try:
            with torch.device("meta"):
                n_weights = sum(p.numel() for p in model_class(config).parameters())
            if 0 < n_weights <= MOST_WEIGHTS:
                return filled(model_class(config))
            reasons.append(f"{model_class.__name__}: {n_weights:,} weights")
        except Exception as error:
            reasons.append(f"{model_class.__name__}: {type(error).__name__}: {str(error)[:120]}")
    raise ValueError("; ".join(reasons[:2]) or "no class of its own")


def filled(model: PreTrainedModel) -> PreTrainedModel:
    """A model none of whose tensors is constant, so that a tensor left uninitialized shows."""
    generator = torch.Generator().manual_seed(0)
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.is_floating_point() and tensor.ndim:
            noise = torch.randn(tensor.shape, generator=generator)
            tensor.data.copy_(0.05 * noise + (tensor.ndim == 1))
    return model
