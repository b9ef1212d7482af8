"""A real language model end to end: stories260K, whose weights and text lie in the data folder."""

import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import miracle_hub

DATA = Path(os.environ.get("MIRACLE_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
MODEL, TEXT = DATA / "tinyllama_260k" / "hf", DATA / "tinystories" / "tinystories_sample.txt"


@torch.inference_mode()
def nats_per_token(folder: Path) -> float:
    """Mean loss over 24 windows of 512 tokens that start with BOS."""
    tokens = AutoTokenizer.from_pretrained(MODEL)(TEXT.read_text()[:60_000]).input_ids[1:]
    windows = [[1, *tokens[i : i + 511]] for i in range(0, 24 * 511, 511)]
    ids = torch.tensor(windows)
    return float(AutoModelForCausalLM.from_pretrained(folder).eval()(input_ids=ids, labels=ids).loss)


@pytest.mark.skipif(not MODEL.exists(), reason=f"{MODEL} is absent: set MIRACLE_DATA to the data folder")
def test_a_story_model_keeps_its_loss_at_6_bits_and_degrades_gracefully(tmp_path: Path) -> None:
    dense = nats_per_token(MODEL)
    losses = {}
    for rate in (3, 4, 6):
        miracle_hub.compress(
            MODEL, tmp_path / str(rate), bits_per_weight=rate, progress=False, window_bits=12
        )
        losses[rate] = nats_per_token(tmp_path / str(rate))
    assert losses[6] < dense + 0.02
    assert dense < losses[4] < losses[3] < dense + 1
