"""Refits that hold a model to what it was: the loss, whom it suits, and resumed runs."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from miracle_hub import (
    CodingOptions,
    MiracleTrainer,
    make_variational,
    posterior_mean,
    remove_variational,
)
from miracle_hub.errors import FormatError, OptionError, TrainingError
from miracle_hub.finetune.distillation import Teacher

from .test_trainer import ROWS, arguments, classifier

INPUTS = {
    "input_ids": torch.arange(16).view(2, 8),
    "attention_mask": torch.tensor([[1] * 8, [1] * 5 + [0] * 3]),
}


def trainer_of(model: Any, folder: Path) -> MiracleTrainer:
    return MiracleTrainer(model=model, args=arguments(folder), train_dataset=ROWS)


def test_the_loss_is_the_kl_of_outputs_plus_ten_times_the_relative_error_of_hidden_states_by_hand() -> None:
    model = classifier(parametrization="test-channel").eval()
    teacher = Teacher(model)
    assert float(teacher.loss(model, INPUTS).detach()) == pytest.approx(0, abs=1e-6)
    with torch.no_grad():
        model.classifier.weight[0] += 5
        model.bert.embeddings.word_embeddings.parametrizations.weight[0].holder[0].streams[
            0
        ].posterior.weight.mul_(1.5)
        found = model(**INPUTS, output_hidden_states=True)
        wanted = teacher.dense(**INPUTS, output_hidden_states=True)
        p, q = wanted.logits.double().softmax(1), found.logits.double().softmax(1)
        kl = float((p * (p / q).log()).sum(1).mean())
        real = INPUTS["attention_mask"].bool()
        x, y = (o.hidden_states[1][real].double() for o in (found, wanted))
        error = float((x - y).square().mean() / y.var())
    assert kl > 1e-5 and error > 1e-5
    assert float(teacher.loss(model, INPUTS).detach()) == pytest.approx(kl + 10 * error, rel=1e-4)


def test_what_padding_says_is_of_no_account() -> None:
    model = make_variational(
        GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=16)).eval(),
        rate=2.0,
    )
    teacher = Teacher(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    other = INPUTS["input_ids"].clone()
    other[1, 5:] = 49
    losses = [
        float(teacher.loss(model, {**INPUTS, "input_ids": ids}).detach())
        for ids in (INPUTS["input_ids"], other)
    ]
    assert losses[0] > 0 and losses[0] == losses[1]


def test_a_regression_is_held_to_its_number() -> None:
    model = classifier(parametrization="test-channel").eval()
    teacher = Teacher(model)
    for own in (model, teacher.dense):
        own.classifier = torch.nn.Linear(16, 1)
    with torch.no_grad():
        difference = (model(**INPUTS).logits - teacher.dense(**INPUTS).logits).square().mean()
    assert float(teacher.loss(model, INPUTS).detach()) == pytest.approx(float(difference), rel=1e-5)


def test_a_model_without_logits_says_to_pass_distill_false() -> None:
    model = classifier().eval()
    teacher = Teacher(model)
    with pytest.raises(
        OptionError, match="distill: expected a model whose outputs have logits, found .*distill=False$"
    ):
        teacher.loss(lambda **_: {"last_hidden_state": 0}, INPUTS)  # pyright: ignore[reportArgumentType]


def test_without_it_refits_have_the_labels(tmp_path: Path) -> None:
    written = []
    for i, distill in enumerate((True, True, False)):
        trainer = trainer_of(classifier(parametrization="test-channel"), tmp_path / "t")
        trainer.train()
        out = tmp_path / str(i)
        trainer.compress(out, options=CodingOptions(groups=3, refit_steps=3), distill=distill)
        written.append((out / "model.safetensors").read_bytes())
    assert written[0] == written[1] != written[2]


def test_a_run_that_is_resumed_has_the_teacher_of_its_beginning_and_ends_with_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options, state = CodingOptions(groups=4, refit_steps=4), tmp_path / "state"

    def trainer() -> MiracleTrainer:
        return trainer_of(classifier(parametrization="test-channel"), tmp_path / "t")

    whole = trainer()
    whole.train()
    whole.compress(tmp_path / "whole", options=options)

    fitted, loss, calls = trainer(), Teacher.loss, []

    def sixth_step_is_nan(self: Teacher, *given: Any) -> torch.Tensor:
        calls.append(None)  # the first checks the data, the next 12 measure the curvature
        return loss(self, *given) * (float("nan") if len(calls) == 1 + 12 + 6 else 1)

    monkeypatch.setattr(Teacher, "loss", sixth_step_is_nan)
    fitted.train()
    with pytest.raises(TrainingError, match="refit step 5 after group 2"):
        fitted.compress(tmp_path / "out", options=options, checkpoint=state)
    # As `fit` does, the next run codes a model that was not fitted: all that counts is in the files.
    trainer().compress(tmp_path / "out", options=options, checkpoint=state)
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert not state.exists() and not Path(f"{state}-teacher").exists()


@pytest.mark.parametrize(
    ("kind", "shift", "expected"),
    [("regression", 100.0, 10_000.0), ("multi_label_classification", 5.0, None)],
)
def test_a_common_shift_counts_where_outputs_are_no_classes(
    kind: str, shift: float, expected: float | None
) -> None:
    model = classifier(parametrization="test-channel").eval()
    model.config.problem_type = kind
    teacher = Teacher(model)
    with torch.no_grad():
        p = model(**INPUTS).logits.double().sigmoid()
        model.classifier.bias += shift
        q = model(**INPUTS).logits.double().sigmoid()
    kl = float((p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).sum(1).mean())
    found = float(teacher.loss(model, INPUTS).detach())
    assert found == pytest.approx(kl if expected is None else expected, rel=1e-3)


def test_an_encoder_with_a_decoder_is_held_to_what_both_said(tmp_path: Path) -> None:
    config = T5Config(vocab_size=50, d_model=16, d_ff=32, d_kv=8, num_layers=1, num_heads=2)
    config.decoder_start_token_id = 0
    model: Any = make_variational(T5ForConditionalGeneration(config), rate=2.0)
    rows = [{**row, "labels": row["input_ids"]} for row in ROWS]
    trainer = MiracleTrainer(model=model, args=arguments(tmp_path / "t"), train_dataset=rows)
    trainer.compress(tmp_path / "out", options=CodingOptions(groups=2, refit_steps=2))
    T5ForConditionalGeneration.from_pretrained(tmp_path / "out")


def test_what_refits_cannot_use_is_refused_before_anything_is_coded(tmp_path: Path) -> None:
    trainer: Any = MiracleTrainer(model=classifier(), args=arguments(tmp_path / "t"), train_dataset=ROWS)
    with pytest.raises(OptionError, match="^validate: expected one eval_dataset, found NoneType; "):
        trainer.compress(tmp_path / "out", validate=True)
    trainer.train_dataset = []
    with pytest.raises(OptionError, match="^train_dataset: expected .* found an empty one; "):
        trainer.compress(tmp_path / "out")
    assert all(stream.message is None for stream in trainer.variational.streams)


@pytest.mark.parametrize("defect", ["flipped", "gone", "other", "no distillation"])
def test_a_run_is_not_resumed_with_another_teacher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, defect: str
) -> None:
    state, kept = tmp_path / "state", tmp_path / "state-teacher"
    options: dict[str, Any] = {"options": CodingOptions(groups=4, refit_steps=2), "checkpoint": state}
    loss, calls = Teacher.loss, []

    def fourth_is_nan(self: Teacher, *given: Any) -> torch.Tensor:
        calls.append(None)
        return loss(self, *given) * (float("nan") if len(calls) == 4 else 1)

    trainer = trainer_of(classifier(), tmp_path / "t")
    with monkeypatch.context() as patch, pytest.raises(TrainingError):
        patch.setattr(Teacher, "loss", fourth_is_nan)
        trainer.compress(tmp_path / "out", **options)
    data = bytearray(kept.read_bytes())
    if defect == "flipped":
        data[-3] ^= 1
        kept.write_bytes(data)
    elif defect == "gone":
        kept.unlink()
    elif defect == "other":
        other = classifier()
        with torch.no_grad():
            other.classifier.bias += 1
        Teacher(other).keep(kept)
    expected = FormatError if defect in ("flipped", "gone") else OptionError
    again = trainer_of(classifier(), tmp_path / "t")
    with pytest.raises(expected, match="state"):
        again.compress(tmp_path / "out", distill=defect != "no distillation", **options)
    assert state.exists()
    if defect == "no distillation":
        again.compress(tmp_path / "out", **options)


def test_after_a_failure_the_teacher_is_still_the_model_before_coding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, loss, calls, teachers = trainer_of(classifier(), tmp_path / "t"), Teacher.loss, [], set()

    def third_step_is_nan(self: Teacher, *given: Any) -> torch.Tensor:
        calls.append(None)  # the first checks the data
        teachers.add(self.crc)
        return loss(self, *given) * (float("nan") if len(calls) == 1 + 3 else 1)

    monkeypatch.setattr(Teacher, "loss", third_step_is_nan)
    with pytest.raises(TrainingError):
        trainer.compress(tmp_path / "out", options=CodingOptions(groups=4, refit_steps=2))
    trainer.compress(tmp_path / "out", options=CodingOptions(groups=4, refit_steps=2))
    assert len(teachers) == 1


def test_a_model_whose_files_have_other_names_is_written(tmp_path: Path) -> None:
    options: dict[str, Any] = dict(image_size=8, patch_size=4, num_labels=2)
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, **options
    )
    model: Any = make_variational(ViTForImageClassification(config), rate=2.0)
    rows = [{"pixel_values": torch.randn(3, 8, 8), "labels": i % 2} for i in range(16)]
    trainer = MiracleTrainer(model=model, args=arguments(tmp_path / "t"), train_dataset=rows)
    trainer.compress(tmp_path / "out", options=CodingOptions(groups=2, refit_steps=1))
    loaded = ViTForImageClassification.from_pretrained(tmp_path / "out").state_dict()
    for name, tensor in posterior_mean(model).state_dict().items():
        if tensor.ndim > 1 and "projection" not in name:
            assert torch.equal(loaded[name], tensor) or torch.equal(loaded[name], tensor.half().float()), name


def test_a_float16_model_survives_its_refits(tmp_path: Path) -> None:
    half = remove_variational(classifier()).half()
    trainer = trainer_of(make_variational(half, rate=2.0), tmp_path / "t")
    trainer.compress(tmp_path / "out", options=CodingOptions(groups=3, refit_steps=5))
    weights = posterior_mean(half).state_dict()
    assert all(bool(t.isfinite().all()) for t in weights.values())


def test_modules_that_were_frozen_stay_so_in_refits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, loss, modes = (
        trainer_of(classifier(parametrization="test-channel"), tmp_path / "t"),
        Teacher.loss,
        [],
    )
    model: Any = trainer.model
    model.train()
    model.bert.embeddings.eval()

    def watched(self: Teacher, *given: Any) -> torch.Tensor:
        modes.append((model.training, model.bert.encoder.training, model.bert.embeddings.dropout.training))
        return loss(self, *given)

    monkeypatch.setattr(Teacher, "loss", watched)
    trainer.compress(tmp_path / "out", options=CodingOptions(groups=3, refit_steps=1))
    assert modes[0] == (False, False, False)  # data are checked in evaluation mode
    assert len(modes) > 3 and set(modes[1:]) == {(True, True, False)}
