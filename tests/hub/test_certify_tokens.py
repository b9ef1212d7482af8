"""Certificates of causal language models: every token is counted once, from what comes before it alone."""

import json
import math
import os
import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, BertTokenizer, LlamaConfig, LlamaForCausalLM

import miracle_hub
from miracle_hub import TokenCertificate
from miracle_hub.errors import DataError, OptionError, SourceError
from miracle_hub.evaluate.tokens import token_probabilities

pytest.importorskip("datasets", reason="certify needs the package datasets: pip install '.[fit]'")
WORDS = ["good", "bad", "film", "a", "the", "very", "movie", "is", "awful", "nice"]
DATA = Path(os.environ.get("MIRACLE_DATA", Path(__file__).parents[3] / "shared" / "data"))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with tied embeddings and a tokenizer of words, compressed."""
    dense, out = tmp_path_factory.mktemp("llama"), tmp_path_factory.mktemp("compressed") / "llama"
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (dense / "vocab.txt").write_text("\n".join(vocabulary))
    BertTokenizer(str(dense / "vocab.txt")).save_pretrained(dense)
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=15,
        max_position_embeddings=64, tie_word_embeddings=True, initializer_range=0.5,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(dense)
    miracle_hub.compress(dense, out, bits_per_weight=7, window_bits=8, progress=False)
    return out


def texts(n: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(1, 9))) for _ in range(n)]


def lines(path: Path, found: list[str]) -> Path:
    path.write_text("\n".join(found) + "\n")
    return path


def costs(source: Path, found: list[str], alpha: float, length: int) -> list[float]:
    """By plain transformers, a window at a time."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(source), AutoTokenizer.from_pretrained(source)
    nats = []
    for text in found:
        ids = tokenizer(text)["input_ids"]
        for i in range(1, len(ids)):
            start = (i - 1) // (length - 1) * (length - 1)
            with torch.no_grad():
                logits = model(torch.tensor([ids[start:i]])).logits[0, -1]
            p = float(logits.double().softmax(0)[ids[i]])
            nats.append(-math.log((1 - alpha) * p + alpha / 15))
    return nats


@pytest.mark.parametrize("length", [4, 64])
@pytest.mark.parametrize("fitted", [True, False])
def test_every_token_but_a_texts_first_is_counted_once(
    fitted: bool, length: int, source: Path, tmp_path: Path
) -> None:
    given = list(dict.fromkeys(texts(12)))
    data = lines(tmp_path / "t.txt", given)
    found = miracle_hub.certify(source, data=data, fitted=fitted, max_length=length, progress=False)
    assert isinstance(found, TokenCertificate)
    expected = costs(source, given, found.alpha, length)
    assert found.tokens == len(expected) == sum(len(text.split()) + 1 for text in given)
    assert found.nats_per_token == pytest.approx(sum(expected) / len(expected), abs=1e-5)
    assert (found.texts, found.repeated, found.vocabulary) == (len(given), 0, 15)
    assert found.n_bytes == (source / "model.safetensors").stat().st_size
    assert found.is_vacuous == fitted or found.bound > found.nats_per_token


def test_the_order_of_texts_changes_nothing_and_copies_are_counted(source: Path, tmp_path: Path) -> None:
    given = list(dict.fromkeys(texts(20)))

    def of(some: list[str]) -> Any:
        return miracle_hub.certify(source, data=lines(tmp_path / "t.txt", some), fitted=False, progress=False)

    once, reversed_order, copies = of(given), of(given[::-1]), of(given * 2)
    assert reversed_order.bound == pytest.approx(once.bound, abs=1e-9)
    assert (copies.texts, copies.repeated) == (2 * len(given), len(given))
    assert copies.bound == pytest.approx(once.bound, abs=1e-9)


def test_texts_that_were_in_training_are_counted(source: Path, tmp_path: Path) -> None:
    given = list(dict.fromkeys(texts(20)))
    data, seen = lines(tmp_path / "t.txt", given), lines(tmp_path / "s.txt", given[:7])
    found: Any = miracle_hub.certify(source, data=data, training=seen, fitted=False, progress=False)
    rest: Any = miracle_hub.certify(
        source, data=lines(tmp_path / "r.txt", given[7:]), fitted=False, progress=False
    )
    assert found.repeated == 7 and found.bound >= rest.bound - 1e-9


def test_two_columns_of_text_are_refused(source: Path, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("first,second\na film,the movie\n")
    options: dict[str, Any] = dict(data=tmp_path / "t.csv", text_columns=["first", "second"])
    with pytest.raises(DataError, match="expected one column of text, .* found .'first', 'second'"):
        miracle_hub.certify(source, **options, fitted=True, progress=False)


def test_windows_are_no_longer_than_the_model_and_the_statement_says_how_long(
    source: Path, tmp_path: Path
) -> None:
    data = lines(tmp_path / "t.txt", [" ".join(texts(30))])
    found = [
        miracle_hub.certify(source, data=data, fitted=False, max_length=n, progress=False) for n in (64, 128)
    ]
    assert found[0] == found[1] and " in windows of 64, at " in found[0].statement


def test_the_command_line_certifies_a_language_model(run: Any, source: Path, tmp_path: Path) -> None:
    data = lines(tmp_path / "t.txt", texts(9))
    status, out, _ = run("certify", source, "--data", data, "--held-out", "--no-progress")
    found = miracle_hub.certify(source, data=data, fitted=False, progress=False)
    shown = f"{source}: {found.n_bytes:,} bytes, sha256 {found.sha256}\n{found.statement}\n"
    assert (status, out) == (0, shown)


@pytest.mark.parametrize(
    ("flags", "what"),
    [((), "neither"), (("--fitted", "--held-out"), "--fitted and --held-out")],
)
def test_both_flags_are_named_where_not_exactly_one_is_given(
    flags: tuple[str, ...], what: str, run: Any, source: Path
) -> None:
    """The parser alone would take the last of two, and ask for the first of none."""
    status, out, err = run("certify", source, "--data", "d.tsv", *flags)
    err = " ".join(err.split()).replace("│ ", "").replace(" │", "")
    assert status == 2 and out == ""
    assert "expected either --fitted" in err and "--held-out (it was not)" in err
    assert f"found {what}; give one of them" in err


@pytest.mark.parametrize("length", [0, 1, True, 2.5])
def test_a_window_without_anything_to_predict_is_refused(length: Any, source: Path, tmp_path: Path) -> None:
    data = lines(tmp_path / "t.txt", texts(3))
    with pytest.raises(OptionError, match=r"max_length: expected 2 tokens .* found .*--max-length"):
        miracle_hub.certify(source, data=data, fitted=True, max_length=length, progress=False)


class Model(nn.Module):
    """Logits by the token before, plus whatever `also` makes of tokens and logits."""

    def __init__(self, also: Any) -> None:
        super().__init__()
        self.table, self.also, self.device = nn.Embedding(11, 11), also, torch.device("cpu")
        self.config, self.calls = SimpleNamespace(vocab_size=11), 0

    def forward(self, input_ids: Tensor) -> Any:
        self.calls += 1
        logits = self.table(input_ids)
        return SimpleNamespace(logits=self.also(self, input_ids, logits))


def said(also: Any, given: list[list[int]]) -> Any:
    def tokenizer(some: list[str], **_: Any) -> dict[str, Any]:
        return {"input_ids": [given[int(text)] for text in some]}

    torch.manual_seed(0)
    numbers = [str(i) for i in range(len(given))]
    return token_probabilities(Model(also), tokenizer, numbers, 8, "here", progress=False)


TEXTS = [[i % 11, (3 * i + j) % 11, (i * j) % 11, j, 7, i % 5] for i in range(9) for j in range(2)]


@pytest.mark.parametrize(
    ("also", "what"),
    [
        (lambda m, ids, z: z + 9 * nn.functional.one_hot(ids.roll(-1, 1), 11), "depend on tokens after"),
        (lambda m, ids, z: z + ids.float().mean(1)[:, None, None] * z.sin(), "depend on tokens after"),
        (lambda m, ids, z: z - z.mean((0, 1)), "depend on"),
        (lambda m, ids, z: z + torch.arange(len(z))[:, None, None] * z.sin(), "depend on the other rows"),
        (lambda m, ids, z: nn.functional.dropout(z, 0.2), "change from one call to the next"),
        (lambda m, ids, z: z * (1 + 0.1 * m.calls), "change from one call to the next"),
    ],
    ids=["next token", "whole text", "batch", "place", "dropout", "calls"],
)
def test_predictions_from_more_than_the_tokens_before_are_refused(also: Any, what: str) -> None:
    with pytest.raises(SourceError, match=f"here: expected predictions from the tokens before alone.*{what}"):
        said(also, TEXTS)


def test_predictions_from_the_tokens_before_are_taken() -> None:
    found = said(lambda m, ids, z: z.cumsum(1), TEXTS)
    assert found.probabilities.shape == (5 * len(TEXTS),) and found.vocabulary == 11
    assert found.repeated_texts == len(TEXTS) - len({tuple(t) for t in TEXTS})
    assert int(found.is_repeated.sum()) == 5 * found.repeated_texts


def test_texts_of_one_token_have_nothing_to_predict() -> None:
    with pytest.raises(
        DataError, match="expected texts of two tokens or more, found none; give longer texts"
    ):
        said(lambda m, ids, z: z, [[1], [], [2]])


def test_a_model_that_gives_no_logits_per_token_is_refused() -> None:
    with pytest.raises(SourceError, match=r"expected logits \[rows, tokens, vocabulary\]"):
        said(lambda m, ids, z: z[:, 0], TEXTS)


def test_a_model_that_reads_both_ways_is_no_causal_one(source: Path, tmp_path: Path) -> None:
    """The architecture's name is no proof."""
    out = tmp_path / "out"
    out.mkdir()
    for file in source.iterdir():
        (out / file.name).write_bytes(file.read_bytes())
    config = json.loads((out / "config.json").read_text())
    del config["quantization_config"]["guard"]["config"]
    (out / "config.json").write_text(json.dumps({**config, "architectures": ["LlamaModel"]}))
    with pytest.raises(SourceError, match="or the next token .…ForCausalLM., found .'LlamaModel'."):
        miracle_hub.certify(out, data=lines(tmp_path / "t.txt", texts(3)), fitted=True, progress=False)


def test_a_real_model_of_tokens_is_certified_on_texts_that_it_never_saw(tmp_path: Path) -> None:
    """stories260K at 4 bits, on 150 lines of Shakespeare: far from sure, and far from guessing."""
    model, text = DATA / "tinyllama_260k" / "hf", DATA / "text" / "tinyshakespeare.txt"
    if not model.is_dir() or not text.is_file():
        pytest.skip(f"no stories260K or Shakespeare in {DATA}; set MIRACLE_DATA")
    out = tmp_path / "out"
    miracle_hub.compress(model, out, bits_per_weight=4, window_bits=8, progress=False)
    data = lines(tmp_path / "t.txt", [s for s in text.read_text().splitlines() if s.strip()][:150])
    found: Any = miracle_hub.certify(out, data=data, fitted=False, progress=False)
    assert 3.5 < found.nats_per_token < found.bound < 5.5 < math.log(512) and not found.is_vacuous
    assert replace(found, fitted=True).is_vacuous  # a million bits for some thousand tokens
