"""Data that a model cannot take are refused by name: what was expected, what was found, where, what to do."""

import wave
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from transformers import (
    BertModel,
    CLIPConfig,
    CLIPModel,
    LlamaForCausalLM,
    ViTForImageClassification,
    ViTImageProcessor,
)

from miracle_hub.calibrate.inputs import inputs_of
from miracle_hub.errors import CalibrationError, DataError, SourceError
from tests.calibrate.conftest import TEXTS
from tests.sweep.tiny import filled, tiny_config

Saved = Callable[..., tuple[Any, Path]]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of data of many kinds."""
    folder = tmp_path_factory.mktemp("files") / "data"
    for name in ("photos", "sounds", "one", "nothing"):
        (folder / name).mkdir(parents=True)
    for i in range(12):
        pixels = np.random.default_rng(i).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "photos" / f"{i}.png")
        Image.new("RGB", (16, 16), "red").save(folder / "one" / f"{i}.png")
    with wave.open(str(folder / "sounds" / "a.wav"), "wb") as file:
        file.setparams((1, 2, 8000, 0, "NONE", ""))
        file.writeframes(bytes(8000))
    (folder / "short.txt").write_text("a cat sat on the mat.\n")
    (folder / "blank.txt").write_text("\n \n")
    (folder / "empty.txt").write_text("")
    (folder / "texts.txt").write_text("\n".join(TEXTS))
    (folder / "numbers.csv").write_text("a,b\n1,2\n3,4\n")
    (folder / "broken.wav").write_bytes(b"RIFF and no more")
    for name, ids in (("high", 99), ("low", -1)):
        np.savez(folder / f"{name}.npz", input_ids=np.full((20, 4), ids) + np.arange(20)[:, None] * 0)
    np.savez(folder / "nan.npz", pixel_values=np.full((20, 3, 16, 16), np.nan, np.float32))
    np.savez(folder / "other.npz", pixels=np.zeros((20, 3, 16, 16), np.float32))
    np.savez(folder / "small.npz", pixel_values=np.random.default_rng(0).random((20, 3, 8, 8), np.float32))
    return folder


OF_TEXTS = {
    "photos": "takes texts, found a folder of images or sounds; BertModel takes texts",
    "sounds": "takes texts, found a folder of images or sounds; BertModel takes texts",
    "short.txt": "expected at least 8 rows that differ, of which some are held out, found 1",
    "blank.txt": "expected texts, found 2 rows without any",
    "empty.txt": "with rows, found an empty one",
    "numbers.csv": "expected columns of texts, found 0 that may be",
    "high.npz": "input_ids: expected tokens from 0 to 24, of which the model has embeddings, found 99 to 99",
    "low.npz": "input_ids: expected tokens from 0 to 24, of which the model has embeddings, found -1 to -1",
    "other.npz": "expected inputs of the model (attention_mask, ",
    "absent.txt": "expected a file",
    "broken.wav": "takes texts, found a file that ends in '.wav'",
    "nothing": "expected a file",
}
OF_IMAGES = {
    "one": "expected rows that differ, found 12 equal ones",
    "nan.npz": "expected finite numbers, found 15360 of 15360 that are NaN or infinite",
    "small.npz": "expected inputs that ViTForImageClassification takes, found pixel_values torch.float32",
    "texts.txt": "expected an image",
    "numbers.csv": "takes images, found a file that ends in '.csv'",
    "sounds": "found no image",
}
OF_SOUNDS = {
    "photos": "expected sounds (a wav file, or a folder of them), found none",
    "texts.txt": "expected sounds (a wav file, or a folder of them), found none",
    "broken.wav": "expected a wav of whole numbers (PCM)",
    "sounds": "expected at least 8 rows that differ",
}
REFUSED = {"an encoder": OF_TEXTS, "a vision net": OF_IMAGES, "a speech model": OF_SOUNDS}


def model_of(kind: str, request: pytest.FixtureRequest) -> tuple[Any, Path]:
    if kind == "a speech model":
        return request.getfixturevalue("speech")
    model, folder = request.getfixturevalue("saved")(
        BertModel if kind == "an encoder" else ViTForImageClassification
    )
    if kind == "a vision net":
        ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    return model, folder


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind in REFUSED for name in REFUSED[kind]])
def test_data_of_another_kind_are_refused(
    kind: str, name: str, files: Path, request: pytest.FixtureRequest
) -> None:
    n_tokens = 10**6 if kind == "a vision net" else 1000
    with pytest.raises(DataError) as caught:
        inputs_of(*model_of(kind, request), files / name, n_tokens=n_tokens)
    assert REFUSED[kind][name] in str(caught.value) and ";" in str(caught.value)


def test_texts_below_eight_windows_of_eight_tokens_are_too_short(saved: Saved, files: Path) -> None:
    model, folder = saved(LlamaForCausalLM)
    with pytest.raises(DataError, match="expected at least 64 tokens of text, found 7; give longer texts"):
        inputs_of(model, folder, files / "short.txt", n_tokens=1000)


@pytest.mark.parametrize("data", [3, None, [], iter(()), {}, [1, 2], object()])
def test_what_is_no_data_is_refused(data: Any, saved: Saved) -> None:
    model, folder = saved(BertModel)
    with pytest.raises(DataError):
        inputs_of(model, folder, data, n_tokens=1000)


def test_texts_without_a_tokenizer_are_refused_and_words_cannot_be_made(saved: Saved, files: Path) -> None:
    model, folder = saved(BertModel)
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(SourceError, match="expected a tokenizer beside the model"):
        inputs_of(model, folder, files / "texts.txt", n_tokens=1000)
    with pytest.raises(CalibrationError, match="expected a tokenizer beside the model"):
        inputs_of(model, folder, "self", n_tokens=1000)


def test_a_tokenizer_of_another_model_is_refused(saved: Saved, files: Path) -> None:
    model, folder = saved(BertModel, vocab_size=12)
    for data, kind in ((files / "texts.txt", SourceError), ("self", CalibrationError)):
        with pytest.raises(kind):
            inputs_of(model, folder, data, n_tokens=1000)


@pytest.mark.parametrize("model", [nn.Linear(3, 2), nn.Embedding(9, 2), nn.Identity()], ids=repr)
def test_a_module_of_which_nothing_is_known_makes_no_inputs(model: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="give data"):
        inputs_of(model, tmp_path, "self", n_tokens=1000)


def test_a_model_that_needs_texts_and_images_makes_no_inputs(tmp_path: Path) -> None:
    model = filled(CLIPModel(tiny_config(CLIPConfig()))).eval()  # pyright: ignore[reportArgumentType]
    with pytest.raises(CalibrationError, match="give data"):
        inputs_of(model, tmp_path, "self", n_tokens=1000)


def test_a_model_whose_predictions_are_nan_writes_nothing(saved: Saved) -> None:
    model, folder = saved(LlamaForCausalLM)
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.nan)
    with pytest.raises(CalibrationError, match="found NaN or infinite ones"):
        inputs_of(model, folder, "self", n_tokens=1000)


@pytest.mark.parametrize(
    ("name", "said"), [("cut", "found 7999 bytes, 2 for each of 1"), ("still", "at 0 Hz")]
)
def test_damaged_sounds_are_refused(name: str, said: str, speech: Any, files: Path, tmp_path: Path) -> None:
    model, folder = speech
    content = bytearray((files / "sounds" / "a.wav").read_bytes())
    if name == "still":
        content[24:28] = bytes(4)
    path = tmp_path / f"{name}.wav"
    path.write_bytes(content[:-1] if name == "cut" else content)
    with pytest.raises(DataError) as caught:
        inputs_of(model, folder, path, n_tokens=1000)
    assert said in str(caught.value) and path.name in str(caught.value)


def test_rows_of_nothing_are_refused(saved: Saved, tmp_path: Path) -> None:
    np.savez(tmp_path / "no.npz", input_ids=np.zeros((20, 0), np.int64))
    with pytest.raises(DataError, match="input_ids: expected rows with something in them"):
        inputs_of(*saved(BertModel), tmp_path / "no.npz", n_tokens=1000)


def test_a_text_is_no_name_of_a_file(saved: Saved) -> None:
    with pytest.raises(DataError, match="give texts themselves as a list"):
        inputs_of(*saved(BertModel), "a cat sat on the mat. " * 200, n_tokens=1000)


@pytest.mark.parametrize("word", ["Self", "NONE"])
def test_words_of_the_option_in_capitals_are_no_data_set(word: str, saved: Saved) -> None:
    with pytest.raises(DataError, match="expected self or none in small letters"):
        inputs_of(*saved(BertModel), word, n_tokens=1000)


def test_rows_that_are_longer_than_the_models_positions_are_refused(saved: Saved) -> None:
    ids = np.random.default_rng(0).integers(5, 25, (20, 33))
    with pytest.raises(DataError, match="expected rows of at most 32 tokens"):
        inputs_of(*saved(LlamaForCausalLM), {"input_ids": ids}, n_tokens=1000)
