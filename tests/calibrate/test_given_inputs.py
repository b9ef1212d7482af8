"""The user's own data become batches of what the model takes, without labels and padding."""

import csv
import json
import wave
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import (
    AutoTokenizer,
    BertForSequenceClassification,
    BertModel,
    LlamaForCausalLM,
    PreTrainedModel,
    ViTForImageClassification,
    ViTImageProcessor,
)

from miracle_hub.calibrate.inputs import Inputs, inputs_of
from tests.calibrate.conftest import TEXTS

Saved = Callable[..., tuple[PreTrainedModel, Path]]


def rows(found: Inputs) -> list[tuple[int, ...]]:
    """Token ids of all rows."""
    batches = [*found.batches, *found.held_out]
    return [tuple(row.tolist()) for batch in batches for row in batch["input_ids"]]


def equal(a: Inputs, b: Inputs) -> bool:
    return a.digest == b.digest and a.said == b.said


def test_a_causal_model_gets_windows_of_one_length_that_follow_each_other(
    saved: Saved, text_file: Path
) -> None:
    model, folder = saved(LlamaForCausalLM)
    found = inputs_of(model, folder, text_file, n_tokens=10_000, max_length=16)
    assert {len(row) for row in rows(found)} == {16}
    assert all(set(batch) == {"input_ids"} for batch in found.batches)
    stream = "\n".join(TEXTS) + "\n"
    ids = AutoTokenizer.from_pretrained(folder)(stream, add_special_tokens=False)["input_ids"]
    windows = {tuple(ids[i : i + 16]) for i in range(0, len(ids) - 15, 16)}
    assert set(rows(found)) == windows
    assert found.n_tokens == 16 * sum(len(batch["input_ids"]) for batch in found.batches)


def test_the_first_batches_are_from_everywhere(saved: Saved) -> None:
    """What is measured on some of them, as what errors cost, is measured on data of all kinds."""
    model, folder = saved(LlamaForCausalLM)
    found = inputs_of(model, folder, TEXTS, n_tokens=10_000, max_length=16, batch_rows=1)
    stream = "".join(text + "\n\n" for text in TEXTS)
    ids = AutoTokenizer.from_pretrained(folder)(stream, add_special_tokens=False)["input_ids"]
    places = {tuple(ids[i : i + 16]): i / len(ids) for i in range(0, len(ids) - 15, 16)}
    begins = [places[tuple(batch["input_ids"][0].tolist())] for batch in found.batches]
    first = begins[: len(begins) // 4]
    assert min(first) < 0.2 and max(first) > 0.8


def test_windows_are_never_longer_than_the_models_positions(saved: Saved, text_file: Path) -> None:
    model, folder = saved(LlamaForCausalLM)
    assert {len(row) for row in rows(inputs_of(model, folder, text_file, n_tokens=10_000))} == {32}


def test_an_encoder_gets_sentences_of_their_own_lengths_without_padding(
    saved: Saved, text_file: Path
) -> None:
    model, folder = saved(BertModel)
    found = inputs_of(model, folder, text_file, n_tokens=10_000, batch_rows=4)
    assert len({len(row) for row in rows(found)}) > 3
    assert all(batch["attention_mask"].all() and len(batch["input_ids"]) <= 4 for batch in found.batches)
    assert all(row[0] == 2 and row[-1] == 3 and 0 not in row for row in rows(found))


def test_no_row_is_there_twice_and_none_held_out_is_calibrated_on(saved: Saved) -> None:
    model, folder = saved(BertModel)
    found = inputs_of(model, folder, [*TEXTS, *TEXTS], n_tokens=10_000)
    assert len(rows(found)) == len(set(rows(found))) and "repeated ones left out" in found.said
    n_aside = sum(len(batch["input_ids"]) for batch in found.held_out)
    assert n_aside == len(rows(found)) // 8


def test_the_same_arguments_give_the_same_inputs_and_another_seed_others(
    saved: Saved, text_file: Path
) -> None:
    model, folder = saved(BertModel)
    first, again, other = (inputs_of(model, folder, text_file, n_tokens=300, seed=s) for s in (0, 0, 1))
    assert equal(first, again) and not equal(first, other)
    assert 200 <= first.n_tokens <= 330


def test_all_forms_of_texts_are_the_same_texts(saved: Saved, tmp_path: Path) -> None:
    model, folder = saved(BertModel)
    with (tmp_path / "t.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *((text, "1") for text in TEXTS)])
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"text": t, "label": 1}) + "\n" for t in TEXTS))
    data_set = Dataset.from_dict({"text": TEXTS, "label": [1] * len(TEXTS)})
    forms: list[Any] = [TEXTS, tmp_path / "t.csv", str(tmp_path / "t.jsonl"), data_set, iter(TEXTS)]
    found = [inputs_of(model, folder, form, n_tokens=500) for form in forms]
    assert len({one.digest for one in found}) == 1
    assert "not used: 'label'" in found[1].said


def test_both_columns_of_pairs_are_texts_of_their_own_but_for_a_classifier_of_pairs(saved: Saved) -> None:
    pairs = Dataset.from_dict({"a": TEXTS[:60], "b": TEXTS[60:120], "score": [0.5] * 60})
    model, folder = saved(BertModel)
    assert len(rows(inputs_of(model, folder, pairs, n_tokens=10_000))) == len(set(TEXTS[:120]))
    model, folder = saved(BertForSequenceClassification)
    assert all(row.count(3) == 2 for row in rows(inputs_of(model, folder, pairs, n_tokens=10_000)))


def test_batches_of_a_models_inputs_lose_labels_and_padding(saved: Saved) -> None:
    model, folder = saved(BertModel)
    ids = torch.arange(5, 21).repeat(20, 1) % torch.arange(6, 26)[:, None]
    mask = (torch.arange(16) < torch.arange(5, 25)[:, None].clamp(max=16)).long()
    batches = [{"input_ids": ids[i : i + 5], "attention_mask": mask[i : i + 5]} for i in range(0, 20, 5)]
    for batch in batches:
        batch["labels"] = torch.zeros(5, dtype=torch.long)
    found = inputs_of(model, folder, batches, n_tokens=1000)
    assert "not used: labels" in found.said
    assert all(batch["attention_mask"].all() and "labels" not in batch for batch in found.batches)
    assert {len(row) for row in rows(found)} == set(range(5, 17))


@pytest.mark.parametrize("form", ["npz", "npy", "tensor", "loader"])
def test_a_plain_module_gets_arrays_under_the_name_of_its_argument(form: str, tmp_path: Path) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 2)

        def forward(self, features: torch.Tensor) -> torch.Tensor:
            return self.linear(features)

    x = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
    np.savez(tmp_path / "x.npz", features=x.numpy(), labels=np.zeros(40))
    np.save(tmp_path / "x.npy", x.numpy())
    data = {
        "npz": tmp_path / "x.npz",
        "npy": tmp_path / "x.npy",
        "tensor": x,
        "loader": DataLoader(TensorDataset(x, torch.zeros(40)), 10),
    }[form]
    found = inputs_of(Net(), tmp_path, data, n_tokens=1000)
    kept = torch.cat([batch["features"] for batch in (*found.batches, *found.held_out)])
    assert sorted(map(tuple, kept.tolist())) == sorted(map(tuple, x.tolist()))


def test_a_vision_net_gets_a_folder_of_images_through_its_processor(saved: Saved, tmp_path: Path) -> None:
    model, folder = saved(ViTForImageClassification)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    (tmp_path / "photos" / "cats").mkdir(parents=True)
    noise = np.random.default_rng(0).integers(0, 256, (24, 20, 20, 3), dtype=np.uint8)
    for i, pixels in enumerate(noise):
        Image.fromarray(pixels).save(tmp_path / "photos" / ("cats" if i % 2 else ".") / f"{i}.png")
    found = inputs_of(model, folder, tmp_path / "photos", n_tokens=10**6)
    assert found.batches[0]["pixel_values"].shape[1:] == (3, 16, 16) and "24 of 24 images" in found.said
    pictures = [Image.fromarray(pixels) for pixels in noise]
    assert len(inputs_of(model, folder, pictures, n_tokens=10**6).batches) == len(found.batches)


def test_a_speech_model_gets_sounds_and_says_itself_what_is_said(speech: Any, tmp_path: Path) -> None:
    model, folder = speech
    (tmp_path / "sounds").mkdir()
    samples = np.random.default_rng(0).integers(-9999, 9999, (10, 8000), dtype=np.int16)
    for i, some in enumerate(samples):
        with wave.open(str(tmp_path / "sounds" / f"{i}.wav"), "wb") as file:
            file.setparams((1, 2, 8000, 0, "NONE", ""))
            file.writeframes(some.tobytes())
    found = inputs_of(model, folder, tmp_path / "sounds", n_tokens=10**6)
    batch = found.batches[0]
    assert batch["input_features"].shape[1:] == (80, 100) and batch["decoder_input_ids"].shape[1] >= 1
    assert (batch["decoder_input_ids"][:, 0] == 2).all() and "written by the model" in found.said
    fewest = inputs_of(model, folder, tmp_path / "sounds", n_tokens=1)
    assert "; 6 rows to calibrate on, 2 held out" in fewest.said
