"""The parts of a composite model: what config.json tells their classes, which read a part of it alone."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from miracle_hub.code import QUANT_METHOD
from miracle_hub.codec.dtypes import TORCH_DTYPES
from miracle_hub.errors import FormatError
from miracle_hub.format.payload import DTYPES
from miracle_hub.format.spec import TensorSpec

FACTS = "quantization_config"
# transformers writes a model_type into every part; who writes config.json by hand leaves it out of these.
_USUAL_NAMES = ("text_config", "vision_config", "audio_config")
# What a part's loader needs: the rest is for readers, who look at the whole, or is found beside the files.
_SPELLED = {name: str(TORCH_DTYPES[name]).removeprefix("torch.") for name in DTYPES}
_NEEDED = ("quant_method", "format_version", "digest", "stage_digests", "dtype")


def parts_of(config: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The sub-configs of a config.json at any depth, outer ones first."""
    for name, value in config.items():
        if not isinstance(value, dict) or name == FACTS:
            continue
        if isinstance(value.get("model_type"), str) or name in _USUAL_NAMES:
            yield value
        yield from parts_of(value)


def is_miracle(facts: object) -> bool:
    """Whether a quantization_config is that of a compressed repository."""
    return isinstance(facts, dict) and facts.get("quant_method") == QUANT_METHOD


def state_in_parts(config: dict[str, Any], tensors: Sequence[TensorSpec]) -> None:
    """Repeat in every part of a finished config.json what its loader needs; nothing changes without parts.

    Args:
        tensors: of the source.
    """
    parts, facts = list(parts_of(config)), config[FACTS]
    if parts and (dtype := first_dtype(tensors)):
        facts["dtype"] = dtype
    for part in parts:
        part[FACTS] = facts_of_part(facts)
        if "stages" in config:
            part["stages"] = config["stages"]


def facts_of_part(facts: Mapping[str, Any]) -> dict[str, Any]:
    """What of a quantization_config a part of the model needs."""
    return {name: facts[name] for name in _NEEDED if name in facts}


def remove_facts(config: dict[str, Any]) -> bool:
    """Make a config.json, and its parts, that of a dense model; returns whether it was another."""
    compressed = [part for part in (config, *parts_of(config)) if is_miracle(part.get(FACTS))]
    for part in compressed:
        del part[FACTS]
        part.pop("stages", None)
    return bool(compressed)


def stated_dtype(facts: Mapping[str, Any], where: Path) -> str | None:
    """The dtype to load in where a config has none, as transformers spells it; None where nobody states it.

    Raises:
        FormatError: it is none.
    """
    dtype = facts.get("dtype")
    if dtype is not None and dtype not in _SPELLED.values():
        raise FormatError(
            f"{where}: quantization_config.dtype: expected one of {', '.join(_SPELLED.values())}, found "
            f"{str(dtype)[:80]!r}; download it again"
        )
    return dtype


def first_dtype(tensors: Sequence[TensorSpec]) -> str | None:
    """What transformers loads a dense model in whose config has no dtype, as it spells it: that of the first
    floating tensor of its first file, by names.

    Args:
        tensors: of the source, file by file and by names.
    """
    return next((_SPELLED[tensor.dtype] for tensor in tensors if tensor.dtype in DTYPES), None)
