"""Plain tensors that were tuned: which may be, that the file says so, and what verify makes of it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

import miracle_hub
from tests.calibrate.conftest import TEXTS
from tests.calibrate.test_compress import QUICK, WIDER, Saved, short

__all__ = ["short"]
LOW: dict[str, Any] = QUICK | {"bits_per_weight": 9.0, "calibrate": TEXTS, "effort": 1}
KEPT = "model.layers.0.mlp.up_proj"


@pytest.fixture
def llama(saved: Saved) -> Path:
    return saved(LlamaForCausalLM, tie_word_embeddings=True, head_dim=32, **WIDER)[1]


def test_tuned_vectors_are_listed_and_all_others_are_the_sources(llama: Path, tmp_path: Path) -> None:
    out, path = tmp_path / "out", tmp_path / "out" / "config.json"
    with pytest.warns(UserWarning, match="expected at most 20%"):  # of so small a model
        report = miracle_hub.compress(llama, out, modules_to_not_convert=[KEPT], **LOW)
    assert report.calibration is not None and not report.calibration.is_taken_back
    config, dense, own = json.loads(path.read_text()), load_file(llama / "model.safetensors"), {}
    own = miracle_hub.load_state_dict(out)
    changed = {name for name in report.plain if not torch.equal(own[name], dense[name])}
    listed = config["quantization_config"]["tuned"]
    assert changed and changed <= set(listed) and f"{KEPT}.weight" not in listed
    assert miracle_hub.verify(out, dense=llama).defects == ()
    name = listed[0]
    save_file(dense | {name: dense[name][:32].clone()}, llama / "model.safetensors", {"format": "pt"})
    (defect,) = miracle_hub.verify(out, dense=llama).defects
    assert f"{name}: expected torch.float16 [32], found torch.float16 [64]" in defect


def test_stages_are_not_refitted_and_that_is_said(llama: Path, tmp_path: Path) -> None:
    report = miracle_hub.compress(llama, tmp_path / "out", stages=2, **LOW)
    assert report.calibration is not None and not report.calibration.steps
    assert any(note.startswith("not refitted: stages above the first") for note in report.notes)
    assert miracle_hub.verify(tmp_path / "out", dense=llama).defects == ()
