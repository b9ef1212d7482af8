"""Writes into a weight that is drawn take effect in its posterior, or are refused by name."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from miracle_hub import posterior_mean
from miracle_hub.errors import WrittenWeightError

from .kinds import (
    NETWORKS,
    assert_the_file_is_what_is_evaluated,
    code,
    dense,
    evaluated,
    module_of,
    variational,
)
from .networks import streams_of

PARAMETRIZATIONS = ["test-channel", "mean-kl", "mean-var"]
NAME = {network: "weight" for network in NETWORKS}


def by_no_grad(module: Any) -> None:
    with torch.no_grad():
        module.weight.mul_(0.5)


def by_data(module: Any) -> None:
    module.weight.data.mul_(0.5)


def by_new_data(module: Any) -> None:
    module.weight.data = module.weight.data * 0.5


def by_adding_to_data(module: Any) -> None:
    module.weight.data -= 0.5 * module.weight.data  # as PEFT merges


def by_copy(module: Any) -> None:
    with torch.no_grad():
        module.weight.copy_(module.weight * 0.5)


def by_assignment(module: Any) -> None:
    module.weight = module.weight.detach() * 0.5


def by_numpy(module: Any) -> None:
    module.weight.detach().numpy()[...] *= 0.5


def by_rows(module: Any) -> None:
    for row in module.weight.detach():
        row.mul_(0.5)


def by_a_tensor_held(module: Any) -> None:
    held = module.weight
    assert torch.equal(module.weight, held)
    with torch.no_grad():
        held.mul_(0.5)


WRITES = [by_no_grad, by_data, by_new_data, by_adding_to_data, by_copy, by_assignment, by_numpy, by_rows]
WRITES += [by_a_tensor_held]


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in posterior_mean(model).named_parameters()}


@pytest.mark.parametrize("write", WRITES, ids=lambda write: write.__name__)
@pytest.mark.parametrize("streams", ["tensor", "network"])
@pytest.mark.parametrize("parametrization", PARAMETRIZATIONS)
@pytest.mark.parametrize("network", NETWORKS)
def test_a_write_is_one_into_the_posterior(
    network: str, parametrization: str, streams: str, write: Callable[[Any], None]
) -> None:
    model = variational(network, parametrization=parametrization, streams=streams)
    before, module = weights(model), module_of(model, network)
    evaluated(model, network)
    write(module)
    after = weights(model)
    changed = f"{NETWORKS[network][2]}.weight"
    for name, weight in after.items():
        expected = before[name] * (0.5 if name == changed else 1)
        if parametrization == "test-channel":
            assert torch.equal(weight, expected), name
        torch.testing.assert_close(weight, expected, rtol=1e-3, atol=1e-6, msg=name)
    # It is what evaluation has, and what is coded from here on.
    twin = dense(network)
    twin.load_state_dict({**twin.state_dict(), **after}, strict=False)
    torch.testing.assert_close(evaluated(model, network), evaluated(twin, network), rtol=1e-4, atol=1e-5)
    (stream,) = [s for s in streams_of(model) if changed in [m.name for m in s.members]]
    assert stream.message is None


@pytest.mark.parametrize("write", WRITES, ids=lambda write: write.__name__)
@pytest.mark.parametrize("network", NETWORKS)
def test_a_write_into_what_is_coded_is_refused_and_leaves_no_trace(
    network: str, write: Callable[[Any], None], tmp_path: Path
) -> None:
    model = code(variational(network))
    expected = evaluated(model, network)
    with pytest.raises(
        WrittenWeightError, match="weight: expected no writes once coding has begun, found one"
    ):
        write(module_of(model, network))
        evaluated(model, network)
    assert torch.equal(evaluated(model, network), expected)
    assert_the_file_is_what_is_evaluated(model, dense(network), network, tmp_path)
