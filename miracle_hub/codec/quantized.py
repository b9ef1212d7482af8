"""Whether somebody else has quantized a checkpoint: by its config.json, files beside it, or its tensors."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from miracle_hub.format.spec import TensorSpec

# Files that say it beside a config.json that may not.
SIDECARS = {
    "quantize_config.json": "gptq",
    "quant_config.json": "awq",
    "hf_quant_config.json": "modelopt",
    "quantization_config.json": "an unnamed method",
}
# Names that no dense checkpoint has, by what writes them; the second kind are those of packed numbers only.
_SCALES_OF: dict[str, re.Pattern[str]] = {
    "bitsandbytes": re.compile(r".*\.(quant_state\.bitsandbytes__\w+|absmax|nested_absmax|quant_map|SCB)"),
    "fp8": re.compile(r".*\.weight_scale_inv"),
    "exl3": re.compile(r".*\.(suh|svh)"),
}
_PACKED_BY: dict[str, re.Pattern[str]] = {
    "gptq or awq": re.compile(r".*\.(qweight|qzeros)"),
    "compressed-tensors": re.compile(r".*\.weight_packed"),
    "hqq": re.compile(r".*\.W_q"),
    "exl2": re.compile(r".*\.(q_weight|q_invperm)"),
    "quip": re.compile(r".*\.Qidxs"),
    "mxfp4": re.compile(r".*_blocks"),
    "quanto": re.compile(r".*\.weight\._data"),
}
_PACKED = ("I8", "U8", "I16", "U16", "I32", "U32", "F8_E4M3", "F8_E5M2", "F4")
# What else a module has whose `weight` is packed.
_SCALES = ("scale", "scales", "weight_scale", "weight_scales", "weight_scale_inv", "input_scale", "biases")


def method_of_config(config: Mapping[str, Any]) -> tuple[str, str] | None:
    """The method that a config.json names, and the key that does; None where it says nothing."""
    for key, value in _nested(config):
        if key in ("quantization_config", "compression_config", "quant_config"):
            if isinstance(value, dict) and (method := _method(value, key)):
                return method, key
        elif key == "quantization" and isinstance(value, dict) and {"bits", "group_size"} & value.keys():
            return "mlx", key
        elif key in ("load_in_4bit", "load_in_8bit") and value is True:
            return "bitsandbytes", key
    return None


def _nested(config: Mapping[str, Any], levels: int = 4) -> Iterator[tuple[str, Any]]:
    """Keys and values of a config, and then of those in it: a multimodal one has one for every part."""
    yield from config.items()
    for value in config.values():
        if isinstance(value, dict) and levels:
            yield from _nested(value, levels - 1)


def _method(facts: Mapping[str, Any], key: str) -> str:
    """What a quantization_config names; empty for one that only says that nothing is quantized."""
    named = facts.get("quant_method") or facts.get("quant_algo") or facts.get("quant_type")
    if named:
        return str(named)
    if {"load_in_4bit", "load_in_8bit"} & facts.keys():
        return "bitsandbytes" if facts.get("load_in_4bit") or facts.get("load_in_8bit") else ""
    if (facts and key == "compression_config") or "config_groups" in facts:
        return "compressed-tensors"
    says_something = any(value not in (None, False, {}, []) for value in facts.values())
    return "an unnamed method" if says_something else ""


def method_of_tensors(tensors: Sequence[TensorSpec]) -> tuple[str, str] | None:
    """The method by which names and dtypes of tensors are packed, and a tensor that shows it; None: dense."""
    names = {tensor.name for tensor in tensors}
    for tensor in tensors:
        patterns = {**_SCALES_OF, **(_PACKED_BY if tensor.dtype in _PACKED else {})}
        for method, pattern in patterns.items():
            if pattern.fullmatch(tensor.name):
                return method, tensor.name
        module, _, last = tensor.name.rpartition(".")
        is_packed = last == "weight" and tensor.dtype in _PACKED and len(tensor.shape) > 1
        if is_packed and any(f"{module}.{scale}" in names for scale in _SCALES):
            return "packed weights", tensor.name
    return None
