"""A message in the making: what is chosen stays, what is left is known, its bytes decode to the values."""

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from miracle_hub.code import Code
from miracle_hub.coding import reference
from miracle_hub.coding.posterior import Posterior
from miracle_hub.training.blocks import Budget, budget_of
from miracle_hub.training.message import Message, Selector

N = 103
CODES = [Code(8, 2, 1, seed=3), Code(8, 3, 2, seed=4), Code(8, 8, 4, seed=5)]


def posterior() -> Posterior:
    generator = torch.Generator().manual_seed(1)
    return Posterior(torch.randn(N, generator=generator), torch.full((N,), 0.1))


def selector(selection: str = "best") -> Selector:
    return Selector(selection, torch.Generator().manual_seed(0))


def chosen_in_parts(code: Code, n_parts: int, selection: str = "best") -> tuple[Message, list[Tensor]]:
    """A message that is chosen a part of its steps at a time, and its values after every part."""
    message, seen, budget = Message(code, N), [], budget_of(code, N, 8)
    for steps in torch.arange(code.steps(N)).chunk(n_parts):
        assert torch.equal(message.steps_left()[: len(steps)], steps)
        message.choose(steps, posterior(), budget, selector(selection))
        seen.append(message.values.clone())
    return message, seen


@pytest.mark.parametrize("selection", ["best", "sample"])
@pytest.mark.parametrize("n_parts", [1, 3, 20])
@pytest.mark.parametrize("code", CODES, ids=str)
def test_values_are_what_the_bytes_decode_to_however_often_the_choice_stops(
    code: Code, n_parts: int, selection: str
) -> None:
    message, seen = chosen_in_parts(code, n_parts, selection)
    assert message.n_coded() == N and not len(message.steps_left())
    packed = message.packed()
    assert packed.shape == (code.message_bytes(N),)
    assert torch.equal(message.values, reference.decode_stream(packed, code, N))
    for before, after in zip(seen, seen[1:], strict=False):
        assert torch.equal(after[before != 0], before[before != 0])


def test_blocks_may_be_chosen_in_any_order() -> None:
    code = CODES[2]
    whole, _ = chosen_in_parts(code, 1)
    message = Message(code, N)
    for step in torch.randperm(code.steps(N), generator=torch.Generator().manual_seed(0)).split(1):
        message.choose(step, posterior(), budget_of(code, N, 8), selector())
    assert torch.equal(message.packed(), whole.packed())


def test_what_is_chosen_replaces_values_and_nothing_else_does() -> None:
    code, values = CODES[2], torch.full((N,), 7.0)
    message = Message(code, N)
    assert torch.equal(message.over(values, torch.ones(1)), values)
    message.choose(torch.tensor([2, 25]), posterior(), budget_of(code, N, 8), selector())
    at = torch.tensor([8, 9, 10, 11, 100, 101, 102])  # the last block has three values only
    expected = values.index_copy(0, at, 0.5 * message.values[at])
    assert torch.equal(message.over(values, torch.full((1,), 0.5)), expected)
    assert message.is_coded.nonzero().view(-1).tolist() == at.tolist() and message.n_coded() == 7
    assert message.steps_left().tolist() == [s for s in range(26) if s not in (2, 25)]


def test_a_block_is_left_until_all_of_it_is_chosen() -> None:
    code, budget = CODES[2], Budget(8, 1.0)
    message = Message(code, N)
    assert message.blocks_left(budget).tolist() == [1.0] * 13
    message.choose(torch.tensor([0, 2, 3]), posterior(), budget, selector())
    assert message.blocks_left(budget).tolist() == [1.0, 0.0] + [1.0] * 11


def test_the_cost_of_a_choice_is_that_of_torchs_distributions() -> None:
    code, budget, own = CODES[2], Budget(8, 1.0), posterior()
    message = Message(code, N)
    chosen = message.choose(torch.tensor([0, 1, 4, 25]), own, budget, selector())
    at = message.is_coded.nonzero().view(-1)
    q = Normal(own.mean[at].double(), own.variance[at].double().sqrt())
    p, z = Normal(0.0, 1.0), message.values[at].double()
    kl = kl_divergence(q, p)
    expected = torch.stack([kl[at // 8 == block].sum() for block in (0, 2, 12)])
    torch.testing.assert_close(chosen.block_kl_nats, expected)
    log_weight = float((q.log_prob(z) - p.log_prob(z)).sum())
    assert chosen.log_weight_nats == pytest.approx(log_weight, rel=1e-5)


@pytest.mark.parametrize("n_values", [1, 15, 16, 17, 103])
def test_sums_over_blocks_count_every_value_once_and_go_back_to_values(n_values: int) -> None:
    budget, values = Budget(16, math.log(2)), torch.arange(1.0, n_values + 1)
    expected = [float(part.sum()) for part in values.split(16)]
    assert budget.sums(values).tolist() == expected and budget.n_blocks(n_values) == len(expected)
    assert budget.by_value(budget.sums(values), n_values).tolist() == [
        expected[i // 16] for i in range(n_values)
    ]


def test_a_budget_pays_for_the_rate_of_the_code_in_whole_steps() -> None:
    for code in CODES:
        budget = budget_of(code, N, 8)
        assert isinstance(budget, Budget)
        assert budget.block_weights % code.step_weights == 0
        assert budget.kl_nats == pytest.approx(code.rate * math.log(2))
        assert budget.share == pytest.approx(1 - 4.0**-code.rate)
