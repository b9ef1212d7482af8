"""`fit`: from a data set on disk to a repository, resumed, and refused where the data lack something."""

import json
import random
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertModel,
    BertTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
)

import miracle_hub
from miracle_hub import MiracleConfig
from miracle_hub.errors import BudgetError, DataError, OptionError, OutputExistsError
from miracle_hub.files.whole import alone_in
from miracle_hub.finetune.trainer import MiracleTrainer
from tests.forks import Fork

pytest.importorskip("datasets", reason="fit needs the package datasets: pip install '.[fit]'")
WORDS = ["good", "bad", "film", "a", "the", "very", "movie", "is", "awful", "nice"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT with its tokenizer."""
    folder = tmp_path_factory.mktemp("bert")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    BertTokenizer({word: i for i, word in enumerate(vocabulary)}).save_pretrained(folder)
    torch.manual_seed(0)
    sizes: dict[str, Any] = dict(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
    )
    BertModel(BertConfig(vocab_size=len(vocabulary), max_position_embeddings=64, **sizes)).save_pretrained(
        folder
    )
    return folder


def sentences(n: int) -> list[tuple[str, int]]:
    """Sentences that are positive where "good" or "nice" is in them."""
    rng = random.Random(0)
    drawn = [rng.choices(WORDS, k=5) for _ in range(n)]
    return [(" ".join(words), int("good" in words or "nice" in words)) for words in drawn]


@pytest.fixture(scope="module")
def tsv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "train.tsv"
    path.write_text("sentence\tlabel\n" + "".join(f"{text}\t{label}\n" for text, label in sentences(300)))
    return path


def test_a_classifier_learns_within_its_budget_and_loads_plainly(
    source: Path, tsv: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = dict(epochs=8, learning_rate=4e-3, groups=4, refit_steps=4, progress=False)
    found = miracle_hub.fit(source, tmp_path / "out", data=tsv, rate=2.0, **options)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert found.coded["accuracy"] >= 0.9 and model.config.num_labels == 2
    assert found.report.compressed_bytes == (tmp_path / "out" / "model.safetensors").stat().st_size
    rows = json.loads((tmp_path / "out-fit" / "coding.json").read_text())
    assert rows[-1]["coded_values"] == sum(p.numel() for p in model.parameters() if p.ndim > 1)
    assert not (tmp_path / "out-fit" / "coding.safetensors").exists()


def test_a_fit_for_a_difference_writes_what_is_added_to_its_source(
    source: Path, tsv: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = dict(epochs=8, learning_rate=4e-3, groups=4, refit_steps=4, progress=False)
    options["parametrization"] = "test-channel"  # of 1.4 bits per value that is coded
    found = miracle_hub.fit(source, tmp_path / "out", data=tsv, size="3kB", delta=True, **options)
    assert found.coded["accuracy"] >= 0.9
    assert 0.99 * 3000 <= found.report.compressed_bytes <= 3000 == found.report.budget_bytes
    assert found.report.base == "a local folder" and found.report.n_differing == 7
    theirs = BertModel.from_pretrained(source).state_dict()
    config = MiracleConfig(base=source)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", quantization_config=config)
    own = model.bert.state_dict()
    same = {name for name, tensor in theirs.items() if torch.equal(tensor, own[name])}
    assert len(same) == found.report.n_same == len(theirs) - 7


def test_a_language_model_is_fitted_to_text(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "llama"
    sizes: dict[str, Any] = dict(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(LlamaConfig(vocab_size=20, pad_token_id=0, **sizes)).save_pretrained(folder)
    BertTokenizer.from_pretrained(source).save_pretrained(folder)
    (tmp_path / "text.txt").write_text("\n".join(text for text, _ in sentences(200)))
    options: dict[str, Any] = dict(rate=1.0, steps=30, learning_rate=1e-2, max_length=16, groups=3)
    found = miracle_hub.fit(
        folder, tmp_path / "out", data=tmp_path / "text.txt", task="causal-lm", refit_steps=2,
        progress=False, **options,
    )  # fmt: skip
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert found.coded["loss"] < 2.8  # 20 tokens at random are 3.0 nats


SCRIPT = """
import sys
import miracle_hub
source, out, data, resume = sys.argv[1:]
options = dict(rate=1.0, steps=2, groups=4, refit_steps=5, progress=False, resume=resume == "True")
miracle_hub.training.checkpoint.Checkpoint.__init__.__defaults__ = (0.0, "")
print(miracle_hub.fit(source, out, data=data, **options).report.digest)
"""


def start(source: Path, out: Path, data: Path, resume: bool) -> Fork:
    return Fork("import miracle_hub.training.checkpoint\n" + SCRIPT, source, out, data, str(resume))


def test_a_fit_that_is_killed_while_coding_goes_on_to_the_same_file(
    source: Path, tsv: Path, tmp_path: Path
) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    reference = start(source, whole, tsv, False)
    killed = start(source, stopped, tsv, False)
    checkpoint = tmp_path / "stopped-fit" / "coding.safetensors"
    while not checkpoint.exists() and not killed.has_ended():
        time.sleep(0.01)
    killed.kill()
    complaint = killed.wait().stderr
    assert checkpoint.exists() and not stopped.exists(), complaint
    once, again = reference.wait(), start(source, stopped, tsv, True).wait()
    assert once.returncode == again.returncode == 0, once.stderr + again.stderr
    assert again.stdout.splitlines()[-1] == once.stdout.splitlines()[-1]
    assert (stopped / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_a_fit_that_stops_between_training_and_coding_goes_on_without_another_step(
    source: Path, tsv: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    options: dict[str, Any] = dict(data=tsv, rate=1.0, steps=3, groups=2, refit_steps=2, progress=False)
    whole = miracle_hub.fit(source, tmp_path / "whole", **options)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(MiracleTrainer, "compress", stop)
        miracle_hub.fit(source, tmp_path / "out", **options)
    # A checkpoint that a kill has cut short is passed over.
    (tmp_path / "out-fit" / "checkpoint-9").mkdir()
    (tmp_path / "out-fit" / "checkpoint-9" / "trainer_state.json").write_text('{"global_step": 9,')
    again = miracle_hub.fit(source, tmp_path / "out", resume=True, **options)
    assert again.report.digest == whole.report.digest
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_two_fits_of_one_output_do_not_share_their_checkpoints(
    source: Path, tsv: Path, tmp_path: Path
) -> None:
    with alone_in(tmp_path / "out-fit"), pytest.raises(OutputExistsError) as raised:
        miracle_hub.fit(source, tmp_path / "out", data=tsv, rate=1.0, steps=1, progress=False)
    assert str(raised.value) == (
        f"{tmp_path / 'out-fit'}: expected no other run that uses this folder, found one; wait for its end, "
        "or choose another output"
    )


def refused(source: Path, tmp_path: Path, text: str, name: str = "d.csv", **options: Any) -> str:
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError) as error:
        miracle_hub.fit(source, tmp_path / "out", data=tmp_path / name, rate=1.0, progress=False, **options)
    assert not (tmp_path / "out").exists()
    return str(error.value)


def test_data_without_labels_are_refused_with_the_columns_they_have(source: Path, tmp_path: Path) -> None:
    message = refused(source, tmp_path, "text\na film\nthe movie\nbad\n")
    assert (
        "expected labels in a column 'label', found ['text']; name the column with --label-column" in message
    )


def test_a_row_without_its_label_is_refused(source: Path, tmp_path: Path) -> None:
    message = refused(source, tmp_path, "text,label\na film,good\nthe movie,\nbad,bad\n")
    assert "column 'label': expected a class for every row" in message


def test_data_of_one_class_are_refused(source: Path, tmp_path: Path) -> None:
    message = refused(source, tmp_path, "text,label\n" + "a film,1\n" * 3)
    assert "of two classes or more" in message


def test_a_column_that_is_not_there_is_refused(source: Path, tmp_path: Path) -> None:
    message = refused(source, tmp_path, "text,label\na,0\nb,1\nc,0\n", text_columns=["sentence"])
    assert "found ['sentence'] in ['text', 'label']; name them with --text-columns" in message


def test_an_empty_file_and_a_missing_one_are_refused(source: Path, tmp_path: Path) -> None:
    assert "expected a file (.csv" in refused(source, tmp_path, "")
    assert "at least two rows, found 1" in refused(source, tmp_path, "text,label\na,0\n")
    with pytest.raises(DataError, match="expected a file .* found FileNotFoundError: no such file"):
        miracle_hub.fit(source, tmp_path / "out", data="none.csv", rate=1.0)


def test_an_unknown_task_and_an_existing_output_are_refused_before_any_work(
    source: Path, tmp_path: Path
) -> None:
    with pytest.raises(OptionError, match="task: expected one of"):
        miracle_hub.fit(source, tmp_path / "out", data="none", task="regression", rate=1.0)
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputExistsError):
        miracle_hub.fit(source, tmp_path / "out", data="none", rate=1.0)


@pytest.mark.parametrize("budget", [{"size": "11kB"}, {"bits_per_weight": 9.0}], ids=str)
def test_a_fit_has_99_percent_of_the_budget_of_its_files_and_never_more(
    budget: dict[str, Any], source: Path, tsv: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = dict(steps=2, groups=2, refit_steps=1, progress=False)
    found = miracle_hub.fit(source, tmp_path / "out", data=tsv, **budget, **options).report
    n_bytes = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert found.compressed_bytes == n_bytes
    asked, used = (11_000, n_bytes) if "size" in budget else (9.0, found.bits_per_weight)
    assert 0.99 * asked <= used <= asked
    assert found.budget_bytes is not None and 0.99 * found.budget_bytes <= n_bytes <= found.budget_bytes


def test_a_fit_needs_exactly_one_budget_and_names_all_three(source: Path, tmp_path: Path) -> None:
    for given in ({}, {"size": "1MB", "rate": 1.0}):
        with pytest.raises(BudgetError, match="^fit: expected exactly one of bits_per_weight, size and rate"):
            miracle_hub.fit(source, tmp_path / "out", data="none.csv", **given)


def test_a_budget_that_no_fit_meets_is_refused_before_training(
    source: Path, tsv: Path, tmp_path: Path
) -> None:
    with pytest.raises(BudgetError, match="^size: 500 bytes were asked for, but the file of "):
        miracle_hub.fit(source, tmp_path / "out", data=tsv, size=500, progress=False)
    assert not (tmp_path / "out").exists()
