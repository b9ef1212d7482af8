"""States through a backend: both choose the same ones, and their candidates are the reference's."""

import pytest
import torch
from torch import Tensor

from miracle_hub.code import Code
from miracle_hub.coding import reference
from miracle_hub.coding.backend import Backend, choose
from miracle_hub.coding.encode import pack_states
from miracle_hub.coding.posterior import Cost
from miracle_hub.errors import OptionError

BACKENDS = ["cpu", "triton"]
CODES = [(8, 8, 4), (7, 7, 3), (8, 2, 1), (9, 3, 2), (6, 6, 130)]


def random_cost(n: int, backend: Backend) -> Cost:
    generator = torch.Generator().manual_seed(3)
    quadratic = torch.rand(n, generator=generator) + 0.5
    return Cost(quadratic.to(backend.device), torch.randn(n, generator=generator).to(backend.device))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("code", [*CODES, (12, 2, 9), (20, 20, 5)])
def test_candidates_are_those_of_the_reference(backend: str, code: tuple) -> None:
    coded, chosen = Code(*code, seed=2**64 - 1, stream_id=2**32 - 1), choose(backend)
    states = torch.randint(2**coded.window_bits, (99,), generator=torch.Generator().manual_seed(0))
    found = chosen.candidates(states.to(chosen.device), coded)
    assert torch.equal(found.cpu(), reference.candidates(states, coded))


@pytest.mark.parametrize("selection", ["best", "sample"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("code", CODES)
def test_candidates_of_states_are_what_their_message_decodes_to(
    code: tuple, backend: str, selection: str
) -> None:
    coded, chosen, generator = Code(*code), choose(backend), torch.Generator().manual_seed(1)
    states = chosen.encode_states(random_cost(261, chosen), coded, selection, generator)
    assert states.dtype == torch.int64 and states.shape == (coded.steps(261),)
    message = pack_states(states.cpu().numpy(), coded)
    z = chosen.candidates(states, coded).flatten()[:261].cpu()
    assert torch.equal(z, reference.decode_stream(message, coded, 261))


@pytest.mark.parametrize("selection", ["best", "sample"])
@pytest.mark.parametrize("code", CODES)
def test_whichever_backend_is_asked_the_states_of_a_fit_are_the_same(code: tuple, selection: str) -> None:
    found: list[Tensor] = []
    for chosen in map(choose, BACKENDS):
        generator = torch.Generator().manual_seed(2)
        found.append(chosen.encode_states(random_cost(260, chosen), Code(*code), selection, generator))
    assert torch.equal(*found)


@pytest.mark.parametrize("backend", BACKENDS)
def test_next_steps_begin_with_the_bits_of_the_step_before(backend: str) -> None:
    code, chosen = Code(9, 3, 2), choose(backend)
    for entry in (0, 1, 37, 63):
        states: Tensor = chosen.encode_states(random_cost(40, chosen), code, "best", None, entry)
        assert int(states[0]) >> code.step_bits == entry


@pytest.mark.parametrize("backend", BACKENDS)
def test_selections_that_cannot_be_are_refused(backend: str) -> None:
    chosen = choose(backend)
    cost = random_cost(8, chosen)
    with pytest.raises(OptionError, match="selection: expected one of"):
        chosen.encode_states(cost, Code(8, 8, 4), "mean", None)
    with pytest.raises(OptionError, match="needs a torch.Generator"):
        chosen.encode_states(cost, Code(8, 2, 1), "sample", None)
