"""Certificates of text classifiers and of networks in one file: every error is counted, every byte pays."""

import hashlib
import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertTokenizer,
)

import miracle_hub
from miracle_hub import Certificate, CodingOptions
from miracle_hub.errors import ChecksumError, DataError, OptionError, SourceError
from miracle_hub.evaluate.certify import count_errors

from ..training.networks import IMAGES, LABELS, conv_net, loss_of, variational_net

datasets = pytest.importorskip("datasets", reason="certify needs the package datasets: pip install '.[fit]'")
WORDS = ["good", "bad", "film", "a", "the", "very", "movie", "is", "awful", "nice"]
NAMES = ["negative", "positive", "neutral"]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT that chooses one of three classes, with its tokenizer."""
    folder = tmp_path_factory.mktemp("bert")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    sizes: dict[str, Any] = dict(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
    )
    labels: dict[str, Any] = dict(
        id2label=dict(enumerate(NAMES)), label2id={n: i for i, n in enumerate(NAMES)}
    )
    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(vocabulary), initializer_range=0.5, **sizes, **labels)
    BertForSequenceClassification(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def source(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, compressed."""
    folder = tmp_path_factory.mktemp("compressed") / "bert"
    miracle_hub.compress(dense, folder, bits_per_weight=7, window_bits=8, progress=False)
    return folder


def rows(n: int) -> list[tuple[str, str]]:
    """Sentences of different lengths, each with a class."""
    rng = random.Random(0)
    return [(" ".join(rng.choices(WORDS, k=rng.randint(1, 8))), rng.choice(NAMES)) for _ in range(n)]


def table(path: Path, pairs: list[tuple[str, str]]) -> Path:
    path.write_text("sentence\tlabel\n" + "".join(f"{text}\t{label}\n" for text, label in pairs))
    return path


def answers(source: Path, pairs: list[tuple[str, str]]) -> list[str]:
    """Classes that plain `from_pretrained` gives, one row at a time."""
    model = AutoModelForSequenceClassification.from_pretrained(source)
    tokenizer: Any = AutoTokenizer.from_pretrained(source)
    with torch.no_grad():
        return [NAMES[int(model(**tokenizer(t, return_tensors="pt")).logits.argmax())] for t, _ in pairs]


def n_errors(source: Path, pairs: list[tuple[str, str]]) -> int:
    return sum(answer != label for answer, (_, label) in zip(answers(source, pairs), pairs, strict=True))


@pytest.mark.parametrize("fitted", [True, False])
def test_a_classifier_is_certified_by_its_errors_and_its_whole_file(
    fitted: bool, source: Path, tmp_path: Path
) -> None:
    """Its own answers but for those that are "neutral": labels are wrong where the model said so."""
    given = [answer.replace("neutral", "negative") for answer in answers(source, rows(150))]
    pairs = [(text, label) for (text, _), label in zip(rows(150), given, strict=True)]
    found: Any = miracle_hub.certify(
        source, data=table(tmp_path / "d.tsv", pairs), fitted=fitted, delta=0.01, progress=False
    )
    file, errors = (source / "model.safetensors").read_bytes(), n_errors(source, pairs)
    assert found == Certificate(errors, 150, 3, len(file), fitted, 0.01, hashlib.sha256(file).hexdigest())
    assert 0 < errors < 50 and found.is_vacuous == fitted


def test_rows_that_are_there_again_are_counted_and_stated(source: Path, tmp_path: Path) -> None:
    once = list(dict(rows(30)).items())
    data = table(tmp_path / "d.tsv", once * 3)
    found: Any = miracle_hub.certify(source, data=data, fitted=False, progress=False)
    wrong = n_errors(source, once)
    assert (found.examples, found.errors) == (3 * len(once), 3 * wrong)
    assert (found.repeated, found.repeated_errors) == (2 * len(once), 2 * wrong)
    assert f"{found.repeated:,} of the examples repeat earlier ones" in found.statement


def test_held_out_rows_that_were_in_training_are_counted_and_tighten_nothing(
    source: Path, tmp_path: Path
) -> None:
    once = list(dict(rows(60)).items())
    data, seen = table(tmp_path / "d.tsv", once), table(tmp_path / "t.tsv", once[: len(once) // 2])
    rest = table(tmp_path / "r.tsv", once[len(once) // 2 :])
    found, own = (
        miracle_hub.certify(source, data=data, training=train, fitted=False, progress=False)
        for data, train in ((data, seen), (rest, None))
    )
    assert isinstance(found, Certificate) and found.repeated == len(once) // 2
    assert found.bound >= own.bound


def test_shards_count_like_one_file(dense: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    miracle_hub.compress(dense, out, bits_per_weight=7, window_bits=8, max_shard_size="8kB", progress=False)
    shards = sorted(out.glob("*.safetensors"))
    data = table(tmp_path / "d.tsv", rows(20))
    found = miracle_hub.certify(out, data=data, fitted=True, progress=False)
    together = b"".join(shard.read_bytes() for shard in shards)
    assert len(shards) > 1 and found.n_bytes == len(together)
    assert found.sha256 == hashlib.sha256(together).hexdigest()


def test_weights_beside_the_counted_files_change_nothing(source: Path, tmp_path: Path) -> None:
    """A folder with an adapter, which plain from_pretrained would follow to other weights."""
    pairs, folder = rows(40), tmp_path / "bert"
    shutil.copytree(source, folder)
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "another/model"}))
    data = table(tmp_path / "d.tsv", pairs)
    found: Any = miracle_hub.certify(folder, data=data, fitted=True, progress=False)
    assert found.errors == n_errors(source, pairs)


def test_what_fit_writes_is_certified_by_the_names_of_its_classes(dense: Path, tmp_path: Path) -> None:
    pairs = [(text, label) for text, label in rows(60) if label != "neutral"]
    data, base = table(tmp_path / "d.tsv", pairs), tmp_path / "base"
    AutoModelForSequenceClassification.from_pretrained(dense).base_model.save_pretrained(base)
    AutoTokenizer.from_pretrained(dense).save_pretrained(base)
    options: dict[str, Any] = dict(rate=2.0, steps=2, groups=2, refit_steps=1, progress=False)
    fitted = miracle_hub.fit(base, tmp_path / "out", data=data, **options)
    found: Any = miracle_hub.certify(tmp_path / "out", data=data, fitted=True, progress=False)
    assert (found.examples, found.classes) == (len(pairs), 2)
    assert found.n_bytes == fitted.report.compressed_bytes


def test_the_command_line_says_what_the_certificate_says(run: Any, source: Path, tmp_path: Path) -> None:
    data = table(tmp_path / "d.tsv", rows(50))
    arguments = ("certify", source, "--data", data, "--no-progress")
    for flag, fitted in (("--fitted", True), ("--held-out", False)):
        status, out, _ = run(*arguments, flag)
        found = miracle_hub.certify(source, data=data, fitted=fitted, progress=False)
        shown = f"{source}: {found.n_bytes:,} bytes, sha256 {found.sha256}\n{found.statement}\n"
        assert (status, out) == (0, shown)


def test_nobody_is_certified_who_does_not_say_what_the_rows_were_used_for(run: Any, source: Path) -> None:
    status, out, err = run("certify", source, "--data", "d.tsv")
    assert status == 2 and out == "" and "--fitted" in err


def refused(source: Path, tmp_path: Path, text: str, name: str = "d.csv", **options: Any) -> str:
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError) as error:
        miracle_hub.certify(source, data=tmp_path / name, fitted=True, progress=False, **options)
    return str(error.value)


def test_data_without_labels_are_refused_with_the_columns_they_have(source: Path, tmp_path: Path) -> None:
    message = refused(source, tmp_path, "text\na film\nthe movie\n")
    assert "expected rows with labels in a column 'label', found 2 rows of ['text']" in message
    assert "--label-column" in message


def test_a_label_that_is_no_class_of_the_model_is_refused(source: Path, tmp_path: Path) -> None:
    wanted = "column 'label': expected one of ('negative', 'positive', 'neutral'), found "
    for label, shown in (("3", "3"), ("-1", "-1"), ("1.5", "1.5"), ("great", "'great'")):
        assert wanted + shown in refused(source, tmp_path, f"text,label\na,{label}\n")
    assert wanted + "None" in refused(source, tmp_path, "text,label\na,\nb,positive\n")


def test_empty_data_and_rows_without_text_are_refused(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "d.csv: expected a file" in refused(source, tmp_path, "text,label\n")
    message = refused(source, tmp_path, "text,label\na,positive\n,negative\n")
    assert "column 'text': row 1: expected a text, found none; complete it" in message
    nothing = datasets.Dataset.from_dict({"text": [], "label": []})
    monkeypatch.setattr("miracle_hub.evaluate.data.read_sets", lambda data: {"train": nothing})
    assert "found 0 rows of ['text', 'label']; look at the file" in refused(source, tmp_path, "")


def test_data_of_several_splits_need_the_name_of_one(source: Path, tmp_path: Path) -> None:
    part = datasets.Dataset.from_dict({"text": ["a good film", "awful"], "label": [1, 0]})
    datasets.DatasetDict({"train": part, "test": part}).save_to_disk(tmp_path / "sets")
    for split in (None, "validation"):
        with pytest.raises(
            DataError, match=f"split among train, test, found {split!r}; name it with --split"
        ):
            miracle_hub.certify(source, data=tmp_path / "sets", fitted=False, split=split, progress=False)
    found: Any = miracle_hub.certify(
        source, data=tmp_path / "sets", fitted=False, split="test", progress=False
    )
    assert found.examples == 2


def test_a_delta_out_of_range_is_refused_before_anything_is_read() -> None:
    with pytest.raises(OptionError, match="delta: expected a probability"):
        miracle_hub.certify("nowhere", data="nothing", fitted=True, delta=1.0)


def test_an_uncompressed_repository_is_refused(dense: Path) -> None:
    with pytest.raises(SourceError, match="expected a compressed repository.*run miracle compress"):
        miracle_hub.certify(dense, data="nothing", fitted=True)


def test_a_model_that_chooses_no_class_is_refused(source: Path, tmp_path: Path) -> None:
    config = json.loads((source / "config.json").read_text())
    for change in (
        {"architectures": ["BertModel"]},
        {"id2label": {0: "score"}},
        {"problem_type": "regression"},
    ):
        folder = tmp_path / next(iter(change))
        shutil.copytree(source, folder)
        (folder / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(SourceError, match="expected a model that chooses one of several classes"):
            miracle_hub.certify(folder, data="nothing", fitted=True)


def test_a_head_that_is_not_in_the_file_is_refused(dense: Path, tmp_path: Path) -> None:
    """transformers would draw it at random."""
    base, out = tmp_path / "base", tmp_path / "out"
    AutoModelForSequenceClassification.from_pretrained(dense).base_model.save_pretrained(base)
    AutoTokenizer.from_pretrained(dense).save_pretrained(base)
    miracle_hub.compress(base, out, bits_per_weight=7, window_bits=8, progress=False)
    config = json.loads((out / "config.json").read_text())
    del config["quantization_config"]["guard"]["config"]
    (out / "config.json").write_text(
        json.dumps({**config, "architectures": ["BertForSequenceClassification"]})
    )
    data = table(tmp_path / "d.tsv", rows(5))
    with pytest.raises(SourceError, match="found none of the name classifier.bias"):
        miracle_hub.certify(out, data=data, fitted=True, progress=False)


def test_a_repository_without_a_tokenizer_is_refused(source: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        shutil.copy(source / name, tmp_path)
    data = table(tmp_path / "d.tsv", rows(5))
    with pytest.raises(SourceError, match="expected a tokenizer beside the model"):
        miracle_hub.certify(tmp_path, data=data, fitted=True, progress=False)


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module]:
    """A small network in one file, and what it decodes to."""
    path = tmp_path_factory.mktemp("network") / "network.safetensors"
    model = variational_net(streams="network")
    options = CodingOptions(groups=3, refit_steps=2)
    miracle_hub.code_model(model, loss_of(model), options=options, progress=False)
    miracle_hub.save(model, path)
    return path, model.eval()


def test_a_network_is_certified_from_its_file(network: tuple[Path, nn.Module]) -> None:
    path, model = network
    batches = [(IMAGES[:15], LABELS[:15]), (IMAGES[15:], LABELS[15:])]
    found = miracle_hub.certify_network(conv_net(seed=1), path, batches, fitted=True, delta=0.1)
    errors = int((model(IMAGES).argmax(1) != LABELS).sum())
    file = path.read_bytes()
    assert found == Certificate(errors, 20, 5, len(file), True, 0.1, hashlib.sha256(file).hexdigest())


def test_a_network_in_a_damaged_file_is_not_certified(
    network: tuple[Path, nn.Module], tmp_path: Path
) -> None:
    damaged = bytearray(network[0].read_bytes())
    damaged[-1] ^= 1
    (tmp_path / "damaged").write_bytes(damaged)
    with pytest.raises(ChecksumError):
        miracle_hub.certify_network(conv_net(), tmp_path / "damaged", [(IMAGES, LABELS)], fitted=True)


def test_no_batches_and_impossible_labels_are_refused(network: tuple[Path, nn.Module]) -> None:
    def certify(batches: Any) -> Certificate:
        return miracle_hub.certify_network(conv_net(), network[0], batches, fitted=False)

    spent: Iterator[tuple[Tensor, Tensor]] = iter([])
    with pytest.raises(DataError, match="at least one example, found none; an iterator can be used once"):
        certify(spent)
    for labels in (LABELS + 1, LABELS - 1, LABELS.float()):
        with pytest.raises(DataError, match="whole numbers from 0 to 4"):
            certify([(IMAGES, labels)])
    with pytest.raises(SourceError, match=r"found \[20, 5\] and \[19\]"):
        certify([(IMAGES, LABELS[1:])])


def test_ties_and_nan_are_errors() -> None:
    logits = torch.tensor([[1.0, 0.0], [1.0, 1.0], [torch.nan, 0.0], [0.0, torch.nan], [-torch.inf] * 2])
    assert count_errors(logits, torch.zeros(5, dtype=torch.int64), "here") == 4
    assert count_errors(logits[:1], torch.tensor([1]), "here") == 1
