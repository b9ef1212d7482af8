"""What is NaN or infinite is neither made variational, nor coded, nor written, whatever the posterior."""

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import miracle_hub
from miracle_hub.errors import MiracleError, NonFiniteWeightError, OptionError, TrainingError
from miracle_hub.training.config import CODES, PARAMETRIZATIONS, STREAMS

KINDS = list(itertools.product(PARAMETRIZATIONS, CODES, STREAMS))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 2))


def variational(parametrization: str, code: str, streams: str) -> nn.Module:
    options: dict[str, Any] = dict(parametrization=parametrization, code=code, streams=streams)
    return miracle_hub.make_variational(network(), rate=2.0, window_bits=6, **options)


@pytest.mark.parametrize(("parametrization", "code", "streams"), KINDS)
def test_a_model_that_is_not_finite_becomes_none(parametrization: str, code: str, streams: str) -> None:
    options: dict[str, Any] = dict(parametrization=parametrization, code=code, streams=streams)
    bad = itertools.product(("0.weight", "0.bias", "1.weight", "3.bias"), (math.nan, math.inf, -math.inf))
    for name, value in [*bad, ("1.running_var", math.nan)]:
        model: Any = network()
        model.state_dict()[name].view(-1)[0] = value
        with pytest.raises(
            (OptionError, NonFiniteWeightError), match=f"^{name}: expected finite weights, found 1 "
        ):
            miracle_hub.make_variational(model, rate=2.0, window_bits=6, **options)
        assert type(model[0]) is nn.Linear  # as it was


def test_an_infinite_mask_is_no_defect() -> None:
    model = network()
    model.register_buffer("mask", torch.full((4, 4), -math.inf).triu(1))
    miracle_hub.code_model(miracle_hub.make_variational(model, rate=2.0, window_bits=6), progress=False)


@pytest.mark.parametrize(("parametrization", "code", "streams"), KINDS)
def test_a_posterior_that_is_not_finite_is_not_coded(parametrization: str, code: str, streams: str) -> None:
    for value in (math.nan, math.inf):
        names = [name for name, _ in variational(parametrization, code, streams).named_parameters()]
        for name in names[:: max(1, len(names) // 3)]:
            model = variational(parametrization, code, streams)
            with torch.no_grad():
                model.get_parameter(name).view(-1)[0] = value
            with pytest.raises(TrainingError, match="expected finite weights to code, found 1 of "):
                miracle_hub.code_model(model, progress=False)


@pytest.mark.parametrize("parametrization", PARAMETRIZATIONS)
def test_what_became_not_finite_after_coding_is_not_written(parametrization: str, tmp_path: Path) -> None:
    model: Any = variational(parametrization, "sliding", "tensor")
    miracle_hub.code_model(model, progress=False)
    model[0].bias.data[0] = math.nan
    with pytest.raises(MiracleError, match="0.bias: expected finite weights to code"):
        miracle_hub.save(model, tmp_path / "network.safetensors")
    assert not list(tmp_path.iterdir())
