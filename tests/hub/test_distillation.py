"""Refits that hold a model to what it was: the loss, whom it suits, and resumed runs."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from miracle_hub import CodingOptions, MiracleTrainer, make_variational
from miracle_hub.errors import OptionError, TrainingError
from miracle_hub.hub.distillation import Teacher

from .test_trainer import ROWS, arguments, classifier

INPUTS = {
    "input_ids": torch.arange(16).view(2, 8),
    "attention_mask": torch.tensor([[1] * 8, [1] * 5 + [0] * 3]),
}


def trainer_of(model: Any, folder: Path) -> MiracleTrainer:
    return MiracleTrainer(model=model, args=arguments(folder), train_dataset=ROWS)


def test_the_loss_is_the_kl_of_outputs_plus_the_relative_error_of_hidden_states_by_hand() -> None:
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
    assert float(teacher.loss(model, INPUTS).detach()) == pytest.approx(kl + error, rel=1e-4)


def test_what_padding_says_is_of_no_account() -> None:
    model = make_variational(
        GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=16)).eval(),
        bits_per_weight=2.0,
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
    bare = SimpleNamespace(hidden_states=None, last_hidden_state=None)
    with pytest.raises(
        OptionError, match="distill: expected a model whose outputs have logits, found .*distill=False$"
    ):
        teacher.loss(lambda **_: _Outputs(vars(bare)), INPUTS)  # pyright: ignore[reportArgumentType]


class _Outputs(dict):
    logits = None


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

    def seventh_is_nan(self: Teacher, *given: Any) -> torch.Tensor:
        calls.append(None)
        return loss(self, *given) * (float("nan") if len(calls) == 7 else 1)

    monkeypatch.setattr(Teacher, "loss", seventh_is_nan)
    fitted.train()
    with pytest.raises(TrainingError, match="refit step 6 after group 2"):
        fitted.compress(tmp_path / "out", options=options, checkpoint=state)
    # As `fit` does, the next run codes a model that was not fitted: all that counts is in the files.
    trainer().compress(tmp_path / "out", options=options, checkpoint=state)
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert not state.exists() and not Path(f"{state}-teacher").exists()
