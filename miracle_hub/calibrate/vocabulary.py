"""Sequences of a tokenizer's own vocabulary: words as often as their rank lets expect, pieces after words."""

import unicodedata
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from miracle_hub.errors import CalibrationError

# What follows what, and how often a word of a rank comes; measured on MiniLM as in self_made.py: .05,
# .12, 2.7 have .762; .2 of words continued .741, a shift of 20 .720, an exponent of 1.1 .754. Words drawn by
# topic, near each other in the embedding, gained nothing (.762).
_CONTINUED = 0.05  # of words have one more piece
_MARKED = 0.12  # of words are followed by a mark
_SHIFT = 2.7  # of the law of Zipf and Mandelbrot: 1 / (rank + shift)
_STARTS = "Ġ▁"  # with which tokenizers mark a word's start
_CONTINUES = "##"  # with which WordPiece marks all other pieces


@dataclass(frozen=True)
class Vocabulary:
    """Ids of a tokenizer by what they are, the frequent ones first.

    Attributes:
        words: that begin one; continuations: that go on with one; marks: of punctuation.
        before, after: special tokens around a text.
    """

    words: Int64[Tensor, " words"]
    continuations: Int64[Tensor, " continuations"]
    marks: Int64[Tensor, " marks"]
    before: tuple[int, ...]
    after: tuple[int, ...]

    @classmethod
    def of(cls, tokenizer: Any) -> "Vocabulary":
        """Ids of a vocabulary are sorted by frequency, nearly, whoever trained it; special ones are none.

        Raises:
            CalibrationError: it has no words.
        """
        special = set(tokenizer.all_special_ids)
        tokens = [(i, str(t)) for i, t in enumerate(tokenizer.convert_ids_to_tokens(range(len(tokenizer))))]
        starts = {mark for mark in _STARTS if any(token.startswith(mark) for _, token in tokens)}
        kinds: dict[str, list[int]] = {"word": [], "continuation": [], "mark": []}
        for i, token in tokens:
            if i not in special and (kind := _kind(token, starts)):
                kinds[kind].append(i)
        if not kinds["word"]:
            raise CalibrationError(
                f"tokenizer: expected words in its vocabulary to make texts of, found none in {len(tokens)} "
                "tokens; give data (--calibrate DATA)"
            )
        before, after = _around(tokenizer, kinds["word"][0])
        words, continuations, marks = (torch.tensor(ids, dtype=torch.long) for ids in kinds.values())
        return cls(words, continuations, marks, before, after)

    def drawn(self, rows: int, length: int, generator: torch.Generator) -> Int64[Tensor, "rows length"]:
        """Rows of special tokens around words, pieces of words and marks."""
        n = max(1, length - len(self.before) - len(self.after))
        kinds = torch.rand((rows, n), generator=generator)
        ids = _of(self.words, self._often, (rows, n), generator)
        follows = torch.arange(n) > 0
        if len(self.continuations):
            ids = torch.where(
                follows & (kinds < _CONTINUED), _of(self.continuations, None, (rows, n), generator), ids
            )
        if len(self.marks):
            is_mark = follows & (kinds > 1 - _MARKED)
            is_mark[:, 1:] &= ~is_mark[:, :-1]
            ids = torch.where(is_mark, _of(self.marks, zipf(len(self.marks)), (rows, n), generator), ids)
        around = (torch.tensor(x, dtype=torch.long).expand(rows, -1) for x in (self.before, self.after))
        return torch.cat((next(around), ids, next(around)), 1)

    @cached_property
    def _often(self) -> Float[Tensor, " words"]:
        return zipf(len(self.words))


def zipf(n: int) -> Float[Tensor, " n"]:
    """How often the word of every rank comes."""
    return 1 / (torch.arange(n) + 1 + _SHIFT)


def _of(ids: Tensor, weights: Tensor | None, shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    n = shape[0] * shape[1]
    weights = torch.ones(len(ids)) if weights is None else weights
    return ids[torch.multinomial(weights, n, replacement=True, generator=generator)].reshape(shape)


def _kind(token: str, starts: set[str]) -> str | None:
    """What a token is: none of words, pieces and marks are bytes, lone letters and what is not used."""
    is_continued = token.startswith(_CONTINUES) or (bool(starts) and token[:1] not in starts)
    bare = token.removeprefix(_CONTINUES).lstrip(_STARTS)
    if bare and all(unicodedata.category(c).startswith("P") for c in bare):
        return "mark" if bare in ",.'-;:!?\"()" else None
    if not bare.isalnum() or (len(bare) == 1 and bare not in "aiAI"):
        return None
    return "continuation" if is_continued else "word"


def _around(tokenizer: Any, word: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The special tokens that the tokenizer puts before and after a text."""
    special = set(tokenizer.all_special_ids)
    ids = tokenizer(tokenizer.decode([word]))["input_ids"]
    plain = [at for at, i in enumerate(ids) if i not in special]
    if not plain:
        return (), ()
    return tuple(ids[: plain[0]]), tuple(ids[plain[-1] + 1 :])
