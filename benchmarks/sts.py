"""STS-B sentence similarity of a BERT-like encoder: the task behind benchmarks/minilm.py and the demo.

STS-B is read from the data folder (MIRACLE_DATA, else ../shared/data); nothing is downloaded.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor
from transformers import AutoModel, AutoTokenizer, PreTrainedModel

_BATCH = 128


def read_pairs(path: Path) -> tuple[np.ndarray, list[str], list[str]]:
    """Gold scores and the two sentences: tab-separated columns 4, 5, 6, no quoting."""
    rows = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()]
    return np.array([float(row[4]) for row in rows]), [r[5] for r in rows], [r[6] for r in rows]


@torch.inference_mode()
def embed(model: PreTrainedModel, tokenizer: Any, sentences: list[str]) -> Tensor:
    """Sentence embeddings [n, hidden]: mean over the mask, then L2 norm."""
    by_length = sorted(range(len(sentences)), key=lambda i: len(sentences[i]))
    out = torch.empty(len(sentences), model.config.hidden_size)
    for start in range(0, len(sentences), _BATCH):
        picked = by_length[start : start + _BATCH]
        batch = tokenizer(
            [sentences[i] for i in picked], padding=True, truncation=True, max_length=256, return_tensors="pt"
        )
        hidden, mask = model(**batch).last_hidden_state, batch["attention_mask"][..., None]
        pooled = (hidden * mask).sum(1) / mask.sum(1)
        out[picked] = torch.nn.functional.normalize(pooled, dim=1)
    return out


def spearman(folder: str | Path, pairs: Path) -> float:
    """100 × Spearman correlation of cosine similarity with the gold scores."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder).eval()
    gold, left, right = read_pairs(pairs)
    cosine = (embed(model, tokenizer, left) * embed(model, tokenizer, right)).sum(1)
    ranks = torch.from_numpy(np.stack([rankdata(gold), rankdata(cosine.numpy())]))
    return 100 * float(torch.corrcoef(ranks)[0, 1])
