"""Writes into a weight that is drawn take effect in its posterior, or are refused by name."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from miracle_hub import make_variational, posterior_mean
from miracle_hub.errors import OptionError, WrittenWeightError

from .kinds import (
    NETWORKS,
    assert_the_file_is_what_is_evaluated,
    code,
    dense,
    evaluated,
    module_of,
    output,
    train,
    variational,
)
from .networks import part_of


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


def by_a_dense_state(module: Any) -> None:
    module.load_state_dict({"weight": module.weight.detach() * 0.5}, strict=False)


WRITES: list[Callable[[Any], None]] = [by_no_grad, by_data, by_new_data, by_adding_to_data, by_copy]
WRITES += [by_assignment, by_numpy, by_rows, by_a_tensor_held, by_a_dense_state]
POSTERIORS = [("test-channel", "tensor"), ("test-channel", "network"), ("mean-kl", "network")]
POSTERIORS += [("mean-var", "tensor")]


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in posterior_mean(model).named_parameters()}


@pytest.mark.parametrize(("parametrization", "streams"), POSTERIORS)
@pytest.mark.parametrize("network", NETWORKS)
def test_a_write_is_one_into_the_posterior(network: str, parametrization: str, streams: str) -> None:
    model = variational(network, parametrization=parametrization, streams=streams)
    module, changed = module_of(model, network), f"{NETWORKS[network][2]}.weight"
    after = weights(model)
    for write in WRITES:
        before = after
        evaluated(model, network)
        write(module)
        after = weights(model)
        for name, weight in after.items():
            expected = before[name] * (0.5 if name == changed else 1)
            if parametrization == "test-channel":
                assert torch.equal(weight, expected), (write, name)
            torch.testing.assert_close(weight, expected, rtol=1e-3, atol=1e-6, msg=f"{write} {name}")
    # It is what evaluation has.
    twin = dense(network)
    twin.load_state_dict({**twin.state_dict(), **after}, strict=False)
    torch.testing.assert_close(evaluated(model, network), evaluated(twin, network), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("network", NETWORKS)
def test_a_write_into_what_is_coded_is_refused_and_leaves_no_trace(network: str, tmp_path: Path) -> None:
    model = code(variational(network))
    expected = evaluated(model, network)
    for write in WRITES:
        with pytest.raises(WrittenWeightError, match="expected no writes once coding has begun, found one"):
            write(module_of(model, network))
            evaluated(model, network)
        assert torch.equal(evaluated(model, network), expected), write
    by_data(module_of(model, network))
    with pytest.raises(WrittenWeightError):
        model.train()
    assert_the_file_is_what_is_evaluated(model, dense(network), network, tmp_path)


def test_what_was_written_is_what_is_coded_saved_and_kept_in_states(tmp_path: Path) -> None:
    model = variational("mlp", rate=6.0)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    half = 0.5 * dense("mlp").get_parameter("0.weight")
    module_of(model, "mlp").weight.data = half.detach().clone()
    posterior = "0.parametrizations.weight.0.own.posterior.weight"
    assert torch.equal(model.state_dict()[posterior].view_as(half), half)
    by_no_grad(module_of(model, "mlp"))
    code(model)
    error = (module_of(model, "mlp").weight - 0.5 * half).detach().norm()
    assert float(error) < 0.1 * float((0.5 * half).detach().norm())
    assert_the_file_is_what_is_evaluated(model, dense("mlp"), "mlp", tmp_path)
    fresh = variational("mlp", rate=6.0)
    fresh.load_state_dict(state)
    assert torch.equal(module_of(fresh, "mlp").weight, dense("mlp").get_parameter("0.weight"))


@pytest.mark.parametrize("write", WRITES[:4], ids=lambda write: write.__name__)
def test_a_write_into_a_draw_is_refused_and_says_what_to_do(write: Callable[[Any], None]) -> None:
    model = variational("mlp", parametrization="mean-kl").train()
    before = weights(model)
    with pytest.raises(
        WrittenWeightError, match=r"0.weight: expected no writes into a draw.*model\.eval\(\)"
    ):
        write(module_of(model, "mlp"))
        output(model, "mlp")
    assert all(torch.equal(weight, before[name]) for name, weight in weights(model).items())
    output(model, "mlp").sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_noise_a_write_while_training_takes_effect(dtype: torch.dtype) -> None:
    model: Any = variational("mlp").to(dtype).train()
    before = model[0].weight.detach().clone()
    by_data(model[0])
    assert torch.equal(model[0].weight, before * 0.5)
    assert torch.equal(model.eval()[0].weight, before * 0.5)


def test_weights_that_share_a_value_are_written_alike_or_not_at_all() -> None:
    model: Any = variational(
        "mlp", streams="network", parametrization="test-channel", sharing={"0.weight": 4}
    )
    before = model[0].weight.detach().clone()
    by_data(model[0])
    assert torch.equal(model[0].weight, before * 0.5)
    with pytest.raises(WrittenWeightError, match="0.weight: expected equal weights where they share a value"):
        model[0].weight = torch.randn(12, 8)


def test_means_that_the_budget_cannot_pay_for_are_refused() -> None:
    model: Any = variational("mlp", parametrization="mean-kl", streams="network")
    before = weights(model)
    model[0].weight = before["0.weight"] * 1.3
    before["0.weight"] *= 1.3
    torch.testing.assert_close(weights(model), before, rtol=1e-4, atol=1e-6)
    before = weights(model)
    with pytest.raises(WrittenWeightError, match="0.weight: expected weights that a block's .* can pay for"):
        model[0].weight = model[0].weight * 20
    assert all(torch.equal(weight, before[name]) for name, weight in weights(model).items())


REFUSED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "parameter": (lambda m: setattr(m[0], "weight", nn.Parameter(torch.zeros(12, 8))), "found a parameter"),
    "tie": (lambda m: setattr(m[2], "weight", m[0].weight), "2.weight: expected weights of its own, found"),
    "shape": (
        lambda m: setattr(m[0], "weight", torch.zeros(3, 8)),
        r"\(12, 8\), found torch.float32 \(3, 8\)",
    ),
    "dtype": (lambda m: setattr(m[0].weight, "data", torch.zeros(12, 8).half()), "found torch.float16"),
    "none": (lambda m: setattr(m[0], "weight", None), "0.weight: expected weights of .*, found None"),
    "nan": (lambda m: setattr(m[0], "weight", torch.full((12, 8), torch.nan)), "expected finite weights"),
}


@pytest.mark.parametrize("done", REFUSED)
def test_what_is_no_write_of_weights_is_refused(done: str) -> None:
    model, (act, message) = variational("mlp"), REFUSED[done]
    expected = evaluated(model, "mlp")
    with pytest.raises(WrittenWeightError, match=message):
        act(model)
        evaluated(model, "mlp")
    assert torch.equal(evaluated(model, "mlp"), expected)


@pytest.mark.parametrize("parametrization", ["mean-kl", "mean-var", "test-channel"])
def test_writes_into_posteriors_that_torch_does_not_count_show_at_once(parametrization: str) -> None:
    """As averages are put in place of parameters: through `.data`."""
    model = variational("mlp", parametrization=parametrization)
    before = evaluated(model, "mlp")
    for parameter in model.parameters():
        parameter.data.mul_(0.9)
    found, fresh = evaluated(model, "mlp"), variational("mlp", parametrization=parametrization)
    fresh.load_state_dict(model.state_dict())
    assert not torch.equal(found, before) and torch.equal(found, evaluated(fresh, "mlp"))


def test_a_hook_that_writes_while_the_model_runs_is_named() -> None:
    model: Any = variational("mlp", parametrization="mean-kl")
    model[0].register_forward_pre_hook(lambda module, _: module.weight.data.clamp_(-0.05, 0.05))
    evaluated(model, "mlp")
    with pytest.raises(WrittenWeightError, match="0.weight: expected the weights that the posterior has"):
        code(model)


def test_an_embedding_that_writes_into_its_weight_is_refused() -> None:
    with pytest.raises(OptionError, match="weight: expected weights that nobody writes to .* max_norm=1.0"):
        make_variational(nn.Embedding(8, 4, max_norm=1.0), rate=3.0, window_bits=6)


def test_modules_called_one_by_one_have_new_noise_after_every_step() -> None:
    model: Any = variational("mlp", parametrization="mean-kl").train()
    x = NETWORKS["mlp"][1]
    first = model[0](x)
    assert torch.equal(model[0](x), first)
    number = part_of(model).draw_number
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    first.sum().backward()
    optimizer.step()
    assert not torch.equal(model[0](x), first) and part_of(model).draw_number == number + 1
    train(model, "mlp")
