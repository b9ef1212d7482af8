"""Models whose linear layers stay compressed, and what all tests of them compare."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from miracle_hub import MiracleConfig
from miracle_hub.codec.repository import open_repository
from miracle_hub.plugin.compressed_linear import compressed_layers

if TYPE_CHECKING:
    from tests.hub.conftest import Repository


Repositories = Callable[..., "Repository"]
TOKENS = torch.tensor([[5, 6, 7, 8]])
PIXELS = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
INPUTS: dict[str, dict[str, Tensor]] = {
    "vit": {"pixel_values": PIXELS},
    "resnet": {"pixel_values": PIXELS},
    "t5": {"input_ids": TOKENS, "decoder_input_ids": TOKENS},
    "whisper": {
        "input_features": torch.randn(1, 16, 64, generator=torch.Generator().manual_seed(0)),
        "decoder_input_ids": TOKENS,
    },
    "clip": {"input_ids": TOKENS, "pixel_values": PIXELS},
}
FAMILIES = ["llama", "gpt2", "bert-classifier", "t5", "vit"]
LAYER = "model.layers.0.self_attn.q_proj"


def keep(**options: Any) -> MiracleConfig:
    return MiracleConfig(keep_compressed=True, **options)


def load(repository: Repository, **arguments: Any) -> Any:
    """The model with compressed layers."""
    return repository.auto.from_pretrained(repository.compressed, quantization_config=keep(), **arguments)


def output(model: Any, architecture: str = "llama") -> Tensor:
    inputs = INPUTS.get(architecture, {"input_ids": TOKENS})
    cast = {name: t.to(model.dtype) if t.is_floating_point() else t for name, t in inputs.items()}
    with torch.no_grad():
        return model(**cast)[0]


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    """Equal weights; sums may be taken in another order."""
    assert ours.dtype == theirs.dtype
    rtol, atol = (5e-2, 5e-2) if ours.dtype.itemsize == 2 else (1e-4, 1e-5)
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol)


def assert_same_weights(model: nn.Module, dense: nn.Module) -> None:
    """Bit for bit, layer by layer and tensor by tensor."""
    layers, modules = compressed_layers(model), dict(dense.named_modules())
    for name, layer in layers.items():
        expected = modules[name].weight
        assert isinstance(expected, Tensor)
        assert layer.weight.dtype == expected.dtype and torch.equal(layer.weight, expected), name
    ours, theirs = model.state_dict(), dense.state_dict()
    for name in theirs.keys() - {f"{name}.weight" for name in layers}:
        assert ours[name].dtype == theirs[name].dtype and torch.equal(ours[name], theirs[name]), name


def payloads(folder: Path) -> dict[str, bytes]:
    coded = [t.parts[0].load().numpy().tobytes() for t in open_repository(folder).tensors if t.is_coded]
    names = [t.name for t in open_repository(folder).tensors if t.is_coded]
    return dict(zip(names, coded, strict=True))


def quantization(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())["quantization_config"]
