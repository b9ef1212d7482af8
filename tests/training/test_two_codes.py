"""Streams of two codes: each part is fitted within its own budget, coded, kept and written as it is."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from miracle_hub.code import SplitCode
from miracle_hub.training.blocks import block_budgets
from miracle_hub.training.coder import CodingOptions, code_model
from miracle_hub.training.config import VariationalConfig
from miracle_hub.training.convert import make_variational, posterior_mean
from miracle_hub.training.stream import Stream, message_of

from .networks import candidates_of, decoded, in_stream_order, loss_of, part_of, streams_of, variational_net

KINDS = ("mean-kl", "mean-var", "test-channel")
# 473 values, and a matrix whose rows have scales: neither has a code of this rate.
NETWORK: dict[str, Any] = {"streams": "network", "rate": 1.7, "window_bits": 8}


def network(kind: str, **options: Any) -> tuple[nn.Module, Stream, SplitCode]:
    model = variational_net(**{**NETWORK, "parametrization": kind, **options})
    (stream,) = streams_of(model)
    assert isinstance(stream.code, SplitCode)
    return model, stream, stream.code


def matrix(kind: str, **options: Any) -> tuple[nn.Module, Stream, SplitCode]:
    torch.manual_seed(0)
    config = VariationalConfig(**{"rate": 1.7, "window_bits": 8, "parametrization": kind, **options})
    model = make_variational(nn.Linear(128, 70, bias=False), config)
    (stream,) = streams_of(model)
    assert isinstance(stream.code, SplitCode) and stream.code.n_first % 128 == 0
    return model, stream, stream.code


MAKE = {"network": network, "matrix": matrix}


@pytest.mark.parametrize("order", ["random", "largest-kl"])
@pytest.mark.parametrize("code", ["sliding", "block"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("what", MAKE)
def test_the_weights_are_those_of_both_messages(what: str, kind: str, code: str, order: str) -> None:
    model, stream, _ = MAKE[what](kind, code=code)
    loss = loss_of(model) if what == "network" else None
    options = CodingOptions(groups=3, refit_steps=1, order=order)
    journal = code_model(model, loss, options=options, progress=False)
    assert journal.rows[-1].coded_values == stream.n_values
    assert len(message_of(stream)) == stream.code.message_bytes(stream.n_values)
    dense = posterior_mean(model)
    for member, weights in zip(stream.members, decoded(stream), strict=True):
        assert torch.equal(dense.get_parameter(member.name), weights)
    found = in_stream_order(dense, stream)
    assert torch.equal(found, candidates_of(stream) * stream.posterior.value_scales())


@pytest.mark.parametrize("what", MAKE)
def test_a_budget_of_kl_is_that_of_the_code_of_its_values(what: str) -> None:
    _, stream, code = MAKE[what]("mean-kl")
    mean, variance = (x.double() for x in stream.moments())
    kl = 0.5 * (mean.square() + variance - 1 - variance.log())
    blocks = stream.budget.sums(kl)
    torch.testing.assert_close(blocks, stream.kl_nats().double().detach(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(stream.kl_nats(), block_budgets(stream.budget, mean.float()))
    first = stream.budget.block_of(torch.tensor([0, code.n_first - 1, code.n_first, stream.n_values - 1]))
    assert first[1] + 1 == first[2] and int(first[3]) + 1 == len(blocks)
    per_value = [float(kl[: code.n_first].mean()), float(kl[code.n_first :].mean())]
    rates = [code.first.rate * math.log(2), code.rest.rate * math.log(2)]
    assert per_value == pytest.approx(rates, rel=0.15)  # a last block is short, and has all of its budget
    assert per_value[0] > per_value[1]


def test_a_test_channel_spends_on_each_part_what_its_code_pays_for() -> None:
    """Of Gaussian rows, whose scale is that of their own part."""
    torch.manual_seed(0)
    layer = nn.Linear(256, 400, bias=False)
    with torch.no_grad():
        layer.weight.normal_(0, 0.05)
    config = VariationalConfig(rate=1.7, window_bits=8, parametrization="test-channel")
    (stream,) = streams_of(make_variational(layer, config))
    code = stream.code
    assert isinstance(code, SplitCode)
    mean, variance = stream.moments()
    kl = 0.5 * (mean.square() + variance - 1 - variance.log()) / math.log(2)
    for at, own in ((slice(0, code.n_first), code.first), (slice(code.n_first, None), code.rest)):
        assert float(kl[at].mean()) == pytest.approx(own.rate, rel=0.01)
        assert float(variance[at].mean()) == pytest.approx(4.0**-own.rate, rel=1e-3)


@pytest.mark.parametrize("kind", ["mean-kl", "mean-var"])
def test_both_parts_have_noise_of_their_own(kind: str) -> None:
    model, stream, code = network(kind)
    mean, variance = stream.moments()
    scales = stream.posterior.value_scales().detach()
    drawn = stream.draw(part_of(model).seed()).detach()
    noise = (drawn / scales - mean) / variance.sqrt()
    n = min(code.n_first, stream.n_values - code.n_first)
    both = torch.stack([noise[:n], noise[code.n_first : code.n_first + n]])
    assert abs(float(torch.corrcoef(both)[0, 1])) < 0.4 and 0.7 < float(noise.std()) < 1.3


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_both_parts(kind: str) -> None:
    model, stream, code = network(kind)
    (loss_of(model)(0) + part_of(model).penalty()).backward()
    for parameter in stream.posterior.parameters():  # pyright: ignore[reportAttributeAccessIssue]
        if parameter.numel() == stream.n_values:
            assert parameter.grad is not None
            assert parameter.grad[: code.n_first].any() and parameter.grad[code.n_first :].any()


@pytest.mark.parametrize("code", ["sliding", "block"])
def test_a_state_dict_of_a_half_coded_model_brings_both_messages(code: str) -> None:
    def stop() -> float:
        raise KeyboardInterrupt

    options, messages = CodingOptions(groups=4, refit_steps=0), list[Tensor]()
    model, _, _ = network("mean-kl", code=code)
    for validate in (stop, None):
        try:
            code_model(model, options=options, validate=validate, progress=False)
        except KeyboardInterrupt:
            state = copy.deepcopy(model.state_dict())
            model, _, _ = network("mean-kl", code=code)
            model.load_state_dict(state)
            assert 0 < streams_of(model)[0].n_coded() < 473
    messages.append(message_of(streams_of(model)[0]))
    whole, stream, _ = network("mean-kl", code=code)
    code_model(whole, options=options, progress=False)
    assert torch.equal(message_of(stream), messages[0])
