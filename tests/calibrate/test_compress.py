"""`compress` with calibration, end to end on tiny models: sizes, bits, what is said, and what is refused."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, BertModel, LlamaForCausalLM

import miracle_hub
from miracle_hub import CompressOptions
from miracle_hub.calibrate import compression, estimate, recipe
from miracle_hub.calibrate.judge import Judge
from miracle_hub.calibrate.teacher import Teacher
from miracle_hub.codec.report import Calibration, Report
from miracle_hub.errors import CalibrationError, DataError, OptionError
from miracle_hub.hub.card import carried_facts
from miracle_hub.hub.facts import CardFacts
from tests.calibrate.conftest import TEXTS

Saved = Callable[..., tuple[Any, Path]]
WIDER = {"hidden_size": 64, "intermediate_size": 128}  # so that matrices are coded
QUICK: dict[str, Any] = {"bits_per_weight": 8.0, "window_bits": 8, "progress": False}


class Net(nn.Module):
    """A convolution and a layer for images that transformers has no class for."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 64, 3)
        self.norm = nn.BatchNorm2d(64)
        self.head = nn.Linear(64, 64)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.conv(image)).relu().mean((2, 3)))


@pytest.fixture
def llama(saved: Saved) -> Path:
    return saved(LlamaForCausalLM, tie_word_embeddings=True, head_dim=32, **WIDER)[1]


@pytest.fixture
def net(tmp_path: Path) -> tuple[Net, Path]:
    torch.manual_seed(0)
    model, folder = Net().eval(), tmp_path / "net"
    folder.mkdir()
    save_file(model.state_dict(), folder / "model.safetensors", {"format": "pt"})
    return model, folder


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tenth of the steps and of the tokens that tiny models have otherwise, at the same efforts."""
    monkeypatch.setattr(
        recipe, "EFFORTS", tuple(replace(each, most_steps=24, looks=2) for each in recipe.EFFORTS)
    )
    monkeypatch.setattr(recipe, "_MOST_SELF_MADE", 2048)


def found_in(report: Report) -> Calibration:
    assert report.calibration is not None, report.uncalibrated
    return report.calibration


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def assert_loads(out: Path, auto: Any, source: Path) -> None:
    """As strangers load it: every tensor is what the files decode to, bit for bit, of the source."""
    model, weights = auto.from_pretrained(out), miracle_hub.load_state_dict(out)
    own = dict(model.named_parameters(remove_duplicate=False))
    assert weights and all(torch.equal(own[name], value) for name, value in weights.items() if name in own)
    assert miracle_hub.verify(out, dense=source).defects == ()


@pytest.mark.calibrated
def test_by_default_a_model_calibrates_itself(llama: Path, tmp_path: Path) -> None:
    assert (CompressOptions(size=1).calibrate, CompressOptions(size=1).effort) == ("self", 1)
    report = miracle_hub.compress(llama, tmp_path / "out", **QUICK)
    found = found_in(report)
    assert found.said.startswith("self: ") and found.n_tokens > 1000 and found.effort == 1
    assert found.steps and found.data_free is not None and found.divergence <= found.data_free
    assert_loads(tmp_path / "out", AutoModelForCausalLM, llama)


@pytest.mark.parametrize("effort", [0, 1])
def test_a_file_has_the_size_that_was_asked_for(llama: Path, tmp_path: Path, effort: int) -> None:
    plain = miracle_hub.compress(llama, tmp_path / "plain", calibrate=None, **QUICK)
    assert plain.calibration is None and not plain.calibration_lines
    report = miracle_hub.compress(llama, tmp_path / "out", calibrate=TEXTS, effort=effort, **QUICK)
    assert report.compressed_bytes <= report.budget_bytes == plain.budget_bytes  # type: ignore[operator]
    assert (found_in(report).data_free is None) == (effort == 0) != bool(found_in(report).steps)
    assert_loads(tmp_path / "out", AutoModelForCausalLM, llama)


def test_the_divergence_is_that_of_the_file(llama: Path, tmp_path: Path) -> None:
    """Measured again from the outside, of the same held-out rows."""
    report = miracle_hub.compress(llama, tmp_path / "out", calibrate=TEXTS, effort=0, **QUICK)
    judged = asking_of(llama)
    assert judged.divergence(tmp_path / "out") == pytest.approx(found_in(report).divergence, rel=1e-4)
    assert found_in(report).divergence > 0 and judged.unit == found_in(report).unit


def asking_of(folder: Path) -> Judge:
    from miracle_hub.calibrate.inputs import inputs_of
    from miracle_hub.calibrate.models import load_dense

    model = load_dense(folder)
    inputs = inputs_of(model, folder, TEXTS, n_tokens=2048, batch_rows=2)
    return Judge(model, Teacher(model, inputs.held_out))


def test_an_encoder_is_calibrated_on_a_file_of_texts(saved: Saved, text_file: Path, tmp_path: Path) -> None:
    _, folder = saved(BertModel, **WIDER)
    report = miracle_hub.compress(folder, tmp_path / "out", calibrate=text_file, effort=0, **QUICK)
    assert found_in(report).said.startswith("texts.txt: 200 lines") and "cosine" in found_in(report).unit
    assert [note.rpartition(": ")[2] for note in report.notes] == ["pooler.dense.weight"]  # it moves no state
    assert_loads(tmp_path / "out", AutoModel, folder)


def test_a_plain_module_is_calibrated_and_stays_as_it_is(net: tuple[Net, Path], tmp_path: Path) -> None:
    model, folder = net
    before = {name: value.clone() for name, value in model.state_dict().items()}
    images = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    report = miracle_hub.compress(folder, tmp_path / "out", calibrate=images, model=model, **QUICK)
    assert found_in(report).divergence < 1
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    found = miracle_hub.load_state_dict(tmp_path / "out")
    assert found.keys() == before.keys() and all(p.requires_grad for p in model.parameters())


def test_the_command_line_says_how_long_it_takes_and_what_came_of_it(
    llama: Path, text_file: Path, tmp_path: Path, run: Callable[..., tuple[int, str, str]]
) -> None:
    options = ["--bits-per-weight", 8, "--window-bits", 8, "--effort", 0, "--no-progress"]
    status, out, err = run("compress", llama, tmp_path / "out", "--calibrate", text_file, *options)
    assert status == 0
    assert "calibration with effort 0: about a minute of two cores and 0.8 GB of memory" in err
    assert "calibrated with effort 0 on texts.txt: 200 lines" in out
    assert "expected loss (KL to the dense model, nats per token): " in out


def test_the_card_has_what_was_found_and_keeps_it(llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = miracle_hub.compress(llama, out, calibrate=TEXTS, effort=0, **QUICK)
    lines, text = report.calibration_lines, (out / "README.md").read_text(encoding="utf-8")
    assert lines and all(f"- {line}\n" in text for line in lines)
    from miracle_hub.codec.reading import read_all

    again = carried_facts(out, CardFacts(1, read_all(out).weights_sha256))
    assert again.calibration == lines
    json.dumps(vars(found_in(report)))


def test_a_model_that_cannot_be_run_is_compressed_without_and_that_is_said(
    llama: Path, tmp_path: Path
) -> None:
    (llama / "config.json").unlink()
    plain = miracle_hub.compress(llama, tmp_path / "plain", calibrate="none", **QUICK)
    with pytest.warns(UserWarning, match="^compressed without calibration: .*found no config.json") as told:
        report = compressed_by_itself(llama, tmp_path / "out")
    assert len(told) == 1 and report.digest == plain.digest and report.calibration is None
    assert "found no config.json" in report.uncalibrated
    assert any("not calibrated" in note for note in report.notes)
    assert "- not calibrated: " in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (
        tmp_path / "plain" / "model.safetensors"
    ).read_bytes()


def compressed_by_itself(folder: Path, out: Path, **options: Any) -> Report:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("miracle_hub.api.is_asked", lambda calibrate: True)
        return miracle_hub.compress(folder, out, **QUICK, **options)


def test_whatever_happens_in_a_model_that_runs_by_itself_is_said_and_no_error(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise IndexError("out of range")

    monkeypatch.setattr("miracle_hub.calibrate.known.Refits.run", fail)
    with pytest.warns(UserWarning, match="^compressed without refits: .*found IndexError: out of range"):
        report = compressed_by_itself(llama, tmp_path / "without refits")
    assert found_in(report).data_free is not None and not found_in(report).steps
    assert any(note.startswith("not refitted: ") for note in report.notes)
    with pytest.raises(CalibrationError, match="found IndexError: out of range"):
        miracle_hub.compress(llama, tmp_path / "out", calibrate=TEXTS, **QUICK)
    monkeypatch.setattr("miracle_hub.calibrate.recipe.measure", fail)
    with pytest.warns(UserWarning, match="^compressed without calibration: .*found IndexError: out of range"):
        assert compressed_by_itself(llama, tmp_path / "without").calibration is None
    with pytest.raises(CalibrationError, match="found IndexError: out of range"):
        miracle_hub.compress(llama, tmp_path / "out", calibrate=TEXTS, **QUICK)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("layers", [1, 2])
def test_a_model_without_blocks_in_a_row_says_that_it_was_not_refitted(
    saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layers: int
) -> None:
    for name, value in {"_FEWEST_STEPS": 99, "_BLOCK_PASSES": 0, "_FEWEST_BLOCK_STEPS": 2}.items():
        monkeypatch.setattr(recipe, name, value)
    _, folder = saved(LlamaForCausalLM, num_hidden_layers=layers, head_dim=32, **WIDER)
    report = compressed_by_itself(folder, tmp_path / "out")
    assert any(note.startswith("tuned, not refitted") for note in report.notes) == (layers == 1)


def test_too_little_memory_is_said_before_the_model_is_loaded(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimate, "_free_bytes", lambda: 1000)
    monkeypatch.setattr("miracle_hub.calibrate.recipe.load_dense", lambda folder: pytest.fail("loaded"))
    with pytest.warns(UserWarning, match="expected 0.8 GB of memory to run the model and refit it, found"):
        compressed_by_itself(llama, tmp_path / "out")


def test_what_is_given_and_does_not_fit_is_an_error_and_leaves_nothing(
    llama: Path, net: tuple[Net, Path], tmp_path: Path
) -> None:
    model, folder = net
    out = tmp_path / "out"
    with pytest.raises(CalibrationError, match="found no config.json"):
        miracle_hub.compress(folder, out, calibrate=torch.randn(64, 3, 8, 8), **QUICK)
    with pytest.raises(DataError):
        miracle_hub.compress(llama, out, calibrate=tmp_path / "absent.txt", **QUICK)
    with pytest.raises(CalibrationError, match="conv.bias .* among the tensors of Linear, found none"):
        miracle_hub.compress(folder, out, calibrate=torch.randn(64, 3), model=nn.Linear(3, 3), **QUICK)
    with pytest.raises(OptionError, match="^model: expected none, since without calibration"):
        miracle_hub.compress(folder, out, calibrate=None, model=model, **QUICK)
    assert not out.exists() and not list(tmp_path.glob(".out*"))


@pytest.mark.parametrize("value", [True, 3, "", " "])
def test_what_can_be_no_data_is_refused(value: Any) -> None:
    with pytest.raises(OptionError, match='^calibrate: expected "self", "none", a path'):
        CompressOptions(size=1, calibrate=value)


@pytest.mark.parametrize("effort", [-1, 6, 1.0, True])
def test_an_effort_is_a_whole_number_up_to_five(effort: Any) -> None:
    with pytest.raises(OptionError, match="^effort: expected 0 to 5, found "):
        CompressOptions(size=1, effort=effort)


def test_what_is_no_better_is_taken_back(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = miracle_hub.compress(llama, tmp_path / "plain", calibrate=None, **QUICK)
    measured = iter([0.5, 0.25])
    monkeypatch.setattr(Judge, "divergence", lambda judge, folder: next(measured))
    report = miracle_hub.compress(llama, tmp_path / "out", calibrate=TEXTS, **QUICK)
    found = found_in(report)
    assert (found.divergence, found.data_free, found.is_taken_back) == (0.25, 0.25, True)
    assert report.digest == plain.digest and any(line.startswith("taken back: ") for line in found.lines())
    ours, theirs = (
        load_file(tmp_path / "out" / "model.safetensors"),
        load_file(tmp_path / "plain" / "model.safetensors"),
    )
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_largest_models_are_not_compared(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compression, "MOST_COMPARED", 100)
    report = miracle_hub.compress(llama, tmp_path / "out", calibrate=TEXTS, **QUICK)
    assert found_in(report).data_free is None and found_in(report).steps
    assert any("without calibration: not measured" in line for line in report.calibration_lines)
