"""`fit` where a tokenizer has no pad token, texts have no token or too many, and losses are not finite."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTModel,
)

import miracle_hub
from miracle_hub.errors import DataError, MiracleError, SourceError, TrainingError
from miracle_hub.evaluate.data import Split
from miracle_hub.finetune.tasks import language_model
from miracle_hub.training.config import PARAMETRIZATIONS

pytest.importorskip("datasets", reason="fit needs the package datasets: pip install '.[fit]'")
WORDS = ["<unk>", "<eos>", "a", "b", "good", "bad"]


def tokenizer(**special: str) -> PreTrainedTokenizerFast:
    made = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    made.pre_tokenizer = Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    return PreTrainedTokenizerFast(tokenizer_object=made, **special)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny GPT-2, whose tokenizer has no pad token, as GPT-2's own has none."""
    folder = tmp_path_factory.mktemp("gpt2")
    tokenizer(eos_token="<eos>").save_pretrained(folder)
    torch.manual_seed(0)
    sizes: dict[str, Any] = dict(n_positions=16, n_embd=8, n_layer=1, n_head=2)
    GPT2LMHeadModel(
        GPT2Config(vocab_size=len(WORDS), bos_token_id=1, eos_token_id=1, **sizes)
    ).save_pretrained(folder)
    return folder


def data(path: Path, rows: list[tuple[str, int]]) -> Path:
    path.write_text("text\tlabel\n" + "".join(f"{text}\t{label}\n" for text, label in rows))
    return path


ROWS = [("good a b", 1), ("bad", 0)] * 12


def fit(source: Path, out: Path, rows: list[tuple[str, int]], **options: Any) -> Any:
    given = dict(rate=2.0, steps=1, batch_size=4, groups=1, refit_steps=0, max_length=12, progress=False)
    return miracle_hub.fit(source, out, data=data(out.with_name("d.tsv"), rows), **{**given, **options})


def test_a_classifier_without_a_pad_token_pads_under_a_mask_and_says_so(
    source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = fit(source, tmp_path / "out", ROWS)
    assert "it has no pad token; '<eos>' pads texts, under a mask" in caplog.text
    assert found.coded["loss"] == found.coded["loss"]
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    reader: Any = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert model.config.pad_token_id == reader.pad_token_id == WORDS.index("<eos>")
    with torch.no_grad():  # a row feels no padding
        together = model(**reader(["good a b", "bad"], padding=True, return_tensors="pt")).logits
        alone = model(**reader(["bad"], return_tensors="pt")).logits
    assert torch.allclose(together[1], alone[0], atol=1e-5)


def test_the_end_of_a_text_is_learned_though_its_token_pads(source: Path) -> None:
    """And nothing of a corpus but a last token alone is left out."""
    import datasets

    reader: Any = tokenizer(eos_token="<eos>", pad_token="<eos>")
    _, collate, encode = language_model(source, reader, Split(None, None, ("text",), ()), 4)
    rows = encode(datasets.Dataset.from_dict({"text": ["a b <eos>", "good bad a"]}))
    assert rows["input_ids"][:] == [[2, 3, 1, 4], [5, 2]]
    batch = collate([rows[i] for i in range(2)])
    assert batch["labels"].tolist() == [[2, 3, 1, 4], [5, 2, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([("", 0), *ROWS], {}, "column 'text': row 0: expected a text, found none; complete it"),
        ([(" ", 0), *ROWS], {}, "expected a text of at least one token, found none in ' '; complete it"),
        ([("a " * 20, 0), *ROWS], {"max_length": 99}, "at most 16 tokens, as the model has positions, found "
         "one of 20; cut them with --max-length 16"),
        ([("a", 0), ("b", 1)], {"task": "causal-lm"}, "texts of at least two tokens, found none in 1 rows"),
        (ROWS, {"task": "causal-lm", "max_length": 17}, "at most 16 tokens"),
    ],
    ids=["none", "empty", "long", "one token", "long windows"],
)  # fmt: skip
def test_texts_that_the_model_cannot_take_are_refused(
    rows: list[tuple[str, int]], options: dict[str, Any], message: str, source: Path, tmp_path: Path
) -> None:
    with pytest.raises(DataError) as raised:
        fit(source, tmp_path / "out", rows, **options)
    assert message in str(raised.value) and not (tmp_path / "out").exists()


def test_a_model_without_a_tokenizer_or_a_token_to_pad_with_is_refused(source: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    AutoModelForCausalLM.from_pretrained(source).save_pretrained(bare)
    with pytest.raises(SourceError, match="expected a tokenizer beside the model, found none of"):
        fit(bare, tmp_path / "out", ROWS)
    tokenizer().save_pretrained(bare)
    with pytest.raises(
        SourceError, match="expected a pad token, found none, nor one of end, beginning or unk"
    ):
        fit(bare, tmp_path / "out", ROWS)


@pytest.mark.parametrize("parametrization", PARAMETRIZATIONS)
def test_a_fit_whose_loss_is_not_finite_writes_nothing(
    parametrization: str, source: Path, tmp_path: Path
) -> None:
    with pytest.raises(TrainingError, match="expected (a finite|finite weights)"):
        fit(source, tmp_path / "out", ROWS, parametrization=parametrization, learning_rate=1e38, steps=3)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["transformer.h.0.mlp.c_fc.weight", "transformer.ln_f.bias"])
def test_a_source_that_is_not_finite_is_refused(name: str, source: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(source)
    model.state_dict()[name].view(-1)[0] = float("nan")
    model.save_pretrained(tmp_path / "bad")
    AutoTokenizer.from_pretrained(source).save_pretrained(tmp_path / "bad")
    with pytest.raises(MiracleError, match="expected finite weights, found 1 of "):
        fit(tmp_path / "bad", tmp_path / "out", ROWS)
    assert not (tmp_path / "out").exists()


def test_a_model_that_is_none_for_the_task_or_has_other_classes_is_named(
    source: Path, tmp_path: Path
) -> None:
    rows = [("a film", 0), ("the movie", 1), ("very nice", 2)] * 8
    ViTModel(ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2)).save_pretrained(
        tmp_path / "vit"
    )
    tokenizer(eos_token="<eos>").save_pretrained(tmp_path / "vit")
    with pytest.raises(SourceError, match="expected a model that AutoModelForSeq.* loads, found none"):
        fit(tmp_path / "vit", tmp_path / "out", rows)
    head = AutoModelForSequenceClassification.from_pretrained(source, num_labels=2)
    head.save_pretrained(tmp_path / "head")
    tokenizer(eos_token="<eos>").save_pretrained(tmp_path / "head")
    with pytest.raises(SourceError, match="expected a head for the 3 classes .* found one of another"):
        fit(tmp_path / "head", tmp_path / "out", rows)
    assert not (tmp_path / "out").exists()
