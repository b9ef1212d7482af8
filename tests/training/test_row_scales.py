"""Prior scales per row: who has them, their gradients, and what is written of them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import miracle_hub
from miracle_hub.errors import OptionError
from miracle_hub.training.config import VariationalConfig

from .networks import decoded, part_of, posterior_of, streams_of

OPTIONS: dict[str, Any] = {
    "rate": 2.0,
    "window_bits": 8,
    "target_modules": "all-matrices",
    "parametrization": "mean-kl",
}


class Wide(nn.Module):
    """A matrix of long rows of unlike sizes, and one of short rows."""

    def __init__(self) -> None:
        super().__init__()
        self.long, self.short = nn.Linear(160, 65), nn.Linear(65, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.short(torch.tanh(self.long(x)))


def wide(**options: Any) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Wide()
        with torch.no_grad():
            model.long.weight *= torch.logspace(-2, 1, 65)[:, None]
    return miracle_hub.make_variational(model, **{**OPTIONS, **options})


def test_rows_of_at_least_128_weights_have_a_scale_each_and_others_share_one() -> None:
    assert [stream.scales().numel() for stream in streams_of(wide())] == [65, 1]
    assert [stream.scales().numel() for stream in streams_of(wide(scales="tensor"))] == [1, 1]
    (network,) = streams_of(wide(streams="network"))
    assert network.scales().numel() == 2


def test_scales_start_in_proportion_to_the_size_of_their_rows() -> None:
    scales = streams_of(wide())[0].scales().detach()
    torch.testing.assert_close(scales / scales[0], torch.logspace(0, 3, 65), rtol=0.2, atol=0)
    # At 2 bits per weight the prior is √(1 - 1/16) as wide as the weights are large.
    expected = 10 / 160**0.5 / 3**0.5 * (15 / 16) ** 0.5
    assert float(scales[-1]) == pytest.approx(expected, rel=0.2)


@pytest.mark.parametrize("parametrization", ["mean-kl", "mean-var"])
def test_gradients_of_row_scales_are_those_of_float64(parametrization: str) -> None:
    """w = ρ·z for Mean-KL, whose z does not depend on ρ; the KL for Mean-Var, whose w does not."""
    stream = streams_of(wide(parametrization=parametrization))[0]
    grad = torch.randn(stream.n_values, generator=torch.Generator().manual_seed(1))
    posterior = posterior_of(stream)
    log_scales = posterior.log_scales.detach().double().requires_grad_()
    rows = (20 * log_scales).exp().repeat_interleave(160)
    seed = torch.tensor(3)
    if parametrization == "mean-kl":
        with torch.no_grad():
            z = stream.draw(seed).double() / rows.detach()
        (stream.draw(seed) * grad).sum().backward()
        (z * rows * grad).sum().backward()
    else:
        q = torch.distributions.Normal(
            posterior.mean_values.detach().double(), posterior.log_std.detach().double().exp()
        )
        torch.distributions.kl_divergence(q, torch.distributions.Normal(0.0, rows)).sum().backward()
        stream.kl_nats().sum().backward()
    assert posterior.log_scales.grad is not None and log_scales.grad is not None
    torch.testing.assert_close(posterior.log_scales.grad.double(), log_scales.grad, rtol=1e-4, atol=1e-4)


def test_weights_of_unlike_rows_are_drawn_with_equal_relative_noise() -> None:
    stream = streams_of(wide())[0]
    draws = torch.stack([stream.draw(torch.tensor(seed)).detach() for seed in range(50)])
    noise = draws.std(0).view(65, 160).mean(1)
    torch.testing.assert_close(noise / noise[0], torch.logspace(0, 3, 65), rtol=0.25, atol=0)


@pytest.mark.parametrize("parametrization", ["mean-kl", "mean-var", "test-channel"])
@pytest.mark.parametrize("code", ["sliding", "block"])
def test_the_file_holds_a_scale_per_row_and_decodes_to_the_model(
    parametrization: str, code: str, tmp_path: Path
) -> None:
    model: Any = wide(parametrization=parametrization, code=code)
    miracle_hub.code_model(model, progress=False)
    miracle_hub.save(model, tmp_path / "model.safetensors")
    for stream in streams_of(model):
        member = stream.members[0]
        entry = miracle_hub.load_state_dict(tmp_path)[member.name]
        assert torch.equal(entry, decoded(stream)[0])
        assert torch.equal(entry, model.get_submodule(member.name.partition(".")[0]).weight)
    found = {tensor.name: tensor for tensor in miracle_hub.inspect(tmp_path).tensors}
    assert (found["long.weight"].row_scales, found["short.weight"].row_scales) == (True, False)
    loaded: Any = miracle_hub.load(tmp_path / "model.safetensors", Wide())
    x = torch.randn(3, 160)
    assert torch.equal(loaded(x), model.eval()(x))


def test_a_state_dict_of_a_half_coded_model_brings_its_row_scales() -> None:
    model = wide()
    for stream in streams_of(model):
        stream.begin_coding()
    again = wide()
    again.load_state_dict(model.state_dict())
    for found, expected in zip(streams_of(again), streams_of(model), strict=True):
        assert found.message is not None and torch.equal(found.scales(), expected.scales())
    assert part_of(again).kl_bits() == part_of(model).kl_bits()


def test_another_word_for_scales_is_refused() -> None:
    with pytest.raises(OptionError, match=r"scales: expected one of \('row', 'tensor'\), found 'column'"):
        VariationalConfig(rate=1.0, scales="column")
