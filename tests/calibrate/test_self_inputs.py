"""Inputs without data: what each family of models makes for itself."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    BertForMaskedLM,
    BertModel,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    PreTrainedModel,
    ResNetForImageClassification,
    T5ForConditionalGeneration,
    ViTForImageClassification,
    ViTImageProcessor,
)

from miracle_hub.calibrate.inputs import Inputs, inputs_of
from miracle_hub.calibrate.written import continued
from miracle_hub.errors import CalibrationError
from tests.calibrate.conftest import tokenizer

# Sizes that have names of their own.
OF_OTHER_NAMES: dict[Any, dict[str, Any]] = {
    T5ForConditionalGeneration: dict(decoder_start_token_id=0, d_kv=4, num_heads=2, d_ff=16, num_layers=1),
    ResNetForImageClassification: dict(embedding_size=8, hidden_sizes=[8], depths=[1]),
    GPT2LMHeadModel: dict(n_embd=8, n_layer=1, n_head=2, n_positions=32),
}
Saved = Callable[..., tuple[PreTrainedModel, Path]]


def all_rows(found: Inputs, name: str) -> torch.Tensor:
    return torch.cat([batch[name] for batch in (*found.batches, *found.held_out)])


@pytest.mark.parametrize(
    ("cls", "name"),
    [
        (LlamaForCausalLM, "input_ids"),
        (GPT2LMHeadModel, "input_ids"),
        (BertModel, "input_ids"),
        (BertForMaskedLM, "input_ids"),
        (T5ForConditionalGeneration, "decoder_input_ids"),
        (ViTForImageClassification, "pixel_values"),
        (ResNetForImageClassification, "pixel_values"),
    ],
)
def test_every_family_makes_inputs_that_it_runs_on_and_the_same_ones_again(
    cls: type[PreTrainedModel], name: str, saved: Saved
) -> None:
    model, folder = saved(cls, **OF_OTHER_NAMES.get(cls, {}))
    if name == "pixel_values":
        ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    found, again, other = (inputs_of(model, folder, "self", n_tokens=400, seed=s) for s in (0, 0, 1))
    assert found.digest == again.digest != other.digest and found.said.startswith("self: ")
    assert found.n_tokens >= 400 * 8 / 7 * 3 / 4 and len(found.held_out) >= 1 and name in found.batches[0]
    with torch.no_grad():
        for batch in (*found.batches, *found.held_out):
            model(**batch)


def test_a_causal_model_draws_every_token_from_what_it_predicts(saved: Saved) -> None:
    """With and without its cache the same generator draws the same tokens, as often as they are likely."""
    model, _ = saved(LlamaForCausalLM)
    first = torch.full((4000, 1), 5)
    ids = continued(model, first, 3, torch.Generator().manual_seed(0))
    with torch.no_grad():
        p = model(input_ids=first[:1]).logits[0, -1].softmax(-1)
    found = ids[:, 1].bincount(minlength=len(p)) / len(ids)
    assert (found - p).abs().max() < 5 * (p.max() / len(ids)) ** 0.5
    likeliest = continued(model, first[:2], 9, None)
    with torch.no_grad():
        logits = model(input_ids=likeliest).logits
    assert torch.equal(logits[:, :-1].argmax(-1), likeliest[:, 1:])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_predictions_that_are_not_finite_are_refused(value: float, saved: Saved) -> None:
    model, _ = saved(LlamaForCausalLM)
    with torch.no_grad():
        model.lm_head.weight[3:5, 1] = torch.tensor([value, -value])  # one of them predicts +inf
    for generator in (torch.Generator(), None):
        with pytest.raises(CalibrationError, match="expected predictions to write texts by"):
            continued(model, torch.full((2, 1), 5), 3, generator)


@pytest.mark.parametrize("begins", [True, False])
def test_texts_begin_at_any_token_and_with_the_one_of_beginning_where_the_tokenizer_has_it(
    begins: bool, saved: Saved
) -> None:
    model, folder = saved(LlamaForCausalLM)
    if begins:
        tokenizer(has_ends=True).save_pretrained(folder)
    starts = all_rows(inputs_of(model, folder, "self", n_tokens=32 * 60), "input_ids")[:, :2]
    assert len(starts[:, 1].unique()) > 10
    assert (starts[:, 0] == 2).all() if begins else len(starts[:, 0].unique()) > 10


def test_words_of_a_vocabulary_stand_between_special_tokens_and_pieces_after_words(saved: Saved) -> None:
    model, folder = saved(BertModel)
    found = inputs_of(model, folder, "self", n_tokens=4000)
    for batch in found.batches:
        ids = batch["input_ids"]
        assert (ids[:, 0] == 2).all() and (ids[:, -1] == 3).all()
        assert (ids[:, 1:-1] > 4).all() and (ids[:, 1] < 22).all()
    assert len({batch["input_ids"].shape[1] for batch in found.batches}) > 3


def test_a_masked_model_fills_sequences_with_what_it_predicts(saved: Saved) -> None:
    model, folder = saved(BertForMaskedLM)
    with torch.no_grad():
        model.get_parameter("cls.predictions.bias")[[10, 11]] += 30
    found = inputs_of(model, folder, "self", n_tokens=600, max_length=16)
    ids = torch.cat([batch["input_ids"][:, 1:-1].flatten() for batch in found.batches])
    assert torch.isin(ids, torch.tensor([10, 11])).float().mean() > 0.99


class Conv(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv2d(1, 4, 5), nn.Linear(4 * (size - 4) ** 2, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.conv(x).flatten(1))


@pytest.mark.parametrize("size", [28, 32])
def test_a_plain_convolutional_net_gets_images_of_the_size_that_it_takes(size: int, tmp_path: Path) -> None:
    found = inputs_of(Conv(size).eval(), tmp_path, "self", n_tokens=2000)
    assert found.batches[0]["x"].shape[1:] == (1, size, size)


class Norms(nn.Module):
    """A net whose first batch norm has seen images of a strange color."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.conv(x)).relu()


def test_a_net_with_batch_norms_sees_images_with_the_statistics_that_it_remembers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Norms().train()
    for _ in range(100):
        model(0.3 * torch.randn(8, 3, 16, 16) + torch.tensor([1.5, -1.0, 0.2])[:, None, None])
    x = all_rows(inputs_of(model.eval(), tmp_path, "self", n_tokens=64 * 64), "x")
    found = model.conv(x).mean((0, 2, 3))
    before = (model.conv(torch.zeros(1, 3, 8, 8)).mean((0, 2, 3)) - model.norm.running_mean).square().sum()
    assert (found - model.norm.running_mean).square().sum() < 0.1 * before
    assert all(p.requires_grad for p in model.parameters())


def test_images_have_amplitudes_that_fall_with_frequency(tmp_path: Path) -> None:
    x = all_rows(inputs_of(Conv(32).eval(), tmp_path, "self", n_tokens=64 * 200), "x")
    power = torch.fft.rfft2(x - x.mean((2, 3), keepdim=True)).abs().square().mean((0, 1))
    slope = (power[1, 0] / power[8, 0]).log() / torch.tensor(8.0).log()
    assert 1.5 < slope < 4
    assert x.min() >= 0 and x.max() <= 1


def test_a_speech_model_hears_babble_and_answers(speech: Any) -> None:
    model, folder = speech
    found = inputs_of(model, folder, "self", n_tokens=3000)
    features = all_rows(found, "input_features")
    assert features.shape[1:] == (80, 100) and features.std() > 0.1
    assert all((batch["decoder_input_ids"][:, 0] == 2).all() for batch in found.batches)
