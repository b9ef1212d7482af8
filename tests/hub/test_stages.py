"""Plain from_pretrained of repositories with stages: the first n decode, and only their files are read."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers

import miracle_hub
from miracle_hub.errors import MissingWeightsError, OptionError
from miracle_hub.plugin.config import MiracleConfig

from .conftest import ARCHITECTURES

if TYPE_CHECKING:
    from .conftest import Repository

# A model of one file, one with tied weights, and two whose converters join the tensors of experts.
STAGED = ("bert-classifier", "llama-tied", "mixtral", "gpt-oss")


@pytest.fixture(scope="module", params=STAGED)
def staged(
    request: pytest.FixtureRequest,
    repositories: Callable[..., "Repository"],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Any, Path]:
    out = tmp_path_factory.mktemp("staged") / "out"
    source = repositories(request.param).source
    miracle_hub.compress(source, out, bits_per_weight=7, window_bits=8, stages=3, progress=False)
    return getattr(transformers, ARCHITECTURES[request.param][1]), out


@pytest.mark.parametrize("stages", [1, 2, 3, None])
def test_stages_load_as_the_decompressed_folder_of_as_many(
    staged: tuple[Any, Path], stages: int | None, tmp_path: Path
) -> None:
    auto, folder = staged
    arguments: dict[str, Any] = {} if stages is None else {"stages": stages}
    miracle_hub.decompress(folder, tmp_path / "dense", progress=False, **arguments)
    model, info = auto.from_pretrained(folder, output_loading_info=True, **arguments)
    twin, twin_info = auto.from_pretrained(tmp_path / "dense", output_loading_info=True)
    assert info == twin_info
    for (name, ours), theirs in zip(model.state_dict().items(), twin.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name
    for name in ("stages", "transformers_weights", "quantization_config"):
        assert not hasattr(model.config, name)


def test_only_the_files_of_the_stages_asked_for_are_read(staged: tuple[Any, Path], tmp_path: Path) -> None:
    auto, folder = staged
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in folder.iterdir():
        if "stage-" not in path.name or path.name.startswith("model.stage-1."):
            (copy / path.name).write_bytes(path.read_bytes())
    auto.from_pretrained(copy, stages=1)
    with pytest.raises(MissingWeightsError, match="names model.stage-2.safetensors, which is missing"):
        auto.from_pretrained(copy)


def test_a_model_loaded_in_stages_saves_as_an_ordinary_one(staged: tuple[Any, Path], tmp_path: Path) -> None:
    auto, folder = staged
    model = auto.from_pretrained(folder, stages=2)
    model.save_pretrained(tmp_path / "saved")
    again = auto.from_pretrained(tmp_path / "saved")
    assert all(map(torch.equal, again.state_dict().values(), model.state_dict().values()))
    assert '"stages"' not in (tmp_path / "saved" / "config.json").read_text()


@pytest.mark.parametrize("stages", [0, 4, "all"])
def test_stages_that_are_not_there_are_refused(staged: tuple[Any, Path], stages: Any) -> None:
    auto, folder = staged
    with pytest.raises(OptionError, match="stages: expected a number from 1 to 3, found"):
        auto.from_pretrained(folder, stages=stages)


def test_layers_stay_compressed_with_one_stage_only(staged: tuple[Any, Path]) -> None:
    auto, folder = staged
    config = MiracleConfig(keep_compressed=True)
    with pytest.raises(OptionError, match="keep_compressed: expected a repository of one stage, found 3"):
        auto.from_pretrained(folder, quantization_config=config)
    kept = auto.from_pretrained(folder, quantization_config=config, stages=1)
    dense = auto.from_pretrained(folder, stages=1)
    tokens = torch.tensor([[5, 6, 7, 8]])
    assert torch.allclose(kept(tokens).logits, dense(tokens).logits, atol=1e-4)
