"""Tiny models beside tokenizers of a few words, and texts for them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, processors
from tokenizers.models import WordPiece
from tokenizers.pre_tokenizers import BertPreTokenizer
from transformers import (
    AutoConfig,
    PreTrainedTokenizerFast,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)

from tests.sweep.tiny import filled

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ",", ".", "a", "the", "of", "cat", "dog", "sat", "on"]
WORDS += ["mat", "hat", "ran", "far", "away", "home", "red", "blue", "##s", "##ed", "##ing"]
SIZES: dict[str, Any] = dict(
    hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=len(WORDS),
    max_position_embeddings=32, bos_token_id=2, eos_token_id=3, pad_token_id=0, d_model=8, encoder_layers=1,
    decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=16,
    decoder_ffn_dim=16, image_size=16, patch_size=8, num_key_value_heads=1, head_dim=4,
)  # fmt: skip
# Texts that all differ, from four words to a dozen.
TEXTS = [" ".join(WORDS[7 + (i * k + k * k) % 15] for k in range(1, 5 + i % 9)) + "." for i in range(200)]


def tokenizer(has_ends: bool = True) -> PreTrainedTokenizerFast:
    """Of the words above; with a token before and one after every text, or none."""
    made: Any = Tokenizer(WordPiece({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    made.pre_tokenizer = BertPreTokenizer()
    if has_ends:
        made.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    special = {name: f"[{name[:-6].upper()}]" for name in ("pad_token", "unk_token", "mask_token")}
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="[CLS]", eos_token="[SEP]", cls_token="[CLS]", sep_token="[SEP]",
        **special,
    )  # fmt: skip


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., tuple[Any, Path]]:
    """A tiny model of a class of transformers, and its folder, with a tokenizer."""

    def make(cls: Any, **also: Any) -> tuple[Any, Path]:
        torch.manual_seed(0)
        known = vars(cls.config_class())
        sizes = {name: value for name, value in SIZES.items() if name in known} | also
        model = filled(cls(cls.config_class(**sizes))).eval()
        folder = tmp_path / cls.__name__
        model.save_pretrained(folder)
        tokenizer(has_ends="CausalLM" not in cls.__name__).save_pretrained(folder)
        assert AutoConfig.from_pretrained(folder).architectures == [cls.__name__]
        return model, folder

    return make


@pytest.fixture(autouse=True)
def one_thread(one_torch_thread: None) -> None:
    """Threads of tiny models wait for each other most of the time."""


@pytest.fixture
def speech(saved: Callable[..., tuple[Any, Path]]) -> tuple[Any, Path]:
    """A tiny model that hears one second."""
    model, folder = saved(
        WhisperForConditionalGeneration, num_mel_bins=80, decoder_start_token_id=2, max_source_positions=50
    )
    WhisperFeatureExtractor(chunk_length=1).save_pretrained(folder)
    return model, folder


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "texts.txt"
    path.write_text("\n".join(TEXTS) + "\n", encoding="utf-8")
    return path
