"""Two processes with a Trainer each, in torchrun's environment: what they write, and what they end with."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, BertConfig, BertModel, BertTokenizer

from miracle_hub.errors import OptionError
from miracle_hub.files.sealed import crc_of
from miracle_hub.finetune.trainer import MiracleTrainer
from tests.hub.test_trainer import ROWS, arguments, classifier
from tests.workers import run_in_two

pytest.importorskip("datasets", reason="fit needs the package datasets: pip install '.[fit]'")
WORDS = ["good", "bad", "film", "a", "the", "very"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    BertTokenizer({word: i for i, word in enumerate(vocabulary)}).save_pretrained(folder / "source")
    sizes: dict[str, Any] = dict(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
    )
    BertModel(BertConfig(vocab_size=11, max_position_embeddings=64, **sizes)).save_pretrained(
        folder / "source"
    )
    rows = "".join(f"a {WORDS[i % 2]} film {WORDS[i % 6]}\t{i % 2}\n" for i in range(64))
    (folder / "train.tsv").write_text(f"sentence\tlabel\n{rows}")
    return folder


@pytest.fixture(scope="module")
def found(folder: Path) -> list[dict[str, Any]]:
    """What each of the processes found."""
    run_in_two(Path(__file__).with_name("two_trainers.py"), folder)
    return [json.loads((folder / f"found-{rank}.json").read_text()) for rank in (0, 1)]


def crc_of_loaded(path: Path) -> str:
    return crc_of(dict(AutoModelForSequenceClassification.from_pretrained(path).state_dict()), {})


@pytest.mark.parametrize("kind", ["mean-var", "test-channel"])
def test_the_first_writes_what_all_end_with_and_it_loads(
    found: list[dict[str, Any]], folder: Path, kind: str
) -> None:
    (weights, report, loss, _), (other_weights, other_report, other_loss, _) = (each[kind] for each in found)
    assert weights == other_weights == crc_of_loaded(folder / kind)
    assert report == other_report and loss == other_loss
    assert report["compressed_bytes"] == (folder / kind / "model.safetensors").stat().st_size
    rows = json.loads((folder / f"log-{kind}" / "coding.json").read_text())
    assert len(rows) == 3 and rows[-1]["validation"] == pytest.approx(loss, rel=1e-6)
    assert not (folder / f"state-{kind}").exists()


def test_errors_of_the_first_are_those_of_all(found: list[dict[str, Any]], folder: Path) -> None:
    for said, where in zip(found, ("", "process 0 of 2: "), strict=True):
        assert said["test-channel"][3].startswith(f"OutputExistsError: {where}{folder / 'test-channel'}: the")
        assert said["written"][1].startswith(f"OutputExistsError: {where}{folder / 'by-all'}: the output")


def test_errors_while_one_trains_or_refits_are_those_of_all(found: list[dict[str, Any]]) -> None:
    (in_training, in_refits), (own_in_training, own_in_refits) = (each["fails"] for each in found)
    text = "step 0: expected a finite loss, found nan"
    assert in_training.startswith(f"TrainingError: process 1 of 2: {text}")
    assert own_in_training.startswith(f"TrainingError: {text}")
    assert own_in_refits == "IndexError: a row that is not there"
    assert in_refits.startswith("ProcessError: process 1 of 2: expected no error, found IndexError: a row")


def test_all_or_the_first_alone_may_write(found: list[dict[str, Any]], folder: Path) -> None:
    expected = crc_of_loaded(folder / "by-one")
    assert [each["written"][0] for each in found] == [expected, expected]
    assert crc_of_loaded(folder / "by-all") == expected


def test_a_fit_of_two_processes_has_one_result(found: list[dict[str, Any]], folder: Path) -> None:
    assert found[0]["fitted"] == found[1]["fitted"]
    assert found[0]["fitted"][1]["loss"] < 1  # two classes are 0.69 nats, however many processes there are
    AutoModelForSequenceClassification.from_pretrained(folder / "fit")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"_n_gpu": 2}, "found nn.DataParallel over several GPUs in one process; start a process per device"),
        ({}, "expected a run of 2 processes, as the launcher says, found that each trains on its own"),
    ],
)
def test_a_trainer_that_would_wrap_otherwise_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], text: str
) -> None:
    given = arguments(tmp_path)
    vars(given).update(change)
    if not change:
        monkeypatch.setenv("WORLD_SIZE", "2")
    before = torch.get_rng_state()
    with pytest.raises(OptionError, match=text):
        MiracleTrainer(model=classifier(), args=given, train_dataset=ROWS)
    torch.set_rng_state(before)
