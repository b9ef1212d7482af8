"""The test channel: a fit without noise, and posteriors that are made when their turn comes."""

import math

import pytest
import torch
from torch import Tensor, nn

from miracle_hub.training.coder import CodingOptions, code_model
from miracle_hub.training.config import VariationalConfig
from miracle_hub.training.convert import make_variational
from miracle_hub.training.layout import Joint

from .networks import IMAGES, conv_net, loss_of, posterior_of, streams_of, variational_net


def wide(**options: object) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(256, 64, bias=False), nn.Tanh(), nn.Linear(64, 256, bias=False))
    return make_variational(model, VariationalConfig(**{"rate": 1.0, **options}))  # pyright: ignore[reportArgumentType]


def test_it_is_what_tensors_of_hub_models_get_and_networks_in_one_stream_do_not() -> None:
    assert VariationalConfig(rate=1.0).parametrization == "test-channel"
    assert VariationalConfig(message_bits=99, streams="network").parametrization == "mean-kl"


@pytest.mark.parametrize("streams", ["tensor", "network"])
def test_outputs_and_gradients_before_coding_are_those_of_the_dense_network(streams: str) -> None:
    dense = conv_net(dropout=0.0)
    model = variational_net(streams=streams, parametrization="test-channel", dropout=0.0)
    for mode in (True, False):
        assert torch.equal(model.train(mode)(IMAGES), dense.train(mode)(IMAGES))
    loss_of(model.train())(0).backward()
    loss_of(dense.train())(0).backward()
    for stream in streams_of(model):
        grads = [dense.get_parameter(m.name).grad for m in stream.members]
        flat = torch.cat([grad.flatten() for grad in grads if grad is not None])
        order = stream.layout.order if isinstance(stream.layout, Joint) else slice(None)
        torch.testing.assert_close(posterior_of(stream).weight.grad, flat[order])


@pytest.mark.parametrize("rate", [0.5, 1.0, 3.0])
def test_the_mean_kl_is_the_budget_and_draws_miss_the_weights_by_the_channels_distortion(
    rate: float,
) -> None:
    stream = streams_of(wide(rate=rate))[0]
    assert float(stream.kl_nats().sum()) == pytest.approx(stream.n_values * rate * math.log(2), rel=1e-5)
    weight = posterior_of(stream).weight.detach()
    draws = torch.stack([stream.sample(torch.tensor(seed)) for seed in range(8)])
    error = (draws - weight).square().mean() / weight.square().mean()
    assert float(error) == pytest.approx(4.0**-rate, rel=0.02)


def test_scales_are_of_the_weights_as_they_are_when_coding_begins() -> None:
    model = wide()
    stream = streams_of(model)[0]
    before = stream.scales()
    with torch.no_grad():
        posterior_of(stream).weight.mul_(3)
    code_model(model, options=CodingOptions(groups=2), progress=False)
    torch.testing.assert_close(stream.scales(), 3 * before, rtol=2**-8, atol=0)
    rows = posterior_of(stream).weight.detach().view(64, 256)
    missed = (model[0].weight.detach() - rows).square().mean(1) / rows.square().mean(1)  # pyright: ignore
    assert 0.25 < float(missed.mean()) < 0.30 and float(missed.max()) < 0.4


def test_every_group_has_a_part_of_every_tensor() -> None:
    model, shares = wide(), []

    def validate() -> float:
        shares.append([stream.n_coded() / stream.n_values for stream in streams_of(model)])
        return 0.0

    code_model(model, options=CodingOptions(groups=4), validate=validate, progress=False)
    for group, found in enumerate(shares, 1):
        assert found == pytest.approx([1 - (1 - group / 4) ** 2] * 2, abs=0.02)


def test_refits_make_up_for_a_third_of_what_coding_costs() -> None:
    """Mean squared difference of the outputs from what they were."""

    def missed(refit_steps: int) -> float:
        model = wide()
        random = torch.Generator().manual_seed(1)
        x = 0.3 * torch.randn(64, 8, generator=random) @ torch.randn(8, 256, generator=random)
        with torch.no_grad():
            wanted = model(x)

        def loss(_: int) -> Tensor:
            return (model(x) - wanted).square().mean() / wanted.var()

        options = CodingOptions(groups=10, refit_steps=refit_steps, learning_rate=3e-3)
        code_model(model, loss, options=options, progress=False)
        return float(loss(0).detach())

    assert missed(20) < missed(0) * 2 / 3


def test_before_coding_kl_and_samples_are_of_the_weights_as_they_are() -> None:
    stream = streams_of(wide())[0]
    with torch.no_grad():
        posterior_of(stream).weight.mul_(3)
    weight = posterior_of(stream).weight.detach()
    assert float(stream.kl_nats().sum()) == pytest.approx(stream.n_values * math.log(2), rel=1e-5)
    missed = (stream.sample(torch.tensor(0)) - weight).square().mean() / weight.square().mean()
    assert float(missed) == pytest.approx(0.25, rel=0.05)


def test_rows_of_zeros_stay_zeros_as_far_as_scales_go() -> None:
    model = wide()
    stream = streams_of(model)[0]
    with torch.no_grad():
        posterior_of(stream).weight.view(64, 256)[::2] = 0
    code_model(model, options=CodingOptions(groups=2), progress=False)
    rows = model[0].weight.detach()  # pyright: ignore
    assert float(rows[::2].abs().max()) < 1e-18 < 1e-3 < float(rows[1::2].square().mean().sqrt())


def test_a_network_that_is_frozen_is_coded_without_refits() -> None:
    model = conv_net()
    model.requires_grad_(False)
    make_variational(model, VariationalConfig(rate=3.0, window_bits=6, target_modules="all"))
    code_model(model, loss_of(model), options=CodingOptions(groups=3, refit_steps=2), progress=False)
    assert not model.conv.weight.requires_grad
