"""Tiny models, saved in a moment, and one of them compressed once for all tests that only read."""

import json
import runpy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from miracle_hub.codec.compress import compress_folder
from miracle_hub.codec.report import Report
from miracle_hub.errors import BudgetError
from miracle_hub.options import CompressOptions


def save_folder(
    folder: Path, tensors: dict[str, Tensor], *, shards: int = 1, config: dict[str, Any] | None = None
) -> Path:
    """What `save_pretrained` would leave, for any state dict."""
    folder.mkdir(parents=True)
    names = ["model.safetensors"]
    if shards > 1:
        names = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
        weight_map = {key: names[i % shards] for i, key in enumerate(tensors)}
        index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for i, name in enumerate(names):
        part = {key: tensor for j, (key, tensor) in enumerate(tensors.items()) if j % shards == i}
        save_file(part, folder / name, {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config or {"model_type": "bert"}))
    return folder


def layers(seed: int = 0) -> dict[str, Tensor]:
    """Two matrices, a norm, a bias."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "first.weight": 0.02 * torch.randn(96, 64, generator=generator),
        "second.weight": torch.randn(64, 96, generator=generator),
        "norm.weight": 1 + 0.1 * torch.randn(96, generator=generator),
        "second.bias": torch.randn(64, generator=generator),
    }


@pytest.fixture
def save_model(tmp_path: Path) -> Callable[..., Path]:
    """`save_model(tensors, name="model", shards=1, config=None)` saves a folder below `tmp_path`."""

    def save(tensors: dict[str, Tensor], name: str = "model", **options: Any) -> Path:
        return save_folder(tmp_path / name, tensors, **options)

    return save


@pytest.fixture(scope="session")
def save_anywhere() -> Callable[..., Path]:
    return save_folder


@pytest.fixture
def compress() -> Callable[..., Report]:
    """`compress_folder` at its fastest, 3 bits per weight unless a size or rate is given."""

    def run(source: Path, out: Path, **options: Any) -> Report:
        if not {"size", "bits_per_weight"} & options.keys():
            options["bits_per_weight"] = 3.0
        others = {name: options.pop(name) for name in ("card", "payloads", "roles") if name in options}
        chosen = CompressOptions(**{"window_bits": 8, "progress": False, **options})
        return compress_folder(source, out, chosen, **others)

    return run


@pytest.fixture
def least_size(compress: Callable[..., Report], tmp_path: Path) -> Callable[..., int]:
    """The least size of a model, as the error for asking less says it."""

    def ask(source: Path, **options: Any) -> int:
        with pytest.raises(BudgetError) as raised:
            compress(source, tmp_path / "never", size=1, **options)
        assert not (tmp_path / "never").exists()
        return int(str(raised.value).split("least possible is ")[1].split(" bytes")[0].replace(",", ""))

    return ask


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    return layers()


@pytest.fixture
def model(save_model: Callable[..., Path], tensors: dict[str, Tensor]) -> Path:
    return save_model(tensors)


@pytest.fixture(scope="session")
def compressed_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("once")
    save_folder(folder / "model", layers())
    options = CompressOptions(bits_per_weight=3.0, window_bits=8, progress=False)
    compress_folder(folder / "model", folder / "small", options)
    return folder / "small"


@pytest.fixture
def compressed(compressed_once: Path, tmp_path: Path) -> Path:
    """A compressed repository of `layers()` that the test may damage."""
    return shutil.copytree(compressed_once, tmp_path / "small")


@pytest.fixture
def independent_decode() -> Callable[[bytes], tuple[int, Any, float, int]]:
    """The decoder of tests/golden, which shares no code with the package."""
    path = Path(__file__).parents[1] / "golden" / "payload_decoder.py"
    return runpy.run_path(str(path))["decode"]
