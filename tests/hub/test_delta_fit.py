"""Fine-tuning for a difference: priors around a base, and the repository that only adds to it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForSequenceClassification, BertConfig, BertModel, TrainingArguments

import miracle_hub
from miracle_hub import CodingOptions, MiracleConfig, MiracleTrainer, make_variational, posterior_mean, save
from miracle_hub.errors import BaseModelError, BudgetError, OptionError, SourceError
from miracle_hub.training.config import PARAMETRIZATIONS
from miracle_hub.training.model import variational_of

ROWS = [
    {"input_ids": torch.arange(i, i + 8) % 50, "attention_mask": torch.ones(8).long(), "labels": i % 2}
    for i in range(32)
]
SIZES: dict[str, Any] = dict(
    vocab_size=200, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128,
    max_position_embeddings=16, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
)  # fmt: skip


def make_base(folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """An encoder, whose biases and norms are such as a training leaves."""
    torch.manual_seed(0)
    model = BertModel(BertConfig(**SIZES))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.01 * torch.randn(parameter.shape)
    nn.Module.to(model, dtype)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"))


def headed(base: Path, **options: Any) -> Any:
    torch.manual_seed(1)
    return AutoModelForSequenceClassification.from_pretrained(base, num_labels=2, **options)


def fitted(model: Any, out: Path, steps: int = 6) -> miracle_hub.Report:
    """Trained a little, coded, and written."""
    arguments = TrainingArguments(
        f"{out}-trainer", max_steps=steps, per_device_train_batch_size=8, learning_rate=2e-3, report_to=[],
        use_cpu=True, save_strategy="no", disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = MiracleTrainer(model=model, args=arguments, train_dataset=ROWS)
    trainer.train()
    return trainer.compress(out, options=CodingOptions(groups=3, refit_steps=2, learning_rate=1e-3))


def loaded_from(out: Path, base: Path, **options: Any) -> Any:
    config = MiracleConfig(base=base)
    model, info = AutoModelForSequenceClassification.from_pretrained(
        out, quantization_config=config, output_loading_info=True, **options
    )
    assert not any(info.values())
    return model


def assert_equal_states(one: nn.Module, other: nn.Module) -> None:
    ours, theirs = one.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


@pytest.mark.parametrize("parametrization", PARAMETRIZATIONS)
def test_what_is_loaded_is_what_was_trained_and_the_rest_is_the_bases(
    base: Path, tmp_path: Path, parametrization: str
) -> None:
    config = MiracleConfig(size="6kB", base=base, parametrization=parametrization)
    model = make_variational(headed(base), config)
    report = fitted(model, tmp_path / "out")
    loaded = loaded_from(tmp_path / "out", base)
    assert_equal_states(loaded, posterior_mean(model))
    inputs = {"input_ids": ROWS[0]["input_ids"][None]}
    assert torch.equal(loaded(**inputs).logits, model.eval()(**inputs).logits)
    held, theirs = load_file(tmp_path / "out" / "model.safetensors"), load_file(base / "model.safetensors")
    own = {name.removeprefix("bert."): tensor for name, tensor in loaded.state_dict().items()}
    differing = {name for name in theirs if not torch.equal(own[name], theirs[name])}
    coded = {name.removeprefix("bert.") for name, entry in held.items() if entry.dtype == torch.uint8}
    assert differing == coded and len(coded) == 13  # six of every layer, and the pooler
    assert set(held) == {f"bert.{name}" for name in coded} | {"classifier.weight", "classifier.bias"}
    assert report.n_differing == 13 and report.n_same == len(theirs) - 13
    assert 0.99 * 6000 <= report.compressed_bytes <= 6000 == report.budget_bytes


def test_priors_are_around_the_base_and_posteriors_start_at_it(base: Path) -> None:
    model = make_variational(headed(base), rate=0.25, base=base)
    config = variational_of(model).config
    assert (config.parametrization, config.scales) == ("mean-kl", "tensor")
    assert_equal_states(posterior_mean(model), headed(base))
    for stream in variational_of(model).streams:
        assert not stream.moments()[0].any()
        power = stream.layout.base.square().mean()  # pyright: ignore[reportOptionalMemberAccess]
        assert float(stream.scales().detach()) == pytest.approx(0.05 * float(power.sqrt()), rel=1e-4)


def test_only_what_is_coded_or_new_is_trained(base: Path) -> None:
    model = make_variational(headed(base), rate=0.25, base=base, modules_to_save=["LayerNorm"])
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    plain = {name for name in trained if "parametrizations" not in name}
    assert {"classifier.weight", "classifier.bias"} < plain
    assert all("LayerNorm" in name or "classifier" in name for name in plain)
    assert len(plain) == 2 + 2 * 5 and len(trained) > len(plain)


def test_vectors_of_the_base_keep_all_bits_beside_a_rate(base: Path, tmp_path: Path) -> None:
    """Without a base those that float16 holds are rounded."""
    model = make_variational(headed(base), rate=0.25, base=base)
    fitted(model, tmp_path / "out")
    bias = "embeddings.LayerNorm.bias"
    assert torch.equal(model.get_parameter(f"bert.{bias}"), load_file(base / "model.safetensors")[bias])
    assert_equal_states(loaded_from(tmp_path / "out", base), posterior_mean(model))


def test_a_tensor_that_is_changed_all_the_same_is_stored(base: Path, tmp_path: Path) -> None:
    model = make_variational(headed(base), rate=0.25, base=base)
    with torch.no_grad():
        model.get_parameter("bert.embeddings.LayerNorm.bias").add_(1 / 3)
    report = fitted(model, tmp_path / "out")
    assert "bert.embeddings.LayerNorm.bias" in report.plain
    assert_equal_states(loaded_from(tmp_path / "out", base), posterior_mean(model))


def test_a_fine_tune_made_variational_starts_where_it_is(base: Path, tmp_path: Path) -> None:
    tuned = headed(base)
    with torch.no_grad():
        for parameter in tuned.bert.parameters():
            parameter += 1e-3 * torch.randn(parameter.shape)
    before = {name: tensor.clone() for name, tensor in tuned.state_dict().items()}
    model = make_variational(tuned, rate=2.0, base=base, parametrization="test-channel")
    for name, tensor in posterior_mean(model).state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=1e-6)
    fitted(model, tmp_path / "out", steps=1)
    assert_equal_states(loaded_from(tmp_path / "out", base), posterior_mean(model))


def test_weights_of_16_bits_are_the_rounded_sum(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", torch.bfloat16)
    model = make_variational(headed(base, dtype=torch.bfloat16), rate=0.5, base=base)
    fitted(model, tmp_path / "out")
    loaded = loaded_from(tmp_path / "out", base)
    assert loaded.bert.pooler.dense.weight.dtype == torch.bfloat16
    assert_equal_states(loaded, posterior_mean(model))


def test_a_size_for_the_rest_codes_what_changed_beside_the_fit(base: Path, tmp_path: Path) -> None:
    """Vectors that were trained are differences too, as in `compress` with a base."""
    options: dict[str, Any] = {"target_modules": r".*encoder.*", "exclude_modules": r".*output.*"}
    model = make_variational(headed(base), rate=0.25, base=base, **options)
    with torch.no_grad():
        model.get_parameter("bert.pooler.dense.weight").add_(0.01 * torch.randn(64, 64))
    trainer = MiracleTrainer(model=model, args=TrainingArguments(str(tmp_path / "t"), use_cpu=True))
    report = trainer.compress(tmp_path / "out", size="8kB", options=CodingOptions(groups=2, refit_steps=0))
    assert report.compressed_bytes <= 8000
    stated = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert "bert.pooler.dense.weight" in stated["base_model"]["tensors"]
    assert_equal_states(loaded_from(tmp_path / "out", base), posterior_mean(model))


def test_another_base_is_refused_when_it_is_loaded(base: Path, tmp_path: Path) -> None:
    model = make_variational(headed(base), rate=0.25, base=base)
    fitted(model, tmp_path / "out", steps=1)
    with pytest.raises(BaseModelError, match="expected to be told where the base is"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    other = headed(base).bert
    with torch.no_grad():
        other.embeddings.LayerNorm.bias += 1
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(BaseModelError, match=r"LayerNorm\.bias: expected the base's tensor of digest"):
        loaded_from(tmp_path / "out", tmp_path / "other")


def test_what_cannot_be_a_difference_is_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="base: expected streams='tensor', whose repository states"):
        MiracleConfig(message_bits=2000, streams="network", base=base).variational()
    with pytest.raises(OptionError, match="base: expected a model of transformers, .* found Linear; leave"):
        make_variational(nn.Linear(8, 8), rate=1.0, base=base)
    with pytest.raises(OptionError, match="expected a model without a base, which this file cannot state"):
        save(make_variational(headed(base), rate=0.25, base=base), tmp_path / "file.safetensors")
    torch.manual_seed(0)
    narrow: dict[str, Any] = {**SIZES, "hidden_size": 32}
    BertModel(BertConfig(**narrow)).save_pretrained(tmp_path / "small")
    with pytest.raises(OptionError, match="expected weights to code that the base has, found none of "):
        make_variational(headed(base), rate=0.25, base=tmp_path / "small")
    others = ("hidden_size", "intermediate_size", "vocab_size", "max_position_embeddings", "type_vocab_size")
    sizes: dict[str, Any] = {**SIZES, **dict.fromkeys(others, 24)}
    BertModel(BertConfig(**sizes)).save_pretrained(tmp_path / "other")
    with pytest.raises(SourceError, match="expected a base with tensors of the names and shapes"):
        make_variational(headed(base), rate=0.25, base=tmp_path / "other")
    with pytest.raises(BudgetError, match="but the file of this model can have"):
        make_variational(headed(base), size="1kB", base=base)
