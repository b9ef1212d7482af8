"""A sentence encoder beside its dense self: STS-B, and the distance of its embeddings on held-out text."""

from functools import cache
from pathlib import Path

import numpy as np
import torch
from record import DATA
from scipy.stats import rankdata
from sts import embed, read_pairs
from torch import Tensor, nn
from transformers import AutoTokenizer

SENTENCES, QUICK_SENTENCES = 1000, 100


@cache
def sentences(split: str) -> list[str]:
    """1,000 sentences of 4 to 32 words, spread evenly over WikiText-2 (valid for dev, test for test)."""
    name = "valid" if split == "dev" else "test"
    lines = (DATA / "text" / "wikitext-2" / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    paragraphs = [line.strip() for line in lines if line.strip() and not line.startswith(" =")]
    found = [sentence for paragraph in paragraphs for sentence in paragraph.split(" . ")]
    fitting = [sentence for sentence in found if 4 <= len(sentence.split()) <= 32]
    return [fitting[i * len(fitting) // SENTENCES] for i in range(SENTENCES)]


@cache
def _dense_embeddings(dense: nn.Module, folder: Path, split: str) -> Tensor:
    return embeddings(dense, folder, sentences(split))


def embeddings(model: nn.Module, folder: Path, texts: list[str]) -> Tensor:
    """Of sentences, [n, hidden]; see `sts.embed`."""
    return embed(model, AutoTokenizer.from_pretrained(folder), texts)  # pyright: ignore[reportArgumentType]


def measure(model: nn.Module, dense: nn.Module, folder: Path, split: str, quick: bool) -> dict[str, float]:
    """100 × Spearman on STS-B, and mean 1 − cosine to the dense sentence embedding."""
    n = QUICK_SENTENCES if quick else SENTENCES
    there = _dense_embeddings(dense, folder, split)[:n]
    cosine = (there * embeddings(model, folder, sentences(split)[:n])).sum(1)
    return {"spearman": _spearman(model, folder, split), "distance": float(1 - cosine.mean())}


def _spearman(model: nn.Module, folder: Path, split: str) -> float:
    gold, left, right = read_pairs(DATA / "stsb" / f"sts-{split}.csv")
    cosine = (embeddings(model, folder, left) * embeddings(model, folder, right)).sum(1)
    ranks = torch.from_numpy(np.stack([rankdata(gold), rankdata(cosine.numpy())]))
    return 100 * float(torch.corrcoef(ranks)[0, 1])
