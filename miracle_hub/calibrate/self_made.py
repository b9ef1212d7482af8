"""Inputs without data: what a model writes by itself, words of its vocabulary, noise like images and sounds.

How near they come is the mean cosine, over layers, between second moments of inputs, E[x xᵀ], of self-made
and of real ones (benchmarks/self_inputs.py; 1 for equal ones):

    stories260K    .976 to its stories, of which 87 % of the tokens are the same; C4's texts have .913
    SmolLM2-135M   .871 to WikiText in windows of 64; C4 has .826, other windows of WikiText .953
    MiniLM-L6      .773 to Wikipedia; C4 has .858, TinyStories .698
    ResNet-44      .947 to CIFAR-10; white noise has .659

What must not be trusted: a text of a model's own has what it knows, and none of what it is used for; words of
a vocabulary have frequencies, and no sense, so that they say little of which heads look where; disks have
edges, and are no things, so that the last layers of a vision net see classes of nothing; sounds like speech
have no words, so that a transcript is made up. What is decided by them is decided for inputs like them.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from miracle_hub.calibrate.modality import Modality, modality_of
from miracle_hub.calibrate.noise import speech
from miracle_hub.calibrate.pictures import picture_rows
from miracle_hub.calibrate.rows import Found, Row, tokens_of
from miracle_hub.calibrate.sounds import read_extractor, sound_rows, waveform
from miracle_hub.calibrate.texts import longest, prefix_of
from miracle_hub.calibrate.vocabulary import Vocabulary
from miracle_hub.calibrate.written import answered, continued
from miracle_hub.errors import CalibrationError, SourceError
from miracle_hub.evaluate.batches import check_fits, read_tokenizer

_SELF = "self"
_LENGTH = 256  # tokens of a text that a model writes: longer ones wander off, and cost more
_LEAST_ROWS = 16
# Texts that are written together, and floats of their keys and values: choices that bound time and memory.
_AT_ONCE = 96
_CACHED = 1 << 28
# Lengths of sequences of words, of sentences above all, and how often each.
_LENGTHS = {6: 2, 8: 3, 10: 4, 12: 4, 16: 4, 20: 3, 24: 3, 32: 3, 48: 2, 64: 2, 128: 1}
_FILLED = 3  # rounds in which a masked model fills a third of every sequence
_ANSWER = 64
_SECONDS = 8.0


def self_made(
    model: nn.Module, folder: Path, data: Any, *, wanted: int, max_length: int | None, seed: int
) -> Found:
    """Rows that have `wanted` tokens together.

    Raises:
        CalibrationError: nothing is known of such a model, or what it takes to make them is missing.
    """
    modality, generator = modality_of(model), torch.Generator().manual_seed(seed)
    try:
        if modality is Modality.CAUSAL:
            return _texts(model, folder, wanted, max_length, generator)
        if modality in (Modality.MASKED, Modality.TEXT, Modality.TRANSLATION):
            return _sequences(model, folder, modality, wanted, max_length, generator)
        if modality in (Modality.SPEECH, Modality.SOUND):
            return _sounds(model, folder, modality, wanted, generator)
        return picture_rows(model, folder, wanted, generator)
    except SourceError as error:
        raise CalibrationError(f"{error}; or give data (--calibrate DATA)") from error


def _texts(
    model: Any, folder: Path, wanted: int, max_length: int | None, generator: torch.Generator
) -> Found:
    """Texts that a causal language model writes from single tokens, any of its vocabulary.

    Where the tokenizer begins texts with a token, so do these, half of them with it alone. Where it begins
    them with none, the model's own start token is left out too: texts from it are farther from others'.
    """
    length, prefix = longest(model, max_length or _LENGTH), _prefix(folder)
    n_tokens = getattr(model.get_input_embeddings(), "num_embeddings", 0)
    if not n_tokens:
        raise CalibrationError(
            f"{type(model).__name__}: expected embeddings of tokens to write texts by, found none; give data "
            "(--calibrate DATA)"
        )
    n_rows, rows = max(_LEAST_ROWS, -(-wanted // length)), []
    while len(rows) < n_rows:
        n = min(_at_once(model, length), n_rows - len(rows))
        begun = torch.tensor(prefix, dtype=torch.long).expand(n, len(prefix))
        starts = torch.cat((begun, torch.randint(n_tokens, (n, 1), generator=generator)), 1)
        if prefix and n > 1:
            alone = slice(0, n // 2)
            starts[alone] = continued(model, begun[alone], starts.shape[1], generator).cpu()
        rows += [{"input_ids": row} for row in continued(model, starts, length, generator).cpu()]
    said = f"{n_rows:,} texts of {length} tokens sampled from the model, each from a token drawn at random"
    return Found(rows, _SELF, said + (", half of them from the start" if prefix else ""))


def _prefix(folder: Path) -> list[int]:
    """The token that texts begin with; none where there is no tokenizer to say so."""
    try:
        return prefix_of(read_tokenizer(folder))
    except SourceError:
        return []


def _at_once(model: Any, length: int) -> int:
    config = model.config.get_text_config()
    layers, heads = (
        getattr(config, name, None) or 1 for name in ("num_hidden_layers", "num_attention_heads")
    )
    width = getattr(config, "head_dim", None) or getattr(config, "hidden_size", 1) // heads
    cached = 2 * layers * width * (getattr(config, "num_key_value_heads", None) or heads) * length
    return max(1, min(_AT_ONCE, _CACHED // max(1, cached)))


def _sequences(
    model: Any,
    folder: Path,
    modality: Modality,
    wanted: int,
    max_length: int | None,
    generator: torch.Generator,
) -> Found:
    """Words of the tokenizer's vocabulary, filled in anew by a model that predicts hidden ones."""
    tokenizer = read_tokenizer(folder)
    vocabulary, most = Vocabulary.of(tokenizer), longest(model, max_length or _LENGTH)
    lengths = [length for length in _LENGTHS if length <= most] or [most]
    often = torch.tensor([float(_LENGTHS.get(length, 1)) for length in lengths])
    mean = float((often / often.sum() * torch.tensor(lengths)).sum())
    n_rows, rows = max(_LEAST_ROWS, int(wanted / mean) + 1), []
    counts = torch.multinomial(often, n_rows, replacement=True, generator=generator).bincount(
        minlength=len(lengths)
    )
    for length, count in zip(lengths, counts.tolist(), strict=True):
        for n in [_AT_ONCE] * (count // _AT_ONCE) + [count % _AT_ONCE] * (count % _AT_ONCE > 0):
            ids = vocabulary.drawn(n, length, generator)
            if modality is Modality.MASKED:
                ids = _filled(model, tokenizer, ids, generator)
            check_fits(model, {"input_ids": ids.tolist()})
            rows += [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids]
    said = f"{n_rows:,} sequences of words of its tokenizer"
    if modality is Modality.MASKED:
        said += ", filled in by the model"
    if modality is Modality.TRANSLATION:
        rows, said = answered(model, rows, _ANSWER, generator), f"{said}, with answers of the model"
    return Found(rows, _SELF, said)


@torch.no_grad()
def _filled(model: Any, tokenizer: Any, ids: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Sequences of which every token but special ones was drawn by the model once, given the others.

    Raises:
        CalibrationError: there is no token that hides others.
    """
    if tokenizer.mask_token_id is None:
        raise CalibrationError(
            "tokenizer: expected a mask token, by which the model fills in words, found none; give data "
            "(--calibrate DATA)"
        )
    special = torch.isin(ids, torch.tensor(tokenizer.all_special_ids))
    turn = torch.randint(_FILLED, ids.shape, generator=generator)
    for number in range(_FILLED):
        hidden = (turn == number) & ~special
        shown = ids.masked_fill(hidden, tokenizer.mask_token_id).to(model.device)
        logits = model(input_ids=shown, attention_mask=torch.ones_like(shown)).logits[hidden.to(shown.device)]
        logits = logits.float().cpu()
        logits[:, tokenizer.all_special_ids] = -torch.inf
        if len(logits):
            ids = ids.clone()
            ids[hidden] = torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
    return ids


def _sounds(model: Any, folder: Path, modality: Modality, wanted: int, generator: torch.Generator) -> Found:
    """Babble, and what the model says of it."""
    extractor = read_extractor(model, folder)
    seconds = float(getattr(extractor, "chunk_length", None) or _SECONDS)
    rows: list[Row] = []
    while sum(map(tokens_of, rows)) < wanted or len(rows) < _LEAST_ROWS:
        babble = speech(seconds, extractor.sampling_rate, generator)
        rows += sound_rows(model, folder, [waveform(babble, extractor.sampling_rate)], 1)
    said = f"{len(rows):,} pieces of noise like speech"
    if modality is Modality.SPEECH:
        rows, said = answered(model, rows, _ANSWER, generator), f"{said}, with answers of the model"
    return Found(rows, _SELF, said)
