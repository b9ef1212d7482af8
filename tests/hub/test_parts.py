"""A composite model by its parts: each part's class loads from the compressed whole as from the dense one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import CLIPModel, CLIPTextModel, CLIPVisionModel, PreTrainedModel

import miracle_hub
from miracle_hub import MiracleConfig
from miracle_hub.codec.parts import is_miracle
from miracle_hub.errors import OptionError
from miracle_hub.plugin.compressed_linear import compressed_layers
from tests.sweep.composites import compare, composites

if TYPE_CHECKING:
    from tests.hub.conftest import Repository

_PASSED = Path(__file__).parents[1] / "sweep" / "passed.json"
_PARTS = (CLIPTextModel, CLIPVisionModel)


@pytest.fixture
def clip(repositories: Callable[..., Repository]) -> Repository:
    return repositories("clip")


def assert_same(ours: PreTrainedModel, theirs: PreTrainedModel) -> None:
    assert ours.dtype == theirs.dtype
    expected, found = theirs.state_dict(), ours.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


# A subset of `make sweep`: own classes of parts, those of other families, two of one class, three beside each
# other, and a language model by its auto class.
@pytest.mark.parametrize(
    ("name", "loaded"),
    [
        ("siglip", "SiglipVisionModel"),
        ("llava", "LlamaModel"),
        ("encoder-decoder", "BertModel"),
        ("qwen2_5_omni_thinker", "Qwen2_5OmniAudioEncoder"),
        ("gemma3", "AutoModelForCausalLM"),
    ],
)
def test_every_class_of_a_part_loads_as_from_the_decompressed_folder(
    name: str, loaded: str, tmp_path: Path
) -> None:
    result = compare(name, tmp_path, heads=False)
    assert not result.reason and not result.differences
    assert loaded in result.loaded


def test_the_sweep_over_all_composites_found_no_difference() -> None:
    passed = json.loads(_PASSED.read_text())
    assert passed["differences"] == {} and passed["built"] > 150
    assert passed["built"] + len(passed["not_built"]) == passed["composites"]
    known = {*passed["loaded"], *passed["not_built"]}
    assert transformers.__version__ != passed["versions"]["transformers"] or known == set(composites())


@pytest.mark.parametrize("part", _PARTS)
def test_a_part_is_in_the_sources_dtype_though_its_config_has_none(part: Any, clip: Repository) -> None:
    assert any(t.dtype == torch.float16 for t in load_file(clip.compressed / "model.safetensors").values())
    model = part.from_pretrained(clip.compressed)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert_same(model, part.from_pretrained(clip.source.with_name("dense")))
    half = part.from_pretrained(clip.compressed, dtype=torch.float16)
    assert_same(half, part.from_pretrained(clip.decompressed, dtype=torch.float16))


def test_the_decompressed_config_is_the_sources(clip: Repository) -> None:
    assert config_of(clip.decompressed) == config_of(clip.source)


def test_every_part_states_what_its_loader_needs(clip: Repository) -> None:
    config = config_of(clip.compressed)
    for name in ("text_config", "vision_config"):
        facts = config[name]["quantization_config"]
        assert is_miracle(facts) and facts["digest"] == config["quantization_config"]["digest"]
        assert facts.keys() == {"quant_method", "format_version", "digest", "dtype"}


def test_a_config_without_parts_has_no_new_field(llama: Repository) -> None:
    assert config_of(llama.compressed)["quantization_config"].keys() == {
        *("quant_method", "format_version", "bits_per_weight", "seed", "digest"),
        *("modules_to_not_convert", "guard"),
    }


@pytest.mark.parametrize("loader", [CLIPModel, *_PARTS])
def test_nothing_says_quantized_after_a_dense_load(loader: Any, clip: Repository, tmp_path: Path) -> None:
    model = loader.from_pretrained(clip.compressed)
    assert "quantization" not in model.config.to_json_string(use_diff=False)
    model.save_pretrained(tmp_path)
    assert_same(loader.from_pretrained(tmp_path), model)


def without_facts_in_parts(folder: Path) -> None:
    """As repositories were written before."""
    config = config_of(folder)
    for name in ("text_config", "vision_config"):
        del config[name]["quantization_config"]
    del config["quantization_config"]["dtype"], config["quantization_config"]["guard"]["config"]
    (folder / "config.json").write_text(json.dumps(config))


def test_a_repository_of_before_loads_as_a_whole(clip: Repository, tmp_path: Path) -> None:
    old = Path(shutil.copytree(clip.compressed, tmp_path / "old"))
    without_facts_in_parts(old)
    assert_same(CLIPModel.from_pretrained(old), CLIPModel.from_pretrained(clip.compressed))
    miracle_hub.decompress(old, tmp_path / "dense", progress=False)
    assert config_of(tmp_path / "dense") == config_of(clip.source)


def test_a_part_with_stages_loads_those_asked_for(clip: Repository, tmp_path: Path) -> None:
    part: Any = CLIPTextModel
    options: dict[str, Any] = {"bits_per_weight": 9, "window_bits": 8, "stages": 2, "progress": False}
    miracle_hub.compress(clip.source, tmp_path / "out", **options)
    for stages in (1, 2):
        miracle_hub.decompress(tmp_path / "out", tmp_path / f"{stages}", stages=stages, progress=False)
        model = part.from_pretrained(tmp_path / "out", stages=stages)
        assert_same(model, part.from_pretrained(tmp_path / f"{stages}"))
        assert "stages" not in model.config.to_dict()
    with pytest.raises(OptionError, match="stages: expected a number from 1 to 2, found 3"):
        part.from_pretrained(tmp_path / "out", stages=3)
    assert config_of(tmp_path / "1") == config_of(clip.source)


@pytest.mark.parametrize("loader", [CLIPModel, *_PARTS])
def test_a_part_is_kept_compressed_saved_and_loaded_again(
    loader: Any, clip: Repository, tmp_path: Path
) -> None:
    kept = loader.from_pretrained(clip.compressed, quantization_config=MiracleConfig(keep_compressed=True))
    dense = loader.from_pretrained(clip.compressed)
    assert compressed_layers(kept)
    kept.save_pretrained(tmp_path)
    assert_same(loader.from_pretrained(tmp_path), dense)
    if loader is CLIPModel:  # whose parts load from what was saved, too
        for part in _PARTS:
            assert_same(part.from_pretrained(tmp_path), part.from_pretrained(clip.compressed))
    assert "quantization" not in kept.dequantize().config.to_json_string(use_diff=False)
