"""Models are calibrated whatever layers make of inputs, and whatever transformers calls their tensors."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    BartForConditionalGeneration,
    GPTNeoXForCausalLM,
    LlamaForCausalLM,
    OPTForCausalLM,
    ViTForImageClassification,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)

import miracle_hub
from miracle_hub.calibrate import precision, recipe, teacher
from miracle_hub.calibrate.judge import tensors_of
from miracle_hub.calibrate.models import load_dense
from miracle_hub.calibrate.outputs import answers, divergence
from miracle_hub.calibrate.sensitivity import measure
from miracle_hub.errors import CalibrationError

pytestmark = pytest.mark.calibrated
Saved = Callable[..., tuple[Any, Path]]
# Fewer positions than words, so that a word is no position.
WIDER: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "max_position_embeddings": 16}
WIDER |= {"d_model": 64, "ffn_dim": 128, "word_embed_proj_dim": 64, "encoder_ffn_dim": 128}
QUICK: dict[str, Any] = {"bits_per_weight": 7.0, "window_bits": 8, "progress": False}


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tenth of the steps and of the tokens that tiny models have otherwise, at the same efforts."""
    quick = tuple(replace(each, most_steps=24, looks=2) for each in recipe.EFFORTS)
    monkeypatch.setattr(recipe, "EFFORTS", quick)
    monkeypatch.setattr(recipe, "_MOST_SELF_MADE", 2048)


class Positions(nn.Embedding):
    """Looks up places, and not what it is given."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(torch.arange(input.shape[1]).expand(input.shape))


class Placed(nn.Module):
    """Words, and where they stand."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places, self.head = nn.Embedding(20, 8), Positions(6, 8), nn.Linear(8, 5)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.words(input_ids) + self.places(input_ids))


def test_tables_of_positions_cost_where_positions_are_used() -> None:
    torch.manual_seed(0)
    found = measure(
        Placed().eval(), [{"input_ids": torch.randint(0, 20, (4, 5))}], {"words.weight", "places.weight"}, 0
    )
    places = found.curvature("places.weight", (6, 8))
    assert places is not None and places.rows[:5].gt(0).all() and places.rows[5] == 0


@pytest.mark.parametrize(
    "cls", [OPTForCausalLM, BartForConditionalGeneration, ViTForImageClassification, GPTNeoXForCausalLM]
)
def test_a_family_calibrates_itself_and_loads_as_it_was_judged(
    cls: Any, saved: Saved, tmp_path: Path
) -> None:
    _, folder = saved(cls, **WIDER)
    report = miracle_hub.compress(folder, tmp_path / "out", effort=1, **QUICK)
    assert report.calibration is not None and not report.uncalibrated, report.uncalibrated
    assert not [
        note for note in report.notes if "depends on these" in note or note.startswith("not refitted")
    ]
    dense, coded = load_dense(folder), cls.from_pretrained(tmp_path / "out").eval()
    moved = [n for n, own in tensors_of(dense).items() if not torch.equal(own, tensors_of(coded)[n].float())]
    assert moved and report.calibration.divergence < 0.1


@pytest.mark.parametrize("cls", [LlamaForCausalLM, BartForConditionalGeneration])
def test_a_large_model_with_many_classes_is_fitted_to_rounded_answers(
    cls: Any, saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "_LARGE", 0)
    monkeypatch.setattr(precision, "_OF_CPUS", ("sse2", "avx512_bf16"))
    _, folder = saved(cls, vocab_size=4 * teacher._KEPT + 1, head_dim=32, **WIDER)
    report = miracle_hub.compress(folder, tmp_path / "out", effort=1, **QUICK)
    assert report.calibration is not None and not report.uncalibrated, report.uncalibrated
    assert report.calibration.divergence < 0.1


def test_a_speech_model_with_fewer_positions_than_words_calibrates_itself(
    saved: Saved, tmp_path: Path
) -> None:
    sizes = {"num_mel_bins": 80, "decoder_start_token_id": 2, "max_source_positions": 50}
    _, folder = saved(WhisperForConditionalGeneration, max_target_positions=16, **sizes, **WIDER)
    WhisperFeatureExtractor(chunk_length=1).save_pretrained(folder)
    report = miracle_hub.compress(folder, tmp_path / "out", effort=0, **QUICK)
    assert report.calibration is not None and not report.uncalibrated, report.uncalibrated
    assert not [note for note in report.notes if "embed_positions" in note]


def test_a_layer_that_no_answer_depends_on_stops_no_refit(saved: Saved, tmp_path: Path) -> None:
    model, folder = saved(LlamaForCausalLM, num_hidden_layers=2, head_dim=32, **WIDER)
    model.model.layers[1].mlp.down_proj.weight.data.zero_()
    model.save_pretrained(folder)
    report = miracle_hub.compress(folder, tmp_path / "out", effort=1, **QUICK)
    assert not [note for note in report.notes if note.startswith("not refitted")]
    (unseen,) = [note for note in report.notes if "no answer of the model depends on these" in note]
    assert "layers.1.mlp.gate_proj.weight" in unseen and report.calibration is not None


def test_a_model_that_lies_otherwise_in_memory_has_the_same_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.Flatten(), nn.Linear(512, 10)
    )
    folder, images = tmp_path / "net", torch.randn(64, 3, 8, 8)
    folder.mkdir()
    save_file(net.state_dict(), folder / "model.safetensors")
    written = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        out = tmp_path / str(len(written))
        given = net.eval().to(memory_format=memory_format)  # pyright: ignore[reportCallIssue]
        miracle_hub.compress(folder, out, model=given, calibrate=images, effort=1, **QUICK)
        written.append((out / "model.safetensors").read_bytes())
    assert written[0] == written[1]


class Noisy(nn.Linear):
    """Never the same twice."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + torch.randn(len(input), self.out_features)


def test_a_model_with_noise_of_its_own_is_refused(tmp_path: Path) -> None:
    net, folder = Noisy(64, 64).eval(), tmp_path / "net"
    folder.mkdir()
    save_file(net.state_dict(), folder / "model.safetensors")
    with pytest.raises(CalibrationError, match="found others the second time"):
        miracle_hub.compress(folder, tmp_path / "out", model=net, calibrate=torch.randn(64, 64), **QUICK)
    assert not (tmp_path / "out").exists()


class Answering(nn.Module):
    """Gives what it is given as something of a name."""

    def __init__(self, problem: str | None = None) -> None:
        super().__init__()
        self.config = SimpleNamespace(problem_type=problem)

    def forward(self, x: Tensor) -> Any:
        return SimpleNamespace(logits=x)


def test_logits_of_pixels_are_compared_over_classes() -> None:
    found, dense = torch.randn(2, 5, 3, 4), torch.randn(2, 5, 3, 4)
    kind, classes_last = answers(Answering(), {"x": found})
    _, expected = answers(Answering(), {"x": dense})
    assert kind == "logits"
    kl = nn.functional.kl_div(found.log_softmax(1), dense.log_softmax(1), reduction="none", log_target=True)
    assert torch.allclose(divergence(kind, classes_last, expected), kl.sum(1).mean())


@pytest.mark.parametrize(
    ("problem", "width", "kind"), [(None, 3, "logits"), (None, 1, "states"), ("regression", 3, "states")]
)
def test_logits_that_are_no_choice_among_classes_are_states(
    problem: str | None, width: int, kind: str
) -> None:
    assert answers(Answering(problem), {"x": torch.randn(2, width)})[0] == kind


def test_answers_of_whole_numbers_are_refused() -> None:
    class Chosen(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.argmax(-1)

    with pytest.raises(CalibrationError, match="found torch.int64"):
        answers(Chosen(), {"x": torch.randn(2, 3)})
