"""Curvature of columns: mean squares of a layer's inputs, and what coding makes of them."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from miracle_hub.errors import TrainingError
from miracle_hub.training.activations import measure_curvature
from miracle_hub.training.coder import CodingOptions, code_model
from miracle_hub.training.config import VariationalConfig
from miracle_hub.training.convert import make_variational

from .networks import IMAGES, conv_net, loss_of, posterior_of, streams_of, variational_net


class Mixed(nn.Module):
    """An embedding whose weight is the last layer's too, convolutions, linear layers of images and rows."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(64, 32)
        self.rows = nn.Linear(32, 64, bias=False)
        self.conv, self.grouped = nn.Conv1d(64, 64, 3), nn.Conv1d(64, 64, 3, groups=2)
        self.head, self.unused = nn.Linear(64, 32), nn.Linear(32, 64)
        self.out = nn.Linear(32, 64, bias=False)
        self.out.weight = self.words.weight
        self.inputs: dict[str, Tensor] = {}

    def forward(self, words: Tensor) -> Tensor:
        self.inputs["rows"] = self.words(words)
        x = self.rows(input=self.inputs["rows"]).movedim(1, 2)
        self.inputs["conv"] = x
        x = self.grouped(self.conv(x))
        self.inputs["head"] = x.movedim(1, 2).tanh()
        self.inputs["out"] = self.head(self.inputs["head"])
        return self.out(self.inputs["out"])


WORDS = torch.randint(64, (5, 9), generator=torch.Generator().manual_seed(0))


def test_it_is_the_mean_square_of_the_inputs_of_linear_layers_and_convolutions() -> None:
    torch.manual_seed(1)
    model: Any = make_variational(
        Mixed(), VariationalConfig(rate=1.0, window_bits=8, target_modules="all-matrices")
    )
    seen: list[dict[str, Tensor]] = []

    def run(number: int) -> None:
        model(WORDS[number : number + 2])
        seen.append(dict(model.inputs))

    measure_curvature(model, run, 3)
    squares = {name: torch.cat([s[name] for s in seen]).double().square() for name in seen[0]}
    expected = {
        "rows.weight": squares["rows"].mean((0, 1)),
        "conv.weight": squares["conv"].mean((0, 2)).repeat_interleave(3),
        "head.weight": squares["head"].mean((0, 1)),
        "words.weight": squares["out"].mean((0, 1)),
    }
    for stream in streams_of(model):
        name, found = stream.members[0].name, posterior_of(stream).curvature
        wanted = expected.pop(name, torch.ones(1, dtype=torch.double))
        relative = (wanted / wanted.mean()).clamp(min=0.02)
        torch.testing.assert_close(found.double(), relative / relative.mean(), rtol=1e-5, atol=0)
        # Exactly for weights whose size does not depend on their column; these are drawn at random.
        v = stream.moments()[1].view(-1, found.numel())[0].double()
        kl_nats = 0.5 * ((1 - v).square() / (1 - 2.0**-2) + v - 1 - v.log())
        assert float(kl_nats.mean()) == pytest.approx(math.log(2), rel=1e-5)
        assert float(stream.kl_nats().sum()) == pytest.approx(stream.n_values * math.log(2), rel=0.05)
    assert not expected


def test_errors_move_to_where_they_cost_less() -> None:
    """Squared error of a layer's outputs, without refits, where neighbors matter differently."""
    torch.manual_seed(0)
    x = torch.randn(512, 256) * torch.linspace(-2, 2, 256).exp()[torch.randperm(256)]

    def missed(measured: bool) -> tuple[float, float]:
        torch.manual_seed(0)
        layer = nn.Linear(256, 64, bias=False)
        wanted, before = layer(x).detach(), layer.weight.detach().clone()
        make_variational(layer, VariationalConfig(rate=1.0))
        if measured:
            measure_curvature(layer, lambda _: layer(x), 1)
        code_model(layer, options=CodingOptions(groups=1), progress=False)
        with torch.no_grad():
            outputs = (layer(x) - wanted).square().mean() / wanted.square().mean()
            weights = (layer.weight - before).square().mean() / before.square().mean()
        return float(outputs), float(weights)

    (output, weight), (uniform_output, uniform_weight) = missed(True), missed(False)
    assert output < 0.6 * uniform_output
    assert uniform_weight < weight


def test_coding_measures_it_with_the_batches_that_refits_have() -> None:
    for groups, refit_steps, expected in ((1, 5, 0), (3, 0, 0), (3, 2, 4), (9, 9, 16)):
        model = variational_net(parametrization="test-channel")
        counted = []

        def loss(number: int, model: nn.Module = model, counted: list = counted) -> Tensor:
            assert model.training
            counted.append(number)
            return loss_of(model)(number)

        code_model(model, loss, options=CodingOptions(groups, refit_steps), progress=False)
        assert counted == [*range(expected), *range(len(counted) - expected)]
        assert len(counted) > expected or not expected


def test_measuring_leaves_no_other_trace() -> None:
    model = variational_net(parametrization="test-channel").train()
    assert isinstance(model.norm, nn.Module)
    model.norm.eval()  # someone has frozen it
    before = {name: t.clone() for name, t in model.state_dict().items() if isinstance(t, Tensor)}
    modes, random = [m.training for m in model.modules()], torch.get_rng_state()
    measure_curvature(model, loss_of(model), 3)
    changed = {name for name, t in before.items() if not torch.equal(t, model.state_dict()[name])}
    assert changed and all(name.endswith("posterior.curvature") for name in changed)
    assert [m.training for m in model.modules()] == modes and torch.equal(torch.get_rng_state(), random)
    with pytest.raises(IndexError):
        measure_curvature(model, lambda number: model(IMAGES)[[1, 99][number]], 3)
    assert not any(m._forward_pre_hooks for name, m in model.named_modules() if name)


@pytest.mark.parametrize("options", [{}, {"parametrization": "test-channel", "streams": "network"}])
def test_posteriors_that_have_none_run_nothing(options: dict[str, Any]) -> None:
    measure_curvature(variational_net(**options), lambda _: pytest.fail("nothing to measure"), 3)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_inputs_that_are_not_finite_stop_before_anything_is_coded(bad: float) -> None:
    model = make_variational(conv_net(), VariationalConfig(rate=3.0, window_bits=6, target_modules="all"))
    images = IMAGES.clone()
    images[3] = bad

    def loss(number: int) -> Tensor:
        return model(images).sum()

    with pytest.raises(TrainingError) as raised:
        code_model(model, loss, options=CodingOptions(groups=3, refit_steps=1), progress=False)
    assert str(raised.value) == (
        f"conv.weight: expected finite inputs of its layer, found {bad} as the sum of their squares over 2 "
        "batches; nothing is coded: look at the data"
    )
    assert all(stream.message is None for stream in streams_of(model))  # it may be fitted further


class ChannelsFirst(nn.Linear):
    """As some heads of transformers models: of a known kind, with its inputs in another order."""

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class OtherInputs(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x=x))

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = ChannelsFirst(16, 16), nn.Conv1d(16, 16, 1)


def test_a_layer_with_a_forward_of_its_own_has_no_curvature() -> None:
    model = make_variational(OtherInputs(), VariationalConfig(rate=2.0, window_bits=8))
    x = torch.randn(4, 16, 16) * torch.linspace(0.1, 3, 16)[:, None]
    measure_curvature(model, lambda _: model(x), 1)
    first, second = streams_of(model)
    assert posterior_of(first).curvature.tolist() == [1.0]
    assert posterior_of(second).curvature.numel() == 16


def padded(model: nn.Module) -> Tensor:
    """In evaluation torch would make a nested tensor of it."""
    padding = torch.zeros(3, 6, dtype=torch.bool)
    padding[0, 3:] = True
    return model(torch.randn(3, 6, 16), src_key_padding_mask=padding)[:, 0].square().mean()


def slope(model: nn.Module) -> Tensor:
    x = torch.randn(8, 16).requires_grad_()
    return torch.autograd.grad(model(x).sum(), x, create_graph=True)[0].square().mean()


def mapped(model: nn.Module) -> Tensor:
    return torch.vmap(model)(torch.randn(4, 16)).square().mean()


def large(model: nn.Module) -> Tensor:
    return (model(torch.full((4, 16), 1e20)) * 1e-20).sum()


@pytest.mark.parametrize("loss", [padded, slope, mapped, large])
def test_losses_that_refits_can_use_are_not_refused(loss: Callable[[nn.Module], Tensor]) -> None:
    torch.manual_seed(0)
    if loss is padded:
        network = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 1)
    else:
        network = nn.Sequential(nn.Linear(16, 16), nn.Tanh())
    model = make_variational(network, VariationalConfig(rate=2.0, window_bits=8))
    code_model(model, lambda _: loss(model), options=CodingOptions(3, 2), progress=False)


@pytest.mark.parametrize("size", [0.0, 1e-20, 1e-12])
@pytest.mark.parametrize("moved", [0.0, 1e-3])
def test_a_row_of_another_size_costs_the_other_rows_nothing(size: float, moved: float) -> None:
    """Also where it has moved after its scale was fixed."""
    torch.manual_seed(0)
    layer = nn.Linear(128, 64, bias=False)
    with torch.no_grad():
        layer.weight[40] = size * torch.randn(128)
    before = layer.weight.detach().clone()
    model = make_variational(layer, VariationalConfig(rate=2.0))
    for stream in streams_of(model):
        stream.begin_coding()
        with torch.no_grad():
            posterior_of(stream).weight.view(64, 128)[40] += moved * torch.randn(128)
    code_model(model, options=CodingOptions(groups=2), progress=False)
    errors = (layer.weight.detach() - before).square().sum(1) / before.square().sum(1)
    assert float(errors[torch.arange(64) != 40].mean()) < 0.1
