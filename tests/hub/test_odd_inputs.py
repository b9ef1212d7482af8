"""Images, arrays and tokens that a model cannot take are refused by name, before or where they are used."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2Model,
    LlamaConfig,
    LlamaModel,
    RobertaConfig,
    RobertaModel,
)

from miracle_hub.errors import DataError, SourceError
from miracle_hub.evaluate.batches import array_batches, check_fits, image_batches, tokenizer_of

RED = np.full((4, 6, 3), [250, 0, 0], np.uint8)


def pixels(path: Path) -> np.ndarray:
    """What a processor that changes nothing is given of an image."""
    given: list[Any] = []

    def processor(images: list[Any], return_tensors: str) -> dict[str, torch.Tensor]:
        given.extend(images)
        return {"pixel_values": torch.zeros(len(images))}

    _, batches = image_batches(path, processor, 2)
    list(batches)
    return np.asarray(given[0])


@pytest.mark.parametrize("mode", ["L", "LA", "P", "CMYK", "RGBA", "1", "YCbCr"])
def test_images_of_8_bits_are_given_in_red_green_and_blue(mode: str, tmp_path: Path) -> None:
    image = Image.fromarray(RED).convert(mode)
    path = tmp_path / f"image.{'jpg' if mode in ('CMYK', 'YCbCr') else 'png'}"
    image.save(path)
    with Image.open(path) as saved:
        assert saved.mode == mode or mode == "YCbCr"
        expected = np.asarray(saved.convert("RGB"))
    assert pixels(path).shape == (4, 6, 3) and np.array_equal(pixels(path), expected)


def test_an_image_is_turned_as_the_camera_was_held(tmp_path: Path) -> None:
    image, exif = Image.fromarray(RED), Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert pixels(tmp_path / "turned.jpg").shape == (6, 4, 3)


def test_images_that_would_be_cut_or_half_read_are_refused(tmp_path: Path) -> None:
    frames = [Image.fromarray(RED), Image.fromarray(255 - RED)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    Image.fromarray(np.full((4, 4), 60_000, np.uint16)).save(tmp_path / "a.png")
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "b.png")
    (tmp_path / "c.png").write_bytes((tmp_path / "b.png").read_bytes()[:2000])
    (tmp_path / "d.png").write_bytes(b"no image")
    (tmp_path / "e.txt").write_text("f.png\n", encoding="utf-8-sig")
    for name, message in {
        "a.gif": "expected one image, found 2 frames; save the one that is meant",
        "a.png": "expected 8 bits per color, found mode 'I;16'; scale it to 8 bits",
        "c.png": "expected an image, found ",
        "d.png": "expected an image, found cannot identify",
        "e.txt": "f.png: expected an image, found [Errno 2] No such file",
    }.items():
        with pytest.raises(DataError) as raised:
            pixels(tmp_path / name)
        assert message in str(raised.value)
        assert str(raised.value).startswith(str(tmp_path / (name if name != "e.txt" else "f.png")))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            np.array([[1.0, np.nan]]),
            "x: expected finite numbers, found 1 of 2 that are NaN or infinite; repair",
        ),
        (np.array([[np.inf, -np.inf]], np.float16), "found 2 of 2 that are NaN"),
        (np.array([[1j]]), "x: expected real numbers, found complex128; save them as numbers"),
        (np.array([["a"]]), "x: expected real numbers, found <U1"),
        (np.array(["2020-01-01"], "datetime64[D]"), "found datetime64[D]"),
        (np.array([None, 1], object), "expected an npz of numbers, found "),
        (np.array(5), "expected arrays of equally many rows, at least one, found [0] rows"),
        (np.zeros((0, 3)), "found [0] rows"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_arrays_that_are_no_finite_numbers_are_refused(values: Any, message: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=values)
    with pytest.raises(DataError) as raised:
        array_batches(tmp_path / "d.npz", {"x"}, 4)
    assert str(raised.value).startswith(f"{tmp_path / 'd.npz'}: ") and message in str(raised.value)


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", ">f4", "i1", "u2", "u4", "?"])
def test_arrays_of_numbers_are_taken_whatever_their_width(dtype: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=np.ones((2, 3), dtype))
    _, batches = array_batches(tmp_path / "d.npz", {"x"}, 4)
    ((inputs, _),) = list(batches)
    is_real = dtype.endswith(("f2", "f4", "f8"))
    assert inputs["x"].dtype == (torch.float32 if is_real else torch.int64) and bool((inputs["x"] == 1).all())


SIZES: dict[str, Any] = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)


@pytest.mark.parametrize(
    ("model", "most"),
    [
        (lambda: BertModel(BertConfig(vocab_size=9, max_position_embeddings=12, **SIZES)), 12),
        (lambda: RobertaModel(RobertaConfig(vocab_size=9, max_position_embeddings=14, **SIZES)), 12),
        (lambda: GPT2Model(GPT2Config(vocab_size=9, n_positions=12, n_embd=8, n_layer=1, n_head=2)), 12),
        (lambda: LlamaModel(LlamaConfig(vocab_size=9, max_position_embeddings=12, **SIZES)), None),
    ],
    ids=["bert", "roberta", "gpt2", "llama"],
)
def test_texts_fit_the_positions_and_tokens_the_embeddings(model: Any, most: int | None) -> None:
    built = model()
    for length in (5, 12, 13, 40):
        inputs = {"input_ids": [[3], [3] * length]}
        with torch.no_grad():
            if most is None or length <= most:
                check_fits(built, inputs)
                built(torch.tensor(inputs["input_ids"][1:]))
            else:
                with pytest.raises(
                    DataError, match=rf"as the model has positions, found one of {length}; cut "
                ):
                    check_fits(built, inputs)
                with pytest.raises((IndexError, RuntimeError)):
                    built(torch.tensor(inputs["input_ids"][1:]))
    with pytest.raises(
        SourceError, match="expected tokens below 9, of which the model has embeddings, found 9"
    ):
        check_fits(built, {"input_ids": [[1, 9]]})


def test_a_tokenizer_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(SourceError, match="expected a tokenizer that transformers reads, found "):
        tokenizer_of(tmp_path)
