"""What is done to torch modules, done to variational ones: it works up to the file, or is refused by name."""

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parameters_to_vector, prune, vector_to_parameters
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

import miracle_hub
from miracle_hub import CodingOptions
from miracle_hub.errors import MiracleError, OptionError, WrittenWeightError

from .kinds import (
    NETWORKS,
    assert_the_file_is_what_is_evaluated,
    code,
    dense,
    evaluated,
    logits,
    module_of,
    output,
    train,
    variational,
)
from .networks import part_of, streams_of


def averaged(model: nn.Module, network: str, **options: Any) -> nn.Module:
    average = AveragedModel(model, **options)
    for _ in range(3):
        train(model, network)
        average.update_parameters(model)
    if network == "convolutions":
        update_bn([NETWORKS[network][1]], average)
    return average.module


def averaged_exponentially(model: nn.Module, network: str) -> nn.Module:
    use_buffers = network != "bert"  # whose positions torch averages to others
    return averaged(model, network, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=use_buffers)


def copied(model: nn.Module, network: str) -> nn.Module:
    train(model, network)
    twin = copy.deepcopy(model)
    expected = evaluated(twin, network)
    train(model, network)
    assert torch.equal(evaluated(twin, network), expected)
    return twin


def loaded(model: nn.Module, network: str, assign: bool = False) -> nn.Module:
    train(model, network)
    parametrization, streams = part_of(model).config.parametrization, part_of(model).config.streams
    fresh: Any = variational(network, parametrization=parametrization, streams=streams)
    fresh.load_state_dict(copy.deepcopy(model.state_dict()), assign=assign)
    if network == "bert" and assign:  # torch unties what is assigned
        fresh.cls.predictions.decoder.bias = fresh.cls.predictions.bias
    assert torch.equal(evaluated(fresh, network), evaluated(model, network))
    return fresh


def loaded_from_a_dense_state(model: nn.Module, network: str) -> nn.Module:
    other = dense(network)
    vector_to_parameters(0.7 * parameters_to_vector(other.parameters()), other.parameters())
    model.load_state_dict(other.state_dict())
    torch.testing.assert_close(evaluated(model, network), evaluated(other, network), rtol=0.02, atol=0.02)
    return model


def in_a_vector(model: nn.Module, network: str) -> nn.Module:
    vector_to_parameters(0.9 * parameters_to_vector(model.parameters()), model.parameters())
    return model


def in_shared_memory(model: nn.Module, network: str) -> nn.Module:
    return model.share_memory()


def cast_there_and_back(model: nn.Module, network: str) -> nn.Module:
    train(model, network)
    name = f"{NETWORKS[network][2]}.weight"
    before = miracle_hub.posterior_mean(model).get_parameter(name)
    model.to(torch.bfloat16).float()  # as bf16_full_eval does the first half
    assert torch.equal(miracle_hub.posterior_mean(model).get_parameter(name), before)
    return model


def called_by_functional_call(model: nn.Module, network: str) -> nn.Module:
    own = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    expected, inputs = evaluated(model, network), (NETWORKS[network][1],)
    with torch.no_grad():
        assert torch.equal(logits(torch.func.functional_call(model, own, inputs)), expected)
        twice = {name: 2 * parameter for name, parameter in own.items()}
        assert not torch.equal(logits(torch.func.functional_call(model, twice, inputs)), expected)
    assert torch.equal(evaluated(model, network), expected)
    return model


def mapped_over(model: nn.Module, network: str) -> nn.Module:
    if network in ("lstm", "bert"):  # of whose ops torch has no batched rules
        return model
    two = {name: torch.stack([p.detach(), 1.1 * p.detach()]) for name, p in model.named_parameters()}
    run = torch.func.vmap(lambda p: logits(torch.func.functional_call(model, p, (NETWORKS[network][1],))))
    with torch.no_grad():
        torch.testing.assert_close(run(two)[0], evaluated(model, network))
    return model


def coded_in_part(model: nn.Module, network: str) -> nn.Module:
    def stop() -> float:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        options = CodingOptions(groups=3, refit_steps=0)
        miracle_hub.code_model(model, options=options, validate=stop, progress=False)
    twin = copy.deepcopy(model)
    fresh = loaded_into_a_fresh_one(model, network)
    assert torch.equal(evaluated(twin, network), evaluated(fresh, network))
    return twin


def loaded_into_a_fresh_one(model: nn.Module, network: str) -> nn.Module:
    config = part_of(model).config
    fresh = variational(network, parametrization=config.parametrization, streams=config.streams)
    fresh.load_state_dict(model.state_dict())
    return fresh


WORKS: list[Callable[[nn.Module, str], nn.Module]] = [averaged, averaged_exponentially, copied, loaded]
WORKS += [loaded_from_a_dense_state, in_a_vector, in_shared_memory, cast_there_and_back]
WORKS += [called_by_functional_call, mapped_over, coded_in_part]
POSTERIORS = {"mlp": ("mean-var", "network"), "lstm": ("mean-kl", "tensor")}
POSTERIORS |= {"convolutions": ("mean-kl", "network"), "bert": ("test-channel", "tensor")}


@pytest.mark.parametrize("act", WORKS, ids=lambda act: act.__name__)
@pytest.mark.parametrize("network", NETWORKS)
def test_it_works_up_to_the_file(
    network: str, act: Callable[[nn.Module, str], nn.Module], tmp_path: Path
) -> None:
    parametrization, streams = POSTERIORS[network]
    model = act(variational(network, parametrization=parametrization, streams=streams), network)
    assert_the_file_is_what_is_evaluated(code(model), dense(network), network, tmp_path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_cast_is_one_of_the_weights_and_of_the_file(dtype: torch.dtype, when: str, tmp_path: Path) -> None:
    """The posterior keeps its own precision."""
    model, x = variational("mlp", streams="network", parametrization="mean-kl"), NETWORKS["mlp"][1].to(dtype)
    if when == "before":
        code(model.to(dtype))
    else:
        code(model).to(dtype)
    with torch.no_grad():
        expected = model.eval()(x)
    assert expected.dtype == dtype and {p.dtype for p in streams_of(model)[0].parameters()} == {torch.float32}
    miracle_hub.save(model, tmp_path / "net.safetensors")
    fresh = miracle_hub.load(tmp_path / "net.safetensors", dense("mlp").to(dtype))
    with torch.no_grad():
        assert torch.equal(fresh(x), expected)


@pytest.mark.parametrize("streams", ["tensor", "network"])
def test_a_wrapped_model_is_saved_under_the_names_of_the_wrapper(streams: str, tmp_path: Path) -> None:
    model = nn.Sequential(variational("mlp", streams=streams))
    assert_the_file_is_what_is_evaluated(code(model), nn.Sequential(dense("mlp")), "mlp", tmp_path)


def test_a_module_that_was_replaced_is_saved_as_it_is(tmp_path: Path) -> None:
    model: Any = variational("mlp")
    model[2] = nn.Linear(12, 4)
    assert_the_file_is_what_is_evaluated(code(model), dense("mlp"), "mlp", tmp_path)
    joint: Any = variational("mlp", streams="network")
    joint[2] = nn.Linear(12, 4)
    with pytest.raises(
        WrittenWeightError, match="2.weight: expected the module that was coded, found another"
    ):
        miracle_hub.save(code(joint), tmp_path / "file.safetensors")


@pytest.mark.parametrize("network", ["mlp", "lstm", "bert"])
@pytest.mark.parametrize("streams", ["tensor", "network"])
def test_torch_func_has_the_gradients_of_backward_where_there_is_no_noise(network: str, streams: str) -> None:
    model = variational(network, parametrization="test-channel", streams=streams)
    inputs = (NETWORKS[network][1],)

    def loss(parameters: dict[str, torch.Tensor]) -> torch.Tensor:
        return logits(torch.func.functional_call(model, parameters, inputs)).square().mean()

    for mode in (True, False):
        model.train(mode).zero_grad()
        found = torch.func.grad(loss)({name: p.detach() for name, p in model.named_parameters()})
        output(model, network).square().mean().backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                assert bool(parameter.grad.any()), name
                torch.testing.assert_close(found[name], parameter.grad)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("streams", ["tensor", "network"])
def test_torch_func_is_refused_gradients_of_noise(streams: str, training: bool) -> None:
    model = variational("mlp", parametrization="mean-kl", streams=streams).train(training)
    own, x = {name: p.detach() for name, p in model.named_parameters()}, NETWORKS["mlp"][1]
    with pytest.raises(OptionError, match=r"0.weight: expected loss.backward\(\) for a posterior with noise"):
        torch.func.grad(lambda p: torch.func.functional_call(model, p, (x,)).sum())(own)


def old(norm: Callable[..., Any]) -> Callable[[Any], Any]:
    def act(module: Any) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            norm(module)

    return act


REFUSED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "prune": (
        lambda m: prune.l1_unstructured(m, "weight", 0.5),
        "weight_orig of .*expected a parameter, found",
    ),
    "weight norm": (nn.utils.parametrizations.weight_norm, "found _WeightNorm; exclude_modules"),
    "spectral norm": (nn.utils.parametrizations.spectral_norm, "found _SpectralNorm; exclude_modules"),
    "old weight norm": (old(nn.utils.weight_norm), "weight: expected a parameter, found none but the weight"),
    "old spectral norm": (old(nn.utils.spectral_norm), "weight: expected a parameter, found none but the"),
    "pickle": (pickle.dumps, "expected a module without posteriors to pickle.*save model.state_dict"),
    "torch.save": (lambda m: torch.save(m, io.BytesIO()), "expected a module without posteriors to pickle"),
}


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("act", REFUSED)
def test_it_is_refused_and_leaves_no_trace(act: str, network: str) -> None:
    model, (do, message) = variational(network), REFUSED[act]
    expected, names = evaluated(model, network), list(model.state_dict())
    with pytest.raises(WrittenWeightError, match=message):
        do(module_of(model, network))
    if act != "old spectral norm":  # torch registers vectors first
        assert list(model.state_dict()) == names
    assert torch.equal(evaluated(model, network), expected)


def test_embeddings_are_resized_before() -> None:
    model: Any = variational("bert")
    expected = evaluated(model, "bert")
    with pytest.raises(
        WrittenWeightError, match=r"\(24, 16\), found torch.float32 \(30, 16\); change shapes"
    ):
        model.resize_token_embeddings(30, mean_resizing=False)
        evaluated(model, "bert")
    assert torch.equal(evaluated(model, "bert"), expected)


def test_averages_of_what_no_file_holds_and_of_messages_are_named(tmp_path: Path) -> None:
    model: Any = variational("bert")
    model.bert.embeddings.position_ids.data[0, 3] = 2
    code(model)
    with pytest.raises(WrittenWeightError, match="bert.embeddings.position_ids: expected a buffer as it was"):
        miracle_hub.save(model, tmp_path / "file.safetensors")
    net = code(variational("mlp"))
    message = streams_of(net)[0].message
    assert message is not None
    message.states.copy_(message.states * 0.9)  # as EMA does
    with pytest.raises(WrittenWeightError, match="0.weight: expected a message that stands for the weights"):
        miracle_hub.save(net, tmp_path / "file.safetensors")


def test_no_table_of_indices_is_among_the_buffers() -> None:
    """Averages of indices, as EMA makes them of buffers, are other indices."""
    for parametrization in ("mean-kl", "mean-var", "test-channel"):
        model = variational("mlp", parametrization=parametrization, streams="network")
        assert [name for name, buffer in model.named_buffers() if not buffer.is_floating_point()] == []


def test_freezing_and_the_optimizers_of_parts_reach_the_posteriors_of_their_weights() -> None:
    model: Any = variational("bert", parametrization="mean-kl")
    model.bert.encoder.requires_grad_(False)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(model, "bert")
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved and all(("encoder" in name) == (name not in moved) for name in before), moved
    head = variational("mlp", parametrization="mean-kl")[2]  # pyright: ignore[reportIndexIssue]
    assert len(list(head.parameters())) == 4  # the bias, and three of a posterior


def test_a_copied_part_is_an_ordinary_module_at_the_means() -> None:
    model: Any = variational("bert", parametrization="mean-kl")
    part = copy.deepcopy(model.bert)
    assert type(part.embeddings.word_embeddings) is nn.Embedding
    assert all(p.requires_grad for p in part.parameters())
    assert not any("parametrizations" in name for name, _ in part.named_modules())
    with torch.no_grad():
        x = NETWORKS["bert"][1]
        torch.testing.assert_close(part.eval()(x).last_hidden_state, model.bert(x).last_hidden_state)
    tied = copy.deepcopy(nn.ModuleList([model.bert, model.cls]))
    owners: Any = tied
    assert owners[1].predictions.decoder.weight is owners[0].embeddings.word_embeddings.weight
    with pytest.raises(MiracleError, match="without posteriors"):
        miracle_hub.posterior_mean(part)
