"""codebook: the Triton kernel equals the format's definition, bit for bit."""

from typing import Any

import pytest
import torch
from torch import Tensor

from miracle_hub.code import Code
from miracle_hub.coding import reference
from miracle_hub.coding.quantiles import quantiles
from miracle_kernels import KernelInputError, codebook, codebook_torch
from miracle_kernels.codebook import codebook_triton


def signed(seed: int) -> int:
    return seed - 2**64 if seed >= 2**63 else seed


def defined(states: Tensor, step_weights: int, seed: int, stream_id: int) -> Tensor:
    """By the package's reference, which is the definition."""
    return reference.candidates(states.long(), Code(24, 24, step_weights, seed, stream_id)).half()


def random_states(n: int) -> Tensor:
    return torch.randint(2**24, (n,), generator=torch.Generator().manual_seed(n))


@pytest.mark.parametrize("n", [1, 63, 1311])
@pytest.mark.parametrize("step_weights", [1, 2, 7, 8, 9, 31, 128])
def test_kernel_and_torch_equal_the_definition(device: torch.device, n: int, step_weights: int) -> None:
    states = random_states(n)
    expected = defined(states, step_weights, 5, 9)
    arguments = (states.to(device), quantiles().to(device), step_weights, 5, 9)
    assert torch.equal(codebook_triton(*arguments).cpu(), expected)
    assert torch.equal(codebook_torch(*arguments).cpu(), expected)


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**32 - 1, 2**32 + 7, 2**63 - 1, 2**63, 2**64 - 1])
@pytest.mark.parametrize("stream_id", [0, 1, 2**31, 2**32 - 1])
def test_every_word_of_seed_and_stream_id_counts(device: torch.device, seed: int, stream_id: int) -> None:
    states = random_states(63)
    expected = defined(states, 9, seed, stream_id)
    arguments = (states.to(device), quantiles().to(device), 9, signed(seed), stream_id)
    assert torch.equal(codebook_triton(*arguments).cpu(), expected)
    assert torch.equal(codebook_torch(*arguments).cpu(), expected)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_states_may_be_a_view_with_an_offset(device: torch.device, dtype: torch.dtype) -> None:
    states = random_states(200).to(device, dtype)[17:80]
    found = codebook_triton(states, quantiles().to(device), 3, 0, 0)
    assert torch.equal(found.cpu(), defined(states.cpu(), 3, 0, 0))


def test_no_states_give_no_candidates(device: torch.device) -> None:
    states = torch.zeros(0, dtype=torch.int64, device=device)
    assert codebook(states, quantiles().to(device), 4, 0, 0).shape == (0, 4)


def test_the_op_is_a_sound_torch_op(device: torch.device) -> None:
    arguments = (random_states(63).to(device), quantiles().to(device), 9, 5, 9)
    torch.library.opcheck(codebook, arguments)
    assert torch.equal(codebook(*arguments).cpu(), defined(random_states(63), 9, 5, 9))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(states=torch.zeros(3)), "states: expected int32 or int64, found torch.float32"),
        (dict(states=torch.zeros(3, 2, dtype=torch.int64)), "states: expected 1 dimension, found 2"),
        (dict(states=torch.zeros(6, dtype=torch.int64)[::2]), r"a contiguous tensor, found strides \(2,\)"),
        (dict(quantiles=torch.zeros(65536)), "quantiles: expected float16, found torch.float32"),
        (dict(quantiles=torch.zeros(100).half()), "quantiles: expected 65536 entries, found 100"),
        (dict(quantiles=torch.zeros(65536, device="meta").half()), "all tensors on cpu, found meta"),
        (dict(step_weights=0), "step_weights: expected an integer from 1 to 256, found 0"),
        (dict(step_weights=257), "step_weights: expected an integer from 1 to 256, found 257"),
        (dict(seed=2**63), "seed: expected an integer from -9223372036854775808"),
        (dict(stream_id=-1), "stream_id: expected an integer from 0 to 4294967295, found -1"),
    ],
)  # fmt: skip
def test_bad_input_is_named(change: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = dict(
        states=torch.zeros(3, dtype=torch.int64), quantiles=quantiles(), step_weights=4, seed=0, stream_id=0
    )
    for function in (codebook_triton, codebook_torch):
        with pytest.raises(KernelInputError, match=message):
            function(**(good | change))
