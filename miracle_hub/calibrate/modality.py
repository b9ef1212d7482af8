"""What a model takes: texts, images, sounds or arrays, by its class alone."""

import inspect
from enum import Enum
from typing import Any

from torch import nn
from transformers import PreTrainedModel


class Modality(Enum):
    """What a model is run on, in words."""

    CAUSAL = "texts, of which it predicts every next token"
    MASKED = "texts, of which it predicts hidden tokens"
    TEXT = "texts"
    TRANSLATION = "texts, to which it writes others"
    IMAGE = "images"
    SPEECH = "sounds, of which it writes what is said"
    SOUND = "sounds"
    ARRAY = "arrays of numbers"


_TEXTS = frozenset({Modality.CAUSAL, Modality.MASKED, Modality.TEXT, Modality.TRANSLATION})
_SOUNDS = frozenset({Modality.SPEECH, Modality.SOUND})


def takes_texts(modality: Modality) -> bool:
    """Whether a model of this kind takes token ids."""
    return modality in _TEXTS


def takes_sounds(modality: Modality) -> bool:
    """Whether a model of this kind takes sounds."""
    return modality in _SOUNDS


def modality_of(model: nn.Module) -> Modality:
    """What a model takes; arrays where nothing else is known."""
    if not isinstance(model, PreTrainedModel):
        return Modality.ARRAY
    main, name = str(model.main_input_name), type(model).__name__
    has_two = "decoder_input_ids" in inputs_by_name(model)
    if main == "input_ids":
        if has_two:
            return Modality.TRANSLATION
        if "MaskedLM" in name:
            return Modality.MASKED
        return Modality.CAUSAL if model.can_generate() else Modality.TEXT
    if main == "pixel_values":
        return Modality.IMAGE
    if main in ("input_features", "input_values"):
        return Modality.SPEECH if has_two else Modality.SOUND
    return Modality.ARRAY


def inputs_by_name(model: nn.Module) -> tuple[str, ...]:
    """The names that a model's forward has for its inputs, in order."""
    known = inspect.signature(model.forward).parameters.values()
    return tuple(p.name for p in known if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD))


def main_input(model: Any) -> str:
    """The name of the input that a model cannot do without."""
    if isinstance(model, PreTrainedModel):
        return str(model.main_input_name)
    return next(iter(inputs_by_name(model)), "input")


def positions_of(model: Any) -> int | None:
    """How many tokens a text may have; None where nothing limits it."""
    config = getattr(model, "config", None)
    found = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    return found if isinstance(found, int) and found > 0 else None
