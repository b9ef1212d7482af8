"""Who decodes a repository that transformers loads: the same bits, and never the other backend in silence."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

import miracle_kernels
from miracle_hub import MiracleConfig
from miracle_hub.coding.numba_backend import NumbaBackend
from miracle_hub.coding.triton_backend import TritonBackend
from miracle_hub.errors import BackendError

if TYPE_CHECKING:
    from tests.hub.conftest import Repository

_TOKENS = torch.tensor([[5, 6, 7, 8]])
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture
def no_numba(repositories: Callable[..., Repository], monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU's decoder fails once the repositories are made: what is decoded, the kernels decoded."""
    for architecture in ("llama", "mixtral"):
        repositories(architecture, torch.float32)

    def refuse(*args: Any) -> None:
        raise AssertionError("numba decoded")

    for name in ("decode_matrix", "decode_rows", "decode_stream"):
        monkeypatch.setattr(NumbaBackend, name, refuse)


def count_calls(monkeypatch: pytest.MonkeyPatch, name: str) -> list[str]:
    """Grows by one entry with every call of that method of the Triton backend."""
    calls, original = [], getattr(TritonBackend, name)

    def counted(self: TritonBackend, *args: Any) -> Any:
        calls.append(name)
        return original(self, *args)

    monkeypatch.setattr(TritonBackend, name, counted)
    return calls


def load(repository: Repository, **options: Any) -> Any:
    """The model, with options of loading it."""
    device_map = options.pop("device_map", None)
    config = MiracleConfig(**options)
    return repository.auto.from_pretrained(
        repository.compressed, quantization_config=config, device_map=device_map
    )


def assert_equal_weights(model: Any, repository: Repository) -> None:
    twin = repository.auto.from_pretrained(repository.decompressed).state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor.cpu(), twin[name]), name


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(_TOKENS.to(model.device))[0].float().cpu()


@pytest.mark.parametrize("architecture", ["llama", "mixtral"])
def test_kernels_load_the_same_bits(
    architecture: str,
    repositories: Callable[..., Repository],
    no_numba: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = count_calls(monkeypatch, "decode_matrix")
    device_map = "cuda" if torch.cuda.is_available() else None
    model = load(repositories(architecture, torch.float32), backend="triton", device_map=device_map)
    assert len(calls) > 5
    assert_equal_weights(model, repositories(architecture, torch.float32))


def test_compressed_layers_multiply_with_kernels(
    llama: Repository, no_numba: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = count_calls(monkeypatch, "multiply")
    device_map = "cuda" if torch.cuda.is_available() else None
    model = load(llama, keep_compressed=True, backend="triton", device_map=device_map)
    found, expected = logits(model), logits(llama.auto.from_pretrained(llama.decompressed))
    assert len(calls) > 5
    # Inputs of every layer are rounded to 11 bits.
    assert (found - expected).norm() <= 2**-8 * expected.norm()


def test_compressed_layers_differentiate_through_kernels(llama: Repository, no_numba: None) -> None:
    device_map = "cuda" if torch.cuda.is_available() else None
    model = load(llama, keep_compressed=True, backend="triton", device_map=device_map)
    twin = llama.auto.from_pretrained(llama.decompressed)
    gradients = []
    for found in (model, twin):
        embedding = found.get_input_embeddings().weight.requires_grad_(True)
        found(_TOKENS.to(found.device))[0].float().square().sum().backward()
        gradients.append(embedding.grad.float().cpu())
    assert (gradients[0] - gradients[1]).norm() <= 2**-6 * gradients[1].norm()


@pytest.mark.parametrize("keep_compressed", [False, True])
def test_triton_is_not_replaced_in_silence(
    keep_compressed: bool, llama: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(miracle_kernels, "HAS_TRITON", False)
    with pytest.raises(BackendError, match="expected the package triton for backend='triton', found none"):
        load(llama, backend="triton", keep_compressed=keep_compressed)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("keep_compressed", [False, True])
def test_auto_decodes_where_the_model_goes(keep_compressed: bool, llama: Repository, no_numba: None) -> None:
    model = load(llama, keep_compressed=keep_compressed, device_map="cuda")
    assert model.device.type == "cuda"
    expected = logits(llama.auto.from_pretrained(llama.decompressed))
    assert (logits(model) - expected).norm() <= 2**-8 * expected.norm()
