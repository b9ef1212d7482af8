"""The dense model of a folder is loaded as its class trained it, or refused with the reason."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertForMaskedLM, BertModel, LlamaForCausalLM, ViTForImageClassification

from miracle_hub.calibrate.models import load_dense
from miracle_hub.errors import CalibrationError

Saved = Callable[..., tuple[Any, Path]]


def changed(folder: Path, **values: Any) -> None:
    """Write some values of config.json anew; None takes one out."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | values
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))


@pytest.mark.parametrize("cls", [BertModel, BertForMaskedLM, LlamaForCausalLM, ViTForImageClassification])
@pytest.mark.parametrize("tied", [True, False])
def test_a_model_is_loaded_by_its_class_in_float32_and_evaluation_mode(
    cls: Any, tied: bool, saved: Saved
) -> None:
    model, folder = saved(cls, tie_word_embeddings=tied)
    model.half().save_pretrained(folder)
    loaded = load_dense(folder)
    assert type(loaded) is cls and not loaded.training
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor.float(), model.state_dict()[name].float()), name


def test_a_folder_without_config_cannot_be_run(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="found no config.json, which names its class"):
        load_dense(tmp_path)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"architectures": ["MyBert"]}, "expected a class of transformers .*, found 'MyBert'"),
        ({"architectures": ["AutoConfig"]}, "expected a class of transformers .*, found 'AutoConfig'"),
        ({"architectures": [7]}, "expected a class of transformers .*, found 7"),
        (
            {"architectures": ["MyBert"], "auto_map": {"AutoModel": "my.MyBert"}},
            "whose code in the repository is never run",
        ),
        ({"model_type": "mine", "auto_map": {"AutoConfig": "my.MyConfig"}}, "code of its repository"),
        ({"model_type": None}, "found ValueError"),
        ({"hidden_size": 16}, "found RuntimeError"),
        ({"num_hidden_layers": 2}, "found 16 without weights"),
        ({"num_hidden_layers": 0}, "found 16 left over"),
        ({"architectures": ["BertForMaskedLM"]}, "found .* without weights"),
    ],
)
def test_a_model_that_cannot_be_run_says_why(values: dict[str, Any], said: str, saved: Saved) -> None:
    _, folder = saved(BertModel)
    changed(folder, **values)
    with pytest.raises(CalibrationError, match=said) as caught:
        load_dense(folder)
    assert "--calibrate none" in str(caught.value)


def test_an_encoder_without_weights_for_its_pooler_has_none(saved: Saved) -> None:
    model, folder = saved(BertModel)
    BertModel(model.config, add_pooling_layer=False).save_pretrained(folder)
    assert load_dense(folder).pooler is None


def test_weights_of_a_head_that_the_class_has_not_are_left_over(saved: Saved) -> None:
    _, folder = saved(BertForMaskedLM)
    changed(folder, architectures=["BertModel"])
    with pytest.raises(CalibrationError, match="left over"):
        load_dense(folder)


def test_a_damaged_file_of_weights_says_so(saved: Saved) -> None:
    _, folder = saved(BertModel)
    (folder / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(CalibrationError, match="model"):
        load_dense(folder)


def test_buffers_that_older_versions_saved_are_no_weights_left_over(saved: Saved) -> None:
    _, folder = saved(BertModel)
    state = load_file(folder / "model.safetensors")
    state["embeddings.position_ids"] = torch.arange(32)[None]
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    load_dense(folder)


def test_a_package_that_is_missing_is_named(saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: Any, **__: Any) -> None:
        raise ImportError("requires the timm library")

    _, folder = saved(BertModel)
    monkeypatch.setattr(BertModel, "from_pretrained", missing)
    with pytest.raises(CalibrationError, match="requires the timm library; install what it needs"):
        load_dense(folder)
