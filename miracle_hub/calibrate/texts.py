"""Texts → rows of token ids: windows of a stream for causal language models, sentences for all others."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import torch

from miracle_hub.calibrate.modality import Modality, inputs_by_name, positions_of
from miracle_hub.calibrate.rows import Row, met_length, order_of
from miracle_hub.errors import DataError
from miracle_hub.evaluate.batches import check_fits, most_positions, tokenized

_MAX_LENGTH = 512
_LEAST_WINDOWS, _LEAST_LENGTH = 8, 8  # texts that are short are cut into shorter windows, down to these
# Characters of a piece, for every token of a window, which lies in about five pieces. With feedback by the
# moments of 16,000 tokens three late matrices of SmolLM2 have 0.071, 0.47 and 0.60 of their error left on
# WikiText, each with its best damping; by 64,000 of pieces of 8 characters 0.065, 0.44 and 0.58. The 16,000
# of such pieces that were compared, 0.081, 0.60 and 0.66, were of one file alone, so that what shorter pieces
# gain by themselves is not known. No other model was tried.
_PIECE = 1
_AT_ONCE = 256  # texts that are tokenized together
_SENTENCE_END = re.compile(r"(?<=[.!?]) +")
# How many sentences of lines make a row, one after the other: most one, since a step then sees more means of
# states; a few more, for positions. MiniLM at 1 bit is 0.234 away, on sentences as on paragraphs, where all
# rows are single sentences, and 0.253, on sentences, where half of the tokens are of rows of two and four; of
# dev. No other encoder was tried, nor what the few long rows cost.
_SENTENCES = (1,) * 15 + (4,)


@dataclass(frozen=True)
class Texts:
    """Texts as they were found.

    Attributes:
        columns: one, or two where rows are pairs.
        are_lines: of one file, in which they follow each other.
    """

    columns: list[list[str]]
    where: str
    said: str
    are_lines: bool


def text_rows(
    model: Any, tokenizer: Any, texts: Texts, modality: Modality, wanted: int, length: int | None, seed: int
) -> list[Row]:
    """So many rows of the texts, drawn at random, that they have `wanted` tokens, or all of them.

    Args:
        length: tokens of a row at most.

    Raises:
        DataError: there are too few tokens. SourceError: the tokenizer is of another model.
    """
    length = longest(model, length or _MAX_LENGTH)
    if modality is Modality.CAUSAL:
        return _windows(model, tokenizer, texts, wanted, length, seed)
    return _sentences(model, tokenizer, texts, wanted, length, seed)


def longest(model: Any, length: int) -> int:
    """A length that the model has positions for."""
    return int(min(length, positions_of(model) or length, most_positions(model)))


def prefix_of(tokenizer: Any) -> list[int]:
    """The token of beginning, where the tokenizer puts one in front of texts."""
    return [i for i in tokenizer("")["input_ids"][:1] if i == tokenizer.bos_token_id]


def _windows(model: Any, tokenizer: Any, texts: Texts, wanted: int, length: int, seed: int) -> list[Row]:
    """Windows of one length that follow each other in a stream of pieces, and none of which has padding."""
    pieces = list(_pieces(texts, _PIECE * length))
    found: dict[int, list[int]] = {}
    for some in _by(order_of(len(pieces), seed), _AT_ONCE):
        if sum(map(len, found.values())) >= wanted:
            break
        ids = tokenizer([pieces[i] for i in some], add_special_tokens=False, verbose=False)["input_ids"]
        found |= zip(some, ids, strict=True)
    stream, prefix = [token for i in sorted(found) for token in found[i]], prefix_of(tokenizer)
    step = min(length - len(prefix), max(_LEAST_LENGTH, len(stream) // _LEAST_WINDOWS))
    if len(stream) < _LEAST_WINDOWS * step:
        raise DataError(
            f"{texts.where}: expected at least {_LEAST_WINDOWS * step} tokens of text, found {len(stream)}; "
            "give longer texts"
        )
    n_windows = min(len(stream) // step, -(-wanted // (step + len(prefix))))
    windows = [prefix + stream[i * step : (i + 1) * step] for i in range(n_windows)]
    check_fits(model, {"input_ids": windows})
    return [{"input_ids": torch.tensor(ids)} for ids in windows]


def _pieces(texts: Texts, n_characters: int) -> Iterator[str]:
    """Lines together until they are long enough; other texts as they are, and an empty line after each."""
    if not texts.are_lines:
        yield from (text + "\n\n" for text in texts.columns[0])
        return
    lines: list[str] = []
    for line in texts.columns[0]:
        lines.append(line + "\n")
        if sum(map(len, lines)) >= n_characters:
            yield "".join(lines)
            lines = []
    if lines:
        yield "".join(lines)


def _sentences(model: Any, tokenizer: Any, texts: Texts, wanted: int, length: int, seed: int) -> list[Row]:
    """Every text is a row, its end cut off so that it meets others of its length."""
    columns, known = texts.columns, set(inputs_by_name(model))
    if texts.are_lines:
        counts = cycle(_SENTENCES)
        columns = [[piece for line in columns[0] for piece in _cut(line, counts)]]
    rows: list[Row] = []
    n_found = 0
    for some in _by(order_of(len(columns[0]), seed), _AT_ONCE):
        if n_found >= wanted:
            break
        chosen = [[column[i] for i in some] for column in columns]
        inputs = _met(tokenizer, chosen, length)
        check_fits(model, inputs)
        for i in range(len(some)):
            rows.append({n: torch.tensor(ids[i]) for n, ids in inputs.items() if n in known})
            n_found += len(inputs["input_ids"][i])
            if n_found >= wanted:
                break
    return rows


def _met(tokenizer: Any, columns: list[list[str]], length: int) -> dict[str, list[list[int]]]:
    """Tokens of texts, of lengths that others have too; special tokens stay in their places."""
    inputs = tokenized(tokenizer, columns, length)
    for i, ids in enumerate(inputs["input_ids"]):
        if (cut := met_length(len(ids))) < len(ids):
            shorter = tokenized(tokenizer, [[column[i]] for column in columns], cut)
            for name in inputs:
                inputs[name][i] = shorter[name][0]
    return inputs


def _cut(line: str, counts: Iterator[int]) -> Iterator[str]:
    """The sentences of a line, as many at a time as counts say."""
    sentences, start = _SENTENCE_END.split(line.strip()), 0
    while start < len(sentences):
        count = next(counts)
        if piece := " ".join(sentences[start : start + count]).strip():
            yield piece
        start += count


def _by(numbers: Sequence[int], step: int) -> Iterator[Sequence[int]]:
    return (numbers[start : start + step] for start in range(0, len(numbers), step))
