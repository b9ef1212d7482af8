"""A tiny random model of any architecture of transformers, made from its config class alone."""

import dataclasses
import re
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_MAPPING

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
MOST_WEIGHTS = 3_000_000


def tiny_config(config: PretrainedConfig) -> PretrainedConfig:
    """The same config, small, and so its parts; what follows from sizes follows again."""
    given: dict[str, Any] = {}
    for field in dataclasses.fields(config):  # pyright: ignore[reportArgumentType]
        value = getattr(config, field.name, None)
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
