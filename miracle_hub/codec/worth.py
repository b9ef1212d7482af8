"""What an error of a tensor is worth where nobody measured it, beside its size: heads, and convolutions."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from miracle_hub.codec.ladder import SIZE_EXPONENT
from miracle_hub.codec.rates import Curve
from miracle_hub.format.spec import TensorSpec

# Chosen by the divergence from dense at 4, 3 and 2 bits (benchmarks/size_rule.py), in nats with factors of 1
# and 4: stories260K .253, .979, 4.33 and .174, .871, 3.80; with a head of its own .224, .915, 4.23 and .161,
# .832, 4.09. With 2 it is the same but at 2 bits, with 8 worse at 3. Of a word table that is read only 2 is
# worse: MiniLM loses .024, .071, .243 of cosine instead of .015, .056, .203.
HEAD = 4.0
# With size^0 instead of size^0.6 ResNet-20 has .118, .405, 2.25 instead of .137, .584, 3.21; size^0.3 and
# size^-0.3 give no less. Not chosen by: ResNet-44 has .050, .227, 2.91 instead of .070, .304, 3.20.
_CONVOLUTION_EXPONENT = 0.0
# Ends of the names of classes whose answers are scores of words; no masked language models, of which most are
# used as encoders, whose word tables are worth less than their size says.
_SCORING = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
# What heads are called that are no word tables.
_HEADS = ("lm_head", "embed_out", "output_projection", "proj_out", "output", "head")


def worths(specs: Sequence[TensorSpec], config: Mapping[str, Any]) -> dict[str, float]:
    """How many times its share of Σ size^0.6 · (relative squared error) a tensor's error counts; 1 where the
    tensor is not named.

    Args:
        specs: of all tensors of the model.
        config: its config.json; nothing needs to be in it.
    """
    if is_convolutional(specs):
        return {
            spec.name: spec.n_weights ** (_CONVOLUTION_EXPONENT - SIZE_EXPONENT)
            for spec in specs
            if spec.n_weights
        }
    head = head_of(specs, config)
    return {} if head is None else {head: HEAD}


def is_convolutional(specs: Sequence[TensorSpec]) -> bool:
    """Whether half of a model's matrices or more are convolutions of images or more."""
    dimensions = [len(spec.shape) for spec in specs if len(spec.shape) > 1]
    return 2 * sum(n > 3 for n in dimensions) >= max(1, len(dimensions))


def head_of(specs: Sequence[TensorSpec], config: Mapping[str, Any]) -> str | None:
    """The matrix that scores words, which may be the word table as well: the only one with a row for every
    word, or the one of several that is called a head. None where config.json names no class that has one.
    """
    tables = tables_in(specs, config)
    if not _scores_words(config):
        return None
    heads = tables if len(tables) == 1 else [name for name in tables if name.split(".")[-2:][0] in _HEADS]
    return heads[0] if len(heads) == 1 else None


def tables_in(specs: Sequence[TensorSpec], config: Mapping[str, Any]) -> list[str]:
    """Matrices with a row for every word."""
    n_words = _words(config)
    return [spec.name for spec in specs if len(spec.shape) == 2 and spec.shape[0] == n_words]


def _scores_words(config: Mapping[str, Any]) -> bool:
    names = config.get("architectures")
    return isinstance(names, list) and any(isinstance(n, str) and n.endswith(_SCORING) for n in names)


def _words(config: Mapping[str, Any]) -> int | None:
    """Of the model, or of the text model of a composite one."""
    text = config.get("text_config")
    sizes = [part.get("vocab_size") for part in (config, text) if isinstance(part, Mapping)]
    return next((size for size in sizes if isinstance(size, int) and size > 1), None)


def by_worth(curves: Sequence[Curve], worth: Mapping[str, float]) -> list[Curve]:
    """Curves with errors by what they are worth."""
    return [_times(curve, worth[curve.name]) if curve.name in worth else curve for curve in curves]


def _times(curve: Curve, factor: float) -> Curve:
    return replace(curve, options=tuple(replace(o, error=o.error * factor) for o in curve.options))
