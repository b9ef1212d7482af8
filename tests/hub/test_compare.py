"""Two models on the same data: what `compare` says is what their outputs say."""

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import kl_div, log_softmax
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertTokenizer,
)

import miracle_hub
from miracle_hub.errors import DataError, PickleRefusedError, SourceError

from .conftest import random_model

datasets = pytest.importorskip("datasets", reason="compare reads texts with datasets: pip install '.[fit]'")
WORDS = [f"w{i}" for i in range(59)]
TEXTS = [" ".join(WORDS[(3 * i + 7 * j) % 59] for j in range(2 + i % 9)) for i in range(40)]
AUTO: dict[str, Any] = {
    "bert-classifier": AutoModelForSequenceClassification,
    "bert-masked-lm": AutoModelForMaskedLM,
    "llama": AutoModelForCausalLM,
    "vit": AutoModelForImageClassification,
    "bert": AutoModel,
}
Pair = tuple[Path, Path]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Pair]:
    """A dense model with its tokenizer, and its compressed folder, made once."""
    made: dict[str, Pair] = {}

    def make(name: str) -> Pair:
        if name not in made:
            root = tmp_path_factory.mktemp(name)
            model: Any = random_model("bert-masked-lm" if name == "bert" else name, torch.float32)
            for parameter in model.parameters():
                parameter.data *= 4  # so that answers differ
            (model.base_model if name == "bert" else model).save_pretrained(root / "dense")
            (root / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
            if name != "vit":
                BertTokenizer(str(root / "vocab.txt")).save_pretrained(root / "dense")
            miracle_hub.compress(
                root / "dense", root / "small", bits_per_weight=5, window_bits=8, progress=False
            )
            made[name] = (root / "dense", root / "small")
        return made[name]

    return make


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    (tmp_path / "texts.txt").write_text("\n".join([*TEXTS, "", "   "]))
    return tmp_path / "texts.txt"


def compare(pair: Pair, data: Path, **options: Any) -> miracle_hub.Comparison:
    return miracle_hub.compare(*pair, data=data, progress=False, **options)


def file_bytes(folder: Path) -> int:
    return (folder / "model.safetensors").stat().st_size


def outputs(pair: Pair, name: str, text: str, **changed: torch.Tensor) -> list[Any]:
    """What plain from_pretrained answers to one text."""
    inputs = {**tokenizer_of(pair[0])(text, return_tensors="pt"), **changed}
    if name == "llama":
        inputs.pop("token_type_ids", None)
    with torch.no_grad():
        return [model_of(name, folder)(**inputs) for folder in pair]


@functools.cache
def tokenizer_of(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


@functools.cache
def model_of(name: str, folder: Path) -> Any:
    return AUTO[name].from_pretrained(folder)


def figures(logits: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[int, int, float]:
    """Predictions, changes and mean KL, over pairs of logits [predictions, classes]."""
    a, b = (torch.cat(column).double() for column in zip(*logits, strict=True))
    kl = kl_div(log_softmax(b, 1), log_softmax(a, 1), reduction="none", log_target=True).sum(1)
    return len(a), int((a.argmax(1) != b.argmax(1)).sum()), float(kl.mean())


def test_a_classifier_is_compared_by_its_classes(pairs: Any, texts: Path) -> None:
    pair = pairs("bert-classifier")
    logits = [tuple(o.logits for o in outputs(pair, "bert-classifier", text)) for text in TEXTS]
    n, changes, kl = figures(logits)
    found = compare(pair, texts)
    assert (found.task, found.rows, found.predictions, found.changes) == ("class of a text", 40, n, changes)
    assert found.kl_nats == pytest.approx(kl, rel=1e-4) and kl > 1e-4 and found.cosine is None
    assert (found.bytes_a, found.bytes_b) == (file_bytes(pair[0]), file_bytes(pair[1]))
    assert found.agreement == 1 - changes / 40


def test_a_model_agrees_with_itself(pairs: Any, texts: Path) -> None:
    dense, small = pairs("bert-classifier")
    found = compare((small, small), texts)
    assert found.agreement == 1 and found.kl_nats == 0
    back = dense.with_name("back")
    miracle_hub.decompress(small, back, progress=False)
    found = compare((small, back), texts)
    assert found.agreement == 1 and found.kl_nats == pytest.approx(0, abs=1e-9)


def test_a_language_model_is_compared_at_every_token(pairs: Any, texts: Path) -> None:
    pair = pairs("llama")
    logits = [tuple(o.logits[0] for o in outputs(pair, "llama", text)) for text in TEXTS]
    n, changes, kl = figures(logits)
    found = compare(pair, texts)
    assert (found.task, found.rows, found.predictions, found.changes) == ("next token", 40, n, changes)
    assert found.kl_nats == pytest.approx(kl, rel=1e-4)


def test_a_masked_model_is_compared_where_a_token_is_hidden(pairs: Any, texts: Path) -> None:
    pair, logits = pairs("bert-masked-lm"), []
    tokenizer = tokenizer_of(pair[0])
    for text in TEXTS:
        tokens = tokenizer(text, return_tensors="pt")["input_ids"]
        at = [i for i in range(1, tokens.shape[1] - 1, 7)]
        tokens[0, at] = tokenizer.mask_token_id
        logits.append(tuple(o.logits[0, at] for o in outputs(pair, "bert-masked-lm", text, input_ids=tokens)))
    n, changes, kl = figures(logits)
    found = compare(pair, texts)
    assert (found.task, found.predictions, found.changes) == ("masked token", n, changes) and n > 40
    assert found.kl_nats == pytest.approx(kl, rel=1e-4)


def test_embeddings_are_compared_by_their_cosine(pairs: Any, texts: Path) -> None:
    pair = pairs("bert")
    cosines = []
    for text in TEXTS:
        a, b = (o.last_hidden_state[0].double().mean(0) for o in outputs(pair, "bert", text))
        cosines.append(float(a @ b / a.norm() / b.norm()))
    found = compare(pair, texts)
    assert (found.task, found.rows) == ("embedding", 40) and found.changes is found.kl_nats is None
    assert found.cosine == pytest.approx(sum(cosines) / 40, rel=1e-6) and sum(cosines) < 40 * 0.9999


def test_columns_of_tables_are_texts(pairs: Any, texts: Path, tmp_path: Path) -> None:
    pair = pairs("bert-classifier")
    expected = compare(pair, texts)
    (tmp_path / "t.csv").write_text("label,text\n" + "".join(f"1,{text}\n" for text in TEXTS))
    lines = [json.dumps({"first": text, "label": "positive"}) for text in TEXTS]
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    for name in ("t.csv", "t.jsonl"):
        assert compare(pair, tmp_path / name) == expected
    (tmp_path / "pairs.csv").write_text("a,b\n" + "".join(f"{text},{text}\n" for text in TEXTS))
    assert compare(pair, tmp_path / "pairs.csv") != expected
    assert compare(pair, tmp_path / "pairs.csv", text_columns=["b"]) == expected


def images(folder: Path) -> Path:
    """Twenty images, in a folder with one below it."""
    (folder / "more").mkdir(parents=True)
    numbers = np.random.default_rng(0).integers(0, 256, (20, 16, 16, 3), np.uint8)
    for i, pixels in enumerate(numbers):
        Image.fromarray(pixels).save(folder / ("more" if i % 2 else ".") / f"{i}.png")
    return folder


def test_images_are_compared_as_the_processor_prepares_them(pairs: Any, tmp_path: Path) -> None:
    dense, small = pairs("vit")
    folder = images(tmp_path / "images")
    with pytest.raises(SourceError, match="found no preprocessor_config.json"):
        compare((dense, small), folder)
    config = {"image_processor_type": "ViTImageProcessor", "size": {"height": 16, "width": 16}}
    for path in (dense, small):
        (path / "preprocessor_config.json").write_text(json.dumps(config))
    found = compare((dense, small), folder)
    assert (found.task, found.rows, found.predictions) == ("class of an image", 20, 20)
    paths = sorted(path for path in folder.rglob("*.png"))
    pixels = np.stack([np.asarray(Image.open(path), np.float32).transpose(2, 0, 1) for path in paths])
    np.savez(tmp_path / "pixels.npz", pixel_values=(pixels / 255 - 0.5) / 0.5)
    arrays = compare((dense, small), tmp_path / "pixels.npz")
    assert arrays.changes == found.changes and arrays.kl_nats == pytest.approx(found.kl_nats, rel=1e-3)
    (tmp_path / "list.txt").write_text("\n".join(str(path.relative_to(tmp_path)) for path in paths))
    assert compare((dense, small), tmp_path / "list.txt") == found
    assert compare((dense, small), paths[0]).rows == 1
    (folder / "broken.png").write_bytes(b"no image")
    with pytest.raises(DataError, match="broken.png: expected an image"):
        compare((dense, small), folder)
    with pytest.raises(DataError, match="found no image; look there"):
        compare((dense, small), tmp_path / "nothing")


def test_arrays_are_the_models_own_inputs(pairs: Any, tmp_path: Path) -> None:
    pair, path = pairs("llama"), tmp_path / "d.npz"
    tokens = np.arange(20 * 6).reshape(20, 6) % 64
    mask = np.ones_like(tokens)
    mask[:, 4:] = 0
    np.savez(path, input_ids=tokens, attention_mask=mask)
    assert compare(pair, path).predictions == 20 * 4
    np.savez(path, input_ids=tokens, attention_mask=mask[:3])
    with pytest.raises(
        DataError, match=r"expected arrays of equally many rows, at least one, found \[3, 20\]"
    ):
        compare(pair, path)
    np.savez(path, tokens=tokens)
    with pytest.raises(DataError, match="expected inputs of the model .*found 'tokens'; rename or remove it"):
        compare(pair, path)
    for content in (b"", b"PK\x03\x04 broken"):
        path.write_bytes(content)
        with pytest.raises(DataError, match="expected an npz of numbers"):
            compare(pair, path)


def test_models_that_answer_other_questions_are_refused(pairs: Any, texts: Path, tmp_path: Path) -> None:
    classifier, masked = pairs("bert-classifier"), pairs("bert-masked-lm")
    with pytest.raises(SourceError, match=r"task of .* \(class of a text\), found masked token"):
        compare((classifier[0], masked[0]), texts)
    other = Path(shutil.copytree(classifier[0], tmp_path / "labels"))
    config = json.loads((other / "config.json").read_text())
    changed = {"id2label": {"0": "x", "1": "y", "2": "z"}}
    (other / "config.json").write_text(json.dumps({**config, **changed}))
    with pytest.raises(SourceError, match="expected the classes {0: 'LABEL_0'.* found {0: 'x'"):
        compare((classifier[1], other), texts)
    other = Path(shutil.copytree(masked[0], tmp_path / "vocabulary"))
    (tmp_path / "vocab.txt").write_text(
        "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS[::-1]])
    )
    BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(other)
    with pytest.raises(SourceError, match="expected the vocabulary of"):
        compare((masked[1], other), texts)


@pytest.mark.parametrize("architecture", ["T5ForConditionalGeneration", "BertForQuestionAnswering", ""])
def test_kinds_that_are_not_compared_are_refused(
    architecture: str, pairs: Any, texts: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(pairs("bert-classifier")[0], tmp_path / "folder"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": [architecture]}))
    with pytest.raises(SourceError, match=f"found {architecture or 'no architecture in config.json'}; comp"):
        compare((folder, folder), texts)


def test_a_head_that_is_in_no_file_is_refused(pairs: Any, texts: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(pairs("bert")[0], tmp_path / "folder"))
    config = json.loads((folder / "config.json").read_text())
    changed = {"architectures": ["BertForSequenceClassification"]}
    (folder / "config.json").write_text(json.dumps({**config, **changed}))
    with pytest.raises(SourceError, match="expected every tensor of BertForSequenceClassification"):
        compare((folder, folder), texts)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(PickleRefusedError):
        compare((folder, folder), texts)


def test_data_without_anything_to_compare_are_refused(pairs: Any, tmp_path: Path) -> None:
    pair, path = pairs("bert-masked-lm"), tmp_path / "d.txt"
    path.write_text("\n\n  \n")
    with pytest.raises(DataError, match="expected texts, found .* rows without any"):
        compare(pair, path)
    with pytest.raises(DataError, match="expected a file"):
        compare(pair, tmp_path / "nothing.csv")


def test_the_command_line_says_what_the_function_says(
    pairs: Any, texts: Path, run: Callable[..., tuple[int, str, str]]
) -> None:
    for name in ("bert-classifier", "bert"):
        a, b = pairs(name)
        found = compare((a, b), texts)
        status, out, _ = run("compare", a, b, "--data", texts, "--no-progress")
        sizes = f"A {a}: {found.bytes_a:,} bytes\nB {b}: {found.bytes_b:,} bytes\n"
        assert (status, out) == (0, f"{sizes}{found.statement}\n")
    assert "40 rows, 40 predictions (embedding): mean cosine similarity 0." in found.statement
