"""MiracleTrainer: the penalty under accumulation, annealing, logs, checkpoints, and what it compresses to."""

import math
from functools import wraps
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from miracle_hub import (
    CodingOptions,
    MiracleConfig,
    MiracleTrainer,
    kl_penalty,
    make_variational,
    posterior_mean,
)
from miracle_hub.errors import OptionError, OutputExistsError, TrainingError
from miracle_hub.training.model import variational_of

ROWS = [
    {"input_ids": torch.arange(i, i + 8) % 50, "attention_mask": torch.ones(8).long(), "labels": i % 2}
    for i in range(32)
]


def classifier(**options: Any) -> Any:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=200,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return make_variational(
        BertForSequenceClassification(config),
        MiracleConfig(rate=1.5, **{"parametrization": "mean-kl", **options}),
    )


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    given: dict[str, Any] = dict(
        max_steps=4, per_device_train_batch_size=8, learning_rate=1e-3, report_to=[], use_cpu=True
    )
    given |= dict(save_strategy="no", disable_tqdm=True, dataloader_pin_memory=False)
    return TrainingArguments(str(folder), **(given | options))


def test_two_micro_batches_make_the_same_gradient_as_one_batch_penalty_included(tmp_path: Path) -> None:
    """Had the penalty been added once per micro-batch, it would count twice."""
    gradients = []
    for accumulated in (1, 2):
        model = classifier(parametrization="mean-var", beta=0.5)
        options: dict[str, Any] = dict(
            per_device_train_batch_size=8 // accumulated, gradient_accumulation_steps=accumulated
        )
        trainer = MiracleTrainer(
            model=model, args=arguments(tmp_path, max_steps=1, **options), train_dataset=ROWS[:8]
        )
        found: dict[str, torch.Tensor] = {}

        class Catch(TrainerCallback):
            def on_pre_optimizer_step(
                self, *a: Any, model: Any = None, found: dict = found, **k: Any
            ) -> None:
                found |= {n: p.grad.clone() for n, p in model.named_parameters() if n.endswith("log_std")}

        trainer.add_callback(Catch())
        trainer.args.max_grad_norm = 0.0
        trainer.train()
        gradients.append(torch.cat([g.flatten() for g in found.values()]))
    # Standard deviations start at e^-10, where the data's gradient is nothing beside the KL's.
    assert torch.allclose(gradients[0], gradients[1], rtol=1e-3)
    assert float(gradients[0].abs().max()) > 0.1


def test_beta_moves_once_per_step_of_the_optimizer(tmp_path: Path) -> None:
    model = classifier(parametrization="mean-var", beta_rate=0.01)
    posterior: Any = variational_of(model).streams[0].posterior
    before = posterior.annealing.beta()
    options: dict[str, Any] = dict(per_device_train_batch_size=4, gradient_accumulation_steps=2, max_steps=3)
    MiracleTrainer(model=model, args=arguments(tmp_path, **options), train_dataset=ROWS).train()
    moved = (posterior.annealing.beta() / before).log().abs()
    assert torch.allclose(moved, torch.full_like(moved, 3 * math.log(1.01)))


def test_logs_have_the_kl(tmp_path: Path) -> None:
    model = classifier()
    trainer = MiracleTrainer(model=model, args=arguments(tmp_path, logging_steps=2), train_dataset=ROWS)
    trainer.train()
    logged = [entry["kl_bits"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 2 and logged[0] == pytest.approx(variational_of(model).kl_bits())


def test_evaluation_has_no_penalty(tmp_path: Path) -> None:
    model = classifier(parametrization="mean-var", beta=10.0)
    trainer = MiracleTrainer(model=model, args=arguments(tmp_path), train_dataset=ROWS, eval_dataset=ROWS)
    assert trainer.evaluate()["eval_loss"] < 2 < float(kl_penalty(model).detach())


def test_posteriors_are_never_decayed(tmp_path: Path) -> None:
    model = classifier()
    trainer = MiracleTrainer(model=model, args=arguments(tmp_path, weight_decay=0.1), train_dataset=ROWS)
    assert not [n for n in trainer.get_decay_parameter_names(model) if "tau" in n or "alpha" in n]


def test_training_goes_on_from_a_checkpoint_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    ends = []
    for stop in (False, True):
        folder = tmp_path / str(stop)
        options: dict[str, Any] = dict(max_steps=4, save_strategy="steps", save_steps=2)
        model = classifier()
        MiracleTrainer(model=model, args=arguments(folder, **options), train_dataset=ROWS).train()
        if stop:
            model = classifier()
            trainer = MiracleTrainer(model=model, args=arguments(folder, **options), train_dataset=ROWS)
            trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*ends)


@pytest.mark.parametrize("parametrization", ["mean-kl", "mean-var", "test-channel"])
def test_what_it_compresses_loads_with_plain_from_pretrained(tmp_path: Path, parametrization: str) -> None:
    model = classifier(parametrization=parametrization)
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()
    trainer = MiracleTrainer(
        model=model,
        args=arguments(tmp_path / "t"),
        train_dataset=ROWS,
        eval_dataset=ROWS,
    )
    trainer.train()
    options = CodingOptions(groups=3, refit_steps=2)
    report = trainer.compress(tmp_path / "out", options=options, validate=True, log_folder=tmp_path / "log")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    dense = posterior_mean(model).state_dict()
    assert report.compressed_bytes == (tmp_path / "out" / "model.safetensors").stat().st_size
    for name, tensor in loaded.state_dict().items():
        same = tensor if tensor.ndim > 1 else tensor.half().float()
        assert torch.equal(same, dense[name] if tensor.ndim > 1 else dense[name].half().float()), name
    assert {path.name for path in (tmp_path / "log").iterdir()} == {
        "coding.csv",
        "coding.json",
        "coding.png",
    }


def test_a_repository_of_a_given_size_codes_the_other_tensors_too(tmp_path: Path) -> None:
    model = classifier(target_modules="all-linear")
    trainer = MiracleTrainer(model=model, args=arguments(tmp_path / "t"), train_dataset=ROWS)
    options = CodingOptions(groups=1, refit_steps=0)
    plain = trainer.compress(tmp_path / "plain", options=options).compressed_bytes
    coded = trainer.compress(tmp_path / "coded", options=options, size="6kB").compressed_bytes
    assert 5900 < coded <= 6000 < plain
    AutoModelForSequenceClassification.from_pretrained(tmp_path / "coded")


def test_the_plain_trainer_fits_mean_kl_with_tied_weights(tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=16)
    model: Any = make_variational(GPT2LMHeadModel(config), rate=2.0)
    rows: Any = [{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in ROWS]
    options: dict[str, Any] = dict(save_strategy="steps", save_steps=2)
    Trainer(model=model, args=arguments(tmp_path / "t", **options), train_dataset=rows).train()
    trainer = MiracleTrainer(model=model, args=arguments(tmp_path / "t"), train_dataset=rows)
    trainer.compress(tmp_path / "out", options=CodingOptions(groups=2, refit_steps=1))
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(loaded.lm_head.weight, posterior_mean(model).lm_head.weight)  # pyright: ignore
    assert loaded.lm_head.weight is loaded.transformer.wte.weight


def test_a_loss_that_is_nan_stops_with_the_step_and_a_sound_model(tmp_path: Path) -> None:
    model = classifier()
    model.register_buffer("n_batches", torch.zeros(()))  # as a batch norm counts them
    trainer = MiracleTrainer(model=model, args=arguments(tmp_path, learning_rate=0.0), train_dataset=ROWS)
    forward, calls = model.forward, []

    @wraps(forward)
    def third_is_nan(**inputs: Any) -> Any:
        calls.append(None)
        model.n_batches += 1
        outputs = forward(**inputs)
        outputs.loss = outputs.loss * (float("nan") if len(calls) == 3 else 1.0)
        return outputs

    model.forward = third_is_nan
    with pytest.raises(TrainingError, match="^step 2: expected a finite loss, found nan; the model is as it"):
        trainer.train()
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())
    assert float(model.n_batches) == 2


def test_a_model_without_posteriors_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="call make_variational"):
        MiracleTrainer(model=posterior_mean(classifier()), args=arguments(tmp_path), train_dataset=ROWS)


def test_an_output_that_exists_is_refused_before_anything_is_coded(tmp_path: Path) -> None:
    model = classifier()
    trainer = MiracleTrainer(model=model, args=arguments(tmp_path / "t"), train_dataset=ROWS)
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputExistsError):
        trainer.compress(tmp_path / "out")
    assert variational_of(model).streams[0].message is None


def test_modules_to_save_are_trained_and_stored_to_the_last_bit(tmp_path: Path) -> None:
    """Other vectors may be stored in 16 bits; a regular expression selects modules, not parts of names."""
    model = classifier(modules_to_save=r"classifier|.*LayerNorm")
    trainer = MiracleTrainer(model=model, args=arguments(tmp_path / "t"), train_dataset=ROWS)
    trainer.train()
    trainer.compress(tmp_path / "out", options=CodingOptions(groups=1, refit_steps=0))
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").state_dict()
    dense = posterior_mean(model).state_dict()
    kept = [name for name in dense if "classifier" in name or "LayerNorm" in name]
    assert len(kept) == 8 and all(torch.equal(loaded[name], dense[name]) for name in kept)
