"""Causal language models beside their dense selves: perplexity, KL, agreement of the likeliest token.

SmolLM2: WikiText-2 in token form (valid for dev, test for test), windows of 512 tokens without a token for a
beginning; and a TinyStories sample whose doubled newlines are made single. stories260K: the same sample as it
is, windows of 512 that begin with BOS; the first 30 windows are test (as in benchmarks/stories.py), the next
30 dev; what follows is left for calibration.
"""

import math
from functools import cache, lru_cache
from pathlib import Path

import torch
from record import DATA
from torch import Tensor, nn
from transformers import AutoTokenizer

WINDOW = 512
# Windows of WikiText-2 that count: 8,176 predicted tokens. The first 4 alone, 2,044, are told beside them.
WINDOWS, FEW_WINDOWS, STORY_WINDOWS = 16, 4, 30
_TINY_STORIES = DATA / "tinystories" / "tinystories_sample.txt"
_WIKITEXT = {
    "dev": DATA / "text" / "wikitext-2" / "valid.txt",
    "test": DATA / "text" / "wikitext-2" / "test.txt",
}


@torch.inference_mode()
def losses(model: nn.Module, dense: nn.Module, windows: Tensor) -> dict[str, Tensor]:
    """Sums per window `[n]`: nats of the text, KL(dense ‖ model), tokens whose likeliest guess is the same.

    `windows` are ids `[n, length]`; every token but the first of each is predicted.
    """
    rows = [_losses_of(model, dense, ids) for ids in windows]
    names = ("nats", "dense_nats", "kl", "same")
    return {name: torch.tensor([row[i] for row in rows]) for i, name in enumerate(names)}


def _losses_of(model: nn.Module, dense: nn.Module, ids: Tensor) -> tuple[float, float, float, int]:
    there = _dense_log_probabilities(dense, tuple(ids.tolist()))
    here = there if model is dense else _log_probabilities(model, ids)
    at = torch.arange(len(ids) - 1), ids[1:]
    kl = float((there.exp() * (there - here)).sum())
    same = int((there.argmax(1) == here.argmax(1)).sum())
    return -float(here[at].sum()), -float(there[at].sum()), kl, same


# Of all windows of one candidate: 2 GB for SmolLM2, and half the time of every further candidate.
@lru_cache(maxsize=WINDOWS + FEW_WINDOWS)
def _dense_log_probabilities(dense: nn.Module, ids: tuple[int, ...]) -> Tensor:
    return _log_probabilities(dense, torch.tensor(ids))


def _log_probabilities(model: nn.Module, ids: Tensor) -> Tensor:
    """Of the next token, [length − 1, vocabulary], in float32."""
    return torch.log_softmax(model(input_ids=ids[None]).logits[0, :-1].float(), 1)


def summary(sums: dict[str, Tensor], predicted: int) -> dict[str, float]:
    """Per token, of sums per window that each predict so many."""
    n = predicted * len(sums["nats"])
    nats, kl, same = (float(sums[name].sum()) / n for name in ("nats", "kl", "same"))
    over = nats - float(sums["dense_nats"].sum()) / n
    return {"perplexity": math.exp(nats), "relative": math.exp(over), "kl": kl, "agreement": 100 * same}


@cache
def wikitext_windows(folder: Path, split: str) -> Tensor:
    """The first windows of WikiText-2, ids [16, 512]."""
    text = _WIKITEXT[split].read_text(encoding="utf-8")[
        : 40 * WINDOWS * WINDOW
    ]  # more than 5 letters a token
    return _cut(AutoTokenizer.from_pretrained(folder)(text, add_special_tokens=False)["input_ids"], WINDOWS)


@cache
def tiny_stories_windows(folder: Path) -> Tensor:
    """The first windows of the sample with single newlines, ids [4, 512]."""
    text = _TINY_STORIES.read_text(encoding="utf-8").replace("\n\n", "\n")
    return _cut(
        AutoTokenizer.from_pretrained(folder)(text, add_special_tokens=False)["input_ids"], FEW_WINDOWS
    )


def _cut(ids: list[int], n: int) -> Tensor:
    return torch.tensor(ids[: n * WINDOW]).reshape(n, WINDOW)


def measure_smollm2(
    model: nn.Module, dense: nn.Module, folder: Path, split: str, quick: bool
) -> dict[str, float]:
    """WikiText-2 over 16 windows, its first 4 alone, and TinyStories."""
    windows = wikitext_windows(folder, split)[: FEW_WINDOWS if quick else WINDOWS]
    sums = losses(model, dense, windows)
    found = summary(sums, WINDOW - 1)
    found["perplexity_2044"] = math.exp(float(sums["nats"][:FEW_WINDOWS].sum()) / FEW_WINDOWS / (WINDOW - 1))
    if not quick:
        stories = summary(losses(model, dense, tiny_stories_windows(folder)), WINDOW - 1)
        found |= {f"tinystories_{name}": stories[name] for name in ("perplexity", "kl")}
    return found


@cache
def _story_tokens(folder: Path) -> list[int]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return tokenizer(_TINY_STORIES.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]


@cache
def story_windows(folder: Path, split: str) -> Tensor:
    """30 windows that begin with BOS, ids [30, 512]; dev follows test."""
    tokens, step = _story_tokens(folder), WINDOW - 1
    first = STORY_WINDOWS * (split == "dev")
    starts = range(first * step, (first + STORY_WINDOWS) * step, step)
    return torch.tensor([[1, *tokens[start : start + step]] for start in starts])


def stories_to_calibrate(folder: Path) -> str:
    """The text of the sample that neither split has."""
    return AutoTokenizer.from_pretrained(folder).decode(
        _story_tokens(folder)[2 * STORY_WINDOWS * (WINDOW - 1) :]
    )


def measure_stories(
    model: nn.Module, dense: nn.Module, folder: Path, split: str, quick: bool
) -> dict[str, float]:
    """TinyStories in windows that begin with BOS."""
    windows = story_windows(folder, split)[: FEW_WINDOWS if quick else STORY_WINDOWS]
    return summary(losses(model, dense, windows), WINDOW - 1)
