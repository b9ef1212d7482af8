"""A module and its variational twin: the same classes, names and weights, there and back."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from miracle_hub.errors import OptionError
from miracle_hub.training.config import VariationalConfig
from miracle_hub.training.convert import (
    make_variational,
    posterior_mean,
    posterior_samples,
    remove_variational,
)

from .networks import (
    IMAGES,
    SMALL,
    assert_same_state,
    conv_net,
    in_stream_order,
    posterior_of,
    streams_of,
    variational_net,
)

STREAMS = ["tensor", "network"]
TOKENS = torch.arange(8).view(1, 8)


class TwoNames(nn.Module):
    """One parameter under two names of one module, and one that two modules share."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(6, 6))
        self.second, self.linear, self.other = self.first, nn.Linear(6, 6), nn.Linear(6, 6, bias=False)
        self.other.weight = self.linear.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.linear(x @ self.first) @ self.second)


def gpt2() -> nn.Module:
    sizes: Any = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16, "vocab_size": 24}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=2))


def bert() -> nn.Module:
    sizes: Any = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 24}
    return BertForMaskedLM(BertConfig(**sizes, intermediate_size=32, max_position_embeddings=16))


X = torch.randn(3, 7, 6, generator=torch.Generator().manual_seed(1))
MODULES: dict[str, tuple[Callable[[], nn.Module], tuple[Tensor, ...]]] = {
    "linear": (lambda: nn.Linear(6, 5), (X,)),
    "conv1d": (lambda: nn.Conv1d(7, 4, 3), (X,)),
    "conv2d": (lambda: nn.Conv2d(3, 4, (2, 3), groups=1), (X,)),
    "hugging-face-conv1d": (lambda: Conv1D(5, 6), (X,)),
    "embedding": (lambda: nn.Embedding(9, 4, padding_idx=0), (torch.arange(6),)),
    "layer-norm": (lambda: nn.LayerNorm(6), (X,)),
    "batch-norm": (lambda: nn.Sequential(nn.Conv1d(7, 4, 1), nn.BatchNorm1d(4)), (X,)),
    "lstm": (lambda: nn.LSTM(6, 4, num_layers=2, bidirectional=True), (X,)),
    "gru-cell": (lambda: nn.GRUCell(6, 4), (X[0],)),
    "attention": (lambda: nn.MultiheadAttention(6, 2), (X, X, X)),
    "transformer-layer": (lambda: nn.TransformerEncoderLayer(6, 2, 8, dropout=0), (X,)),
    "two-names": (TwoNames, (X,)),
    "half": (lambda: nn.Linear(6, 5).bfloat16(), (X.bfloat16(),)),
    "double": (lambda: nn.Linear(6, 5).double(), (X.double(),)),
    "gpt2": (gpt2, (TOKENS,)),
    "bert": (bert, (TOKENS,)),
}


def made(module: str) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return MODULES[module][0]()


def convert(model: nn.Module, **options: Any) -> nn.Module:
    return make_variational(model, VariationalConfig(**{**SMALL, "target_modules": "all", **options}))


def output_of(model: nn.Module, module: str) -> Tensor:
    found: Any = model(*MODULES[module][1])
    return found.logits if hasattr(found, "logits") else found[0] if isinstance(found, tuple) else found


def ties(model: nn.Module) -> set[frozenset[str]]:
    owners: dict[int, list[str]] = {}
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            owners.setdefault(id(parameter), []).append(f"{prefix}.{name}")
    return {frozenset(names) for names in owners.values()}


@pytest.mark.parametrize("streams", STREAMS)
@pytest.mark.parametrize("module", MODULES)
def test_every_module_draws_its_weights_and_evaluates_at_their_means(module: str, streams: str) -> None:
    model = convert(made(module).train(), streams=streams)
    first, second = output_of(model, module), output_of(model, module)
    assert first.dtype == second.dtype == output_of(made(module), module).dtype
    assert not torch.equal(first, second)
    (first.float() * torch.arange(1.0, first.shape[-1] + 1)).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    model.eval()
    assert torch.equal(output_of(model, module), output_of(model, module))
    torch.testing.assert_close(output_of(posterior_mean(model), module), output_of(model, module))


@pytest.mark.parametrize("streams", STREAMS)
@pytest.mark.parametrize("module", MODULES)
def test_classes_stay_and_removal_gives_back_the_very_module(module: str, streams: str) -> None:
    dense, model = made(module), made(module)
    convert(model, streams=streams)
    for name, other in dense.named_modules():
        assert isinstance(model.get_submodule(name), type(other)), name
    output_of(model, module)
    assert remove_variational(model) is model
    assert [(n, type(m)) for n, m in model.named_modules()] == [
        (n, type(m)) for n, m in dense.named_modules()
    ]
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in dense.named_parameters()]
    found, expected = model.state_dict(), dense.state_dict()
    assert [(n, t.shape, t.dtype) for n, t in found.items()] == [
        (n, t.shape, t.dtype) for n, t in expected.items()
    ]
    assert ties(model) == ties(dense)
    # An ordinary module again: it learns, is copied, and is converted once more, this time in part.
    output_of(copy.deepcopy(model.train()), module).float().sum().backward()
    convert(model, streams=streams, target_modules=r".*weight.*")
    remove_variational(model)
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in dense.named_parameters()]


@pytest.mark.parametrize("parametrization", ["mean-kl", "mean-var", "test-channel"])
@pytest.mark.parametrize("streams", STREAMS)
def test_means_start_at_the_weights(streams: str, parametrization: str) -> None:
    dense = dict(conv_net().named_parameters())
    model = variational_net(streams=streams, parametrization=parametrization)
    for name, mean in posterior_mean(model).named_parameters():
        if name != "norm.bias":  # it is 0
            cosine = torch.cosine_similarity(mean.flatten(), dense[name].flatten(), 0)
            assert cosine > (0.95 if parametrization == "mean-kl" else 0.999999), (name, cosine)


@pytest.mark.parametrize("module", ["lstm", "two-names", "gpt2"])
@pytest.mark.parametrize("streams", STREAMS)
def test_a_copy_made_between_steps_draws_the_same_and_lives_its_own_life(streams: str, module: str) -> None:
    model = convert(made(module).train(), streams=streams)
    output_of(model, module).sum().backward()
    model.to("cpu")
    twin = copy.deepcopy(model)
    torch.manual_seed(0)
    expected = output_of(model, module)
    torch.manual_seed(0)
    assert torch.equal(output_of(twin, module), expected)
    torch.manual_seed(0)
    assert not torch.equal(output_of(twin, module), expected)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(1)
    remove_variational(twin)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
    output_of(model, module).sum().backward()


@pytest.mark.parametrize("parametrization", ["mean-kl", "mean-var", "test-channel"])
@pytest.mark.parametrize("streams", STREAMS)
def test_samples_have_the_mean_and_the_spread_of_the_posterior(streams: str, parametrization: str) -> None:
    model = variational_net(streams=streams, parametrization=parametrization)
    samples = posterior_samples(model, 100)
    assert type(samples[0]) is type(conv_net()) and isinstance(
        samples[0].get_parameter("conv.weight"), nn.Parameter
    )
    moments = {stream.members[0].name: stream.moments() for stream in streams_of(model)}
    for stream in streams_of(model):
        drawn = torch.stack([in_stream_order(sample, stream) for sample in samples]).double()
        mean, variance = moments[stream.members[0].name]
        scale = posterior_of(stream).value_scales().detach()
        std = variance.sqrt() * scale
        error = (drawn.mean(0) - mean * scale) / (std / 100**0.5)
        n = error.numel()
        # 5 standard errors of Σ N(0, 1)² and of the sample variances.
        assert abs(float(error.square().mean()) - 1) < 5 * (2 / n) ** 0.5
        assert abs(float((drawn.var(0) / std.square()).mean()) - 1) < 5 * (2 / (n * 99)) ** 0.5


def test_mean_and_samples_leave_the_model_alone_and_are_new_each_time() -> None:
    model = variational_net().eval()
    model(IMAGES)
    before = copy.deepcopy(model.state_dict())
    means, samples = posterior_mean(model), posterior_samples(model, 2) + posterior_samples(model, 1)
    weights = [sample.get_parameter("head.weight") for sample in samples]
    assert not any(torch.equal(a, b) for a, b in zip(weights, weights[1:] + weights[:1], strict=True))
    assert torch.equal(means(IMAGES), model(IMAGES)) and not means.training
    after = model.state_dict()
    (counter,) = [name for name in after if name.endswith("_extra_state")]
    assert after.pop(counter) == before.pop(counter) + 3
    assert_same_state(after, before)


def test_modules_beside_are_trained_and_stay_as_they_are() -> None:
    model = variational_net(modules_to_save=["head"], exclude_modules=["norm"])
    names = [name for name, _ in model.named_parameters()]
    assert {"head.weight", "head.bias", "norm.weight", "norm.bias"} <= set(names)
    head = model.get_parameter("head.weight")
    assert torch.equal(head, conv_net().head.weight) and head.requires_grad
    assert remove_variational(model).get_parameter("head.weight") is head


def test_removal_finds_the_model_inside_a_wrapper_and_needs_one() -> None:
    wrapped = nn.Sequential(nn.Identity(), variational_net())
    remove_variational(wrapped)
    assert type(wrapped[1]) is type(conv_net())
    convert(wrapped)
    for function in (remove_variational, posterior_mean, lambda model: posterior_samples(model, 1)):
        with pytest.raises(OptionError) as raised:
            function(conv_net())
        assert str(raised.value) == (
            "model: expected a variational model, found ConvNet without posteriors; call "
            "make_variational(model, …) first"
        )


@pytest.mark.parametrize("kind", ["hash", "tile"])
def test_shared_weights_take_few_values_in_the_way_that_is_named(kind: str) -> None:
    model: Any = nn.Linear(64, 32)
    size = float(model.weight.detach().std())
    convert(model, streams="network", sharing={"weight": 8}, sharing_kind=kind)
    (stream,) = streams_of(model)
    assert stream.n_values == 64 * 32 // 8 + 32
    weight = model.eval().weight
    assert float(weight.std()) == pytest.approx(size, rel=0.1)  # means of eight would be much smaller
    assert len(weight.abs().unique()) == 256
    if kind == "tile":
        assert torch.equal(weight.flatten()[:256], weight.flatten()[256:512])
    else:
        # A hash with signs leaves no structure: tiles of the matrix are not alike, in any sign.
        rows = weight.reshape(8, 256)
        assert float(torch.corrcoef(rows).sub(torch.eye(8)).abs().max()) < 0.3
        assert 0.4 < float((weight > 0).float().mean()) < 0.6
    model.train()(X[..., :1].expand(3, 7, 64)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_frozen_tensor_is_coded_and_stays_frozen() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[0].weight.requires_grad_(False)
    make_variational(model, VariationalConfig(rate=2.0, parametrization="mean-kl"))
    learned = [[p.requires_grad for p in stream.parameters()] for stream in streams_of(model)]
    assert learned == [[False] * 3, [True] * 3]
