"""A config that travels: plain weights beside a compressed model's config are taken as they are."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    BertForSequenceClassification,
    BertModel,
    CLIPConfig,
    CLIPModel,
    CLIPTextModel,
    PreTrainedModel,
)

import miracle_hub
from miracle_hub import MiracleConfig
from miracle_hub.codec.config import read_facts
from miracle_hub.errors import MiracleError

if TYPE_CHECKING:
    from tests.hub.conftest import Repository

Repositories = Callable[..., "Repository"]
_SAID = "plain weights of a model that was made from a compressed model's config"


@pytest.fixture(scope="module")
def bert(repositories: Repositories) -> Repository:
    return repositories("bert-classifier")


def config(folder: Path) -> Any:
    return AutoConfig.from_pretrained(folder)


def kept(folder: Path) -> BertForSequenceClassification:
    keep = MiracleConfig(keep_compressed=True)
    return BertForSequenceClassification.from_pretrained(folder, quantization_config=keep)


def composed(folder: Path) -> CLIPModel:
    """A new whole of two parts' configs, whose own has no quantization_config."""
    parts = {n: getattr(config(folder), n).to_dict() for n in ("text_config", "vision_config")}
    return CLIPModel(CLIPConfig(**parts))


def resized(folder: Path) -> BertModel:
    model = BertModel(config(folder))
    model.resize_token_embeddings(80)
    return model


def with_merged_adapter(folder: Path) -> Any:
    peft = pytest.importorskip("peft")
    model = BertForSequenceClassification(config(folder))
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["query"]))
    return adapted.merge_and_unload()


# Name → architecture, and a new model made from the config of its compressed folder.
_NEW: dict[str, tuple[str, Callable[[Path], PreTrainedModel]]] = {
    "from a config": ("bert-classifier", lambda f: BertModel(config(f))),
    "by an auto class": ("bert-classifier", lambda f: AutoModel.from_config(config(f))),
    "in 16 bits": ("bert-classifier", lambda f: BertModel(config(f)).bfloat16()),
    "from a model kept compressed": (
        "bert-classifier",
        lambda f: BertForSequenceClassification(kept(f).config),
    ),
    "with another vocabulary": ("bert-classifier", resized),
    "with a merged adapter": ("bert-classifier", with_merged_adapter),
    "a composite": ("clip", lambda f: CLIPModel(config(f))),
    "from a part's config": ("clip", lambda f: CLIPTextModel(config(f).text_config)),
    "composed of parts": ("clip", composed),
}


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    caplog.set_level(logging.WARNING, "miracle_hub")
    return lambda: [m for m in caplog.messages if _SAID in m]


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype and torch.equal(ours[name], tensor), name


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks for it
@pytest.mark.parametrize("way", _NEW)
def test_a_new_model_of_a_compressed_models_config_is_loaded_and_that_is_said(
    way: str, repositories: Repositories, said: Callable[[], list[str]], tmp_path: Path
) -> None:
    architecture, make = _NEW[way]
    model = make(repositories(architecture).compressed)
    model.save_pretrained(tmp_path / "new")
    loaded = type(model).from_pretrained(tmp_path / "new")
    assert_same(loaded.state_dict(), model.state_dict())
    (message,) = said()
    assert message.startswith(f"{tmp_path / 'new'}: ") and "del model.config.quantization_config" in message
    assert "quantization" not in loaded.config.to_json_string(use_diff=False)
    loaded.save_pretrained(tmp_path / "clean")
    type(model).from_pretrained(tmp_path / "clean")
    assert len(said()) == 1


def test_pickles_beside_a_compressed_models_config_are_loaded_and_that_is_said(
    bert: Repository, said: Callable[[], list[str]], tmp_path: Path
) -> None:
    model = BertModel(config(bert.compressed))
    model.config.save_pretrained(tmp_path / "new")
    torch.save(model.state_dict(), tmp_path / "new" / "pytorch_model.bin")
    assert_same(BertModel.from_pretrained(tmp_path / "new").state_dict(), model.state_dict())
    assert len(said()) == 1


@pytest.mark.parametrize("way", ["from a config", "composed of parts"])
def test_the_verbs_take_it_as_the_dense_model_that_it_is(
    way: str, repositories: Repositories, tmp_path: Path
) -> None:
    architecture, make = _NEW[way]
    model, new = make(repositories(architecture).compressed), tmp_path / "new"
    model.save_pretrained(new)
    assert read_facts(new) == {}
    assert_same(miracle_hub.load_state_dict(new), load_file(new / "model.safetensors"))
    miracle_hub.decompress(new, tmp_path / "dense", progress=False)
    assert "miracle" not in (tmp_path / "dense" / "config.json").read_text()
    miracle_hub.compress(new, tmp_path / "out", bits_per_weight=8, window_bits=8, progress=False)
    miracle_hub.verify(tmp_path / "out")
    miracle_hub.decompress(tmp_path / "out", tmp_path / "again", progress=False)
    ours, theirs = (type(model).from_pretrained(tmp_path / n).state_dict() for n in ("out", "again"))
    assert_same(ours, theirs)


def test_a_config_of_stages_does_not_travel_either(
    bert: Repository, said: Callable[[], list[str]], tmp_path: Path
) -> None:
    options: dict[str, Any] = {"bits_per_weight": 9, "window_bits": 8, "stages": 2, "progress": False}
    miracle_hub.compress(bert.source, tmp_path / "out", **options)
    model = BertModel(config(tmp_path / "out"))
    model.save_pretrained(tmp_path / "new")
    assert_same(BertModel.from_pretrained(tmp_path / "new").state_dict(), model.state_dict())
    assert len(said()) == 1
    miracle_hub.compress(tmp_path / "new", tmp_path / "one", bits_per_weight=8, window_bits=8, progress=False)
    assert "stages" not in json.loads((tmp_path / "one" / "config.json").read_text())


def test_asked_to_stay_compressed_it_is_an_ordinary_model(bert: Repository, tmp_path: Path) -> None:
    BertModel(config(bert.compressed)).save_pretrained(tmp_path)
    keep = MiracleConfig(keep_compressed=True)
    model = BertModel.from_pretrained(tmp_path, quantization_config=keep)
    assert not model.is_quantized and model.half().dtype == torch.float16


def test_a_dense_folder_with_a_compressed_models_config_is_dense(
    bert: Repository, said: Callable[[], list[str]]
) -> None:
    model = BertForSequenceClassification.from_pretrained(bert.source, config=config(bert.compressed))
    assert_same(model.state_dict(), BertForSequenceClassification.from_pretrained(bert.source).state_dict())
    assert len(said()) == 1


def test_a_compressed_folder_with_a_dense_models_config_is_refused(bert: Repository) -> None:
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        BertForSequenceClassification.from_pretrained(bert.compressed, config=config(bert.source))


def test_a_fine_tuned_model_that_was_loaded_dense_has_a_clean_config(
    bert: Repository, said: Callable[[], list[str]], tmp_path: Path
) -> None:
    model = BertForSequenceClassification.from_pretrained(bert.compressed)
    model.save_pretrained(tmp_path)
    assert "miracle" not in (tmp_path / "config.json").read_text()
    BertForSequenceClassification.from_pretrained(tmp_path)
    assert not said()


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


def lose_one(tensors: dict[str, Tensor], dense: dict[str, Tensor]) -> dict[str, Tensor]:
    name = next(name for name, t in tensors.items() if t.dtype == torch.uint8)
    return tensors | {name: dense[name]}


# What is left of a repository whose payloads were lost; all of it still is a damaged repository.
_DAMAGES: dict[str, Callable[[dict, dict, dict], tuple[dict, dict]]] = {
    "one payload is dense": lambda t, d, m: (lose_one(t, d), m),
    "one payload is dense, no guard": lambda t, d, m: (lose_one(t, d), {"format": "pt"}),
    "all are dense beside a guard": lambda t, d, m: (d, m),
    "all are dense beside a note of narrowing": lambda t, d, m: (
        d,
        {key: value for key, value in m.items() if "guard" not in key},
    ),
    "all are lost beside a guard": lambda t, d, m: (
        {n: x for n, x in t.items() if x.dtype != torch.uint8},
        m,
    ),
    "all magic numbers are damaged": lambda t, d, m: (
        {n: x.bitwise_not() if x.dtype == torch.uint8 else x for n, x in t.items()},
        {"format": "pt"},
    ),
}


@pytest.mark.parametrize("damage", _DAMAGES)
def test_a_repository_that_lost_payloads_is_damaged_and_no_dense_model(
    damage: str, bert: Repository, said: Callable[[], list[str]], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(bert.compressed, tmp_path / "out"))
    path = folder / "model.safetensors"
    tensors, dense = load_file(path), load_file(bert.decompressed / "model.safetensors")
    changed, metadata = _DAMAGES[damage](tensors, dense, metadata_of(path))
    save_file(changed, path, metadata)
    for read in (BertModel.from_pretrained, miracle_hub.load_state_dict):
        with pytest.raises(MiracleError):
            read(folder)
    with pytest.raises(MiracleError, match="expected a dense model, found one quantized with 'miracle'"):
        miracle_hub.compress(folder, tmp_path / "again", bits_per_weight=8, progress=False)
    assert not said()
