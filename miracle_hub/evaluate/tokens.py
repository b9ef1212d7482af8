"""What a causal language model says of the tokens of texts: each is predicted once, from those before it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float64, Int64
from torch import Tensor, nn
from tqdm import tqdm

from miracle_hub.errors import DataError, OptionError, SourceError
from miracle_hub.evaluate.asked import are_close
from miracle_hub.evaluate.batches import equal_lengths

# Windows of one length at a time, and logits: choices that bound memory.
_BATCH = 16
_LOGITS = 1 << 26


@dataclass(frozen=True)
class Said:
    """What a model said of texts.

    Attributes:
        probabilities: of the tokens that came, but for every text's first one; windows by their lengths.
        is_repeated: which of them are of texts that repeat an earlier one, of which there are so many.
        vocabulary: tokens that the model chooses among.
        window: tokens of the longest windows that there could be.
    """

    probabilities: Float64[Tensor, " tokens"]
    is_repeated: Bool[Tensor, " tokens"]
    repeated_texts: int
    vocabulary: int
    window: int


@torch.inference_mode()
def token_probabilities(
    model: nn.Module,
    tokenizer: Any,
    texts: Sequence[str],
    max_length: int,
    where: str,
    *,
    known: Sequence[str] = (),
    progress: bool,
) -> Said:
    """The probability of every token given those before it in its window.

    Texts are cut into windows of `max_length` tokens, or of as many as the model has positions, that share
    one: every token but a text's first is predicted once.

    Args:
        known: texts that count as earlier ones.

    Raises:
        OptionError: windows are too short.
        DataError: there is no token to predict.
        SourceError: an answer depends on later tokens, on other rows, or changes from call to call.
    """
    length = _length(model, max_length)
    tokens = [list(ids) for ids in tokenizer(list(texts), verbose=False)["input_ids"]]
    again = _repeated(tokens, tokenizer(list(known), verbose=False)["input_ids"] if known else ())
    windows = [(w, again[text]) for text, ids in enumerate(tokens) for w in _windows(ids, length)]
    if not windows:
        raise DataError("data: expected texts of two tokens or more, found none; give longer texts")
    inputs, flags = {"input_ids": [ids for ids, _ in windows]}, torch.tensor([flag for _, flag in windows])
    found, repeated, ask = [], [], _Ask(model, where)
    with tqdm(total=len(windows), unit="windows", desc="certify", disable=not progress) as bar:
        for rows, batch in equal_lengths(inputs, _step(model, length)):
            p = _of_next(ask.twice(batch["input_ids"]), batch["input_ids"])
            found.append(p.flatten())
            repeated.append(flags[rows, None].expand_as(p).flatten())
            bar.update(len(rows))
    return Said(torch.cat(found), torch.cat(repeated), sum(again), ask.vocabulary, length)


def _length(model: Any, max_length: int) -> int:
    if not isinstance(max_length, int) or isinstance(max_length, bool) or max_length < 2:
        raise OptionError(
            f"max_length: expected 2 tokens of a window or more, one to predict from the other, found "
            f"{max_length!r}; choose another length (--max-length)"
        )
    return min(max_length, getattr(model.config, "max_position_embeddings", None) or max_length)


def _step(model: Any, length: int) -> int:
    """Windows that are asked together."""
    return max(1, min(_BATCH, _LOGITS // (length * getattr(model.config, "vocab_size", 1))))


def _repeated(texts: list[list[int]], known: Sequence[list[int]]) -> list[bool]:
    """Which texts are equal to a known one, or to an earlier one."""
    seen: set[tuple[int, ...]] = set(map(tuple, known))
    found = []
    for ids in map(tuple, texts):
        found.append(ids in seen)
        seen.add(ids)
    return found


def _windows(ids: list[int], length: int) -> Iterator[list[int]]:
    """Pieces that share one token, of which each has one at least to predict."""
    return (ids[start : start + length] for start in range(0, len(ids) - 1, length - 1))


def _of_next(logits: Tensor, ids: Int64[Tensor, "rows length"]) -> Float64[Tensor, "rows predicted"]:
    """Probabilities of the tokens that came; NaN where a model says none."""
    pairs = zip(logits[:, :-1], ids[:, 1:, None].to(logits.device), strict=True)
    return torch.stack([row.double().softmax(-1).gather(1, came)[:, 0].cpu() for row, came in pairs])


class _Ask:
    """Asks for every window twice: with other rows in another order, and with other tokens at its end."""

    def __init__(self, model: Any, where: str) -> None:
        self.model, self.where, self.number, self.vocabulary = model, where, 0, 0
        model.config.use_cache = False  # nothing is generated

    def twice(self, ids: Int64[Tensor, "rows length"]) -> Float64[Tensor, "rows length vocabulary"]:
        """
        Raises:
            SourceError: an answer depends on later tokens, on other rows, or changes from call to call.
        """
        first = self._logits(ids)
        self.number += 1
        cut = 1 + self.number % (ids.shape[1] - 1)
        other = torch.cat((ids[:, :cut], (ids[:, cut:] + 1) % self.vocabulary), 1)
        parts = other.flip(0).split(-(-len(ids) // 2))
        second = torch.cat([self._logits(part) for part in parts]).flip(0)
        if not are_close(first[:, :cut], second[:, :cut]):
            self._refuse(ids, first, cut)
        return first

    def _logits(self, ids: Tensor) -> Tensor:
        logits = self.model(input_ids=ids.to(self.model.device)).logits
        if logits.ndim != 3 or logits.shape[:2] != ids.shape or self.vocabulary not in (0, logits.shape[2]):
            raise SourceError(
                f"{self.where}: expected logits [rows, tokens, vocabulary] of a causal language model, "
                f"found {list(logits.shape)} for {list(ids.shape)} tokens; certify a model that predicts "
                "every token"
            )
        self.vocabulary = logits.shape[2]
        return logits

    def _refuse(self, ids: Tensor, first: Tensor, cut: int) -> None:
        halves = torch.cat([self._logits(part) for part in ids.flip(0).split(-(-len(ids) // 2))]).flip(0)
        what = "change from one call to the next"
        if are_close(first, self._logits(ids)):
            what = f"depend on tokens after position {cut}"
            if not are_close(first, halves):
                what = "depend on the other rows of a batch"
        raise SourceError(
            f"{self.where}: expected predictions from the tokens before alone, found some that {what}; "
            "certify a causal language model, without noise"
        )
