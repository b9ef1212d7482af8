"""Any architecture of transformers at tiny size, with random weights: what sweeps over all are made of."""

import random
from collections.abc import Iterator
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_MAPPING

MOST_WEIGHTS = 1_200_000

# Attributes of configs by the ends of their names, and the most that each may be; others stay as they are.
_AT_MOST = {
    ("hidden_layers", "coder_layers", "n_layer", "n_layers", "num_layers", "num_blocks"): 2,
    ("num_attention_heads", "_heads", "n_head", "num_heads", "num_key_value_heads", "n_heads"): 2,
    (
        "hidden_size",
        "d_model",
        "n_embd",
        "embed_dim",
        "hidden_dim",
        "embedding_size",
        "width",
        "projection_dim",
    ): 32,
    (
        "intermediate_size",
        "ffn_dim",
        "d_ff",
        "n_inner",
        "_intermediate_dim",
        "feed_forward_size",
        "mlp_dim",
    ): 48,
    ("head_dim", "d_kv", "head_size"): 16,
    ("vocab_size", "type_vocab_size"): 99,
    ("max_position_embeddings", "n_positions", "max_source_positions", "max_target_positions", "n_ctx"): 64,
    ("num_experts", "num_local_experts", "n_routed_experts"): 4,
    ("num_experts_per_tok",): 2,
    ("image_size",): 32,
    ("token_id",): 7,
}


def model_types() -> list[str]:
    """Of all architectures that have a base model."""
    return sorted(name for name, config in CONFIG_MAPPING.items() if config in MODEL_MAPPING)


def tiny_config(model_type: str) -> PreTrainedConfig:
    """The default config with every size cut, those of its parts too."""
    config_class = CONFIG_MAPPING[model_type]
    return config_class(**_cut(config_class()))


def _cut(config: PreTrainedConfig) -> dict[str, Any]:
    """Arguments for a config of this class: what is larger than it need be."""
    cut: dict[str, Any] = {}
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            cut[name] = type(value)(**_cut(value))
        elif isinstance(value, int) and not isinstance(value, bool) and _cut_to(name, value) != value:
            cut[name] = _cut_to(name, value)
    return cut


def _cut_to(name: str, value: int) -> int:
    """A size, at most as large as the end of its name says."""
    return min([value, *(most for ends, most in _AT_MOST.items() if name.endswith(ends))])


def tiny_model(model_type: str, seed: int = 0) -> PreTrainedModel:
    """
    Raises:
        Exception: whatever the model raises whose sizes do not suit each other, or ValueError for one that is
            not tiny.
    """
    config: Any = tiny_config(model_type)
    config.validate()  # as save_pretrained does
    model_class: Any = MODEL_MAPPING[type(config)]
    model_class = model_class[0] if isinstance(model_class, tuple) else model_class
    with torch.device("meta"):
        n_weights = sum(p.numel() for p in model_class(config).parameters())
    if n_weights > MOST_WEIGHTS:
        raise ValueError(f"{model_type}: {n_weights} weights")
    torch.manual_seed(seed)
    return model_class(config).eval()


def drawn_models(generator: random.Random) -> Iterator[tuple[str, PreTrainedModel]]:
    """Architectures at random, those that cannot be made tiny left out."""
    while True:
        model_type = generator.choice(model_types())
        try:
            yield model_type, tiny_model(model_type, generator.randrange(1 << 30))
        except Exception:  # of all kinds; how many are left is claimed by a test
            continue
