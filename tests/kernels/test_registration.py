"""An op's arguments stand once, in a tuple: its schema, its kernel, its reference and its check have them."""

import inspect
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import miracle_kernels
from miracle_kernels.registration import takes
from miracle_kernels.reparameterize import reparameterize_backward
from miracle_kernels.reparameterize_mean_kl import reparameterize_mean_kl_backward

# A saved graph names ops and arguments: what is here stays as it is.
SCHEMAS = [
    "codebook(Tensor states, Tensor quantiles, SymInt step_weights, SymInt seed, SymInt stream_id) -> "
    "Tensor",
    "decode(Tensor(a0!) out, Tensor message, Tensor table, Tensor scales, Tensor? mean, SymInt rows, "
    "SymInt first_row, SymInt window_bits, SymInt step_bits, SymInt step_weights, SymInt seed, SymInt "
    "stream_id, SymInt rotation, SymInt band_columns, SymInt first_index, bool with_digest) -> Tensor",
    "decode_linear(Tensor x, Tensor message, Tensor table, Tensor scales, SymInt rows, SymInt "
    "window_bits, SymInt step_bits, SymInt step_weights, SymInt seed, SymInt stream_id, SymInt rotation, "
    "SymInt band_columns) -> Tensor",
    "reparameterize(Tensor mean, Tensor log_std, Tensor quantiles, Tensor prior_log_scale, Tensor? "
    "prior_mean, SymInt seed, SymInt stream_id, ScalarType dtype=6) -> (Tensor, Tensor)",
    "reparameterize_mean_kl(Tensor tau, Tensor alpha, Tensor quantiles, Tensor prior_log_scale, Tensor? "
    "prior_mean, float block_kl_nats, SymInt block_weights, SymInt seed, SymInt stream_id, ScalarType "
    "dtype=6) -> Tensor",
    "select(Tensor quadratic, Tensor linear, Tensor quantiles, SymInt window_bits, SymInt seed, SymInt "
    "stream_id, str selection, SymInt noise_seed) -> (Tensor, Tensor, Tensor)",
    "slide(Tensor quadratic, Tensor linear, Tensor table, SymInt window_bits, SymInt step_bits, SymInt "
    "step_weights, str selection, SymInt seed) -> (Tensor, Tensor)",
    "reparameterize_backward(Tensor grad_w, Tensor grad_kl_nats, Tensor mean, Tensor log_std, Tensor "
    "quantiles, Tensor prior_log_scale, Tensor? prior_mean, SymInt seed, SymInt stream_id) -> (Tensor, "
    "Tensor, Tensor)",
    "reparameterize_mean_kl_backward(Tensor grad_w, Tensor tau, Tensor alpha, Tensor quantiles, Tensor "
    "prior_log_scale, float block_kl_nats, SymInt block_weights, SymInt seed, SymInt stream_id) -> "
    "(Tensor, Tensor, Tensor)",
]  # fmt: skip


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: schema.partition("(")[0])
def test_the_schema_of_an_op_does_not_change(schema: str) -> None:
    name = schema.partition("(")[0]
    backward: dict[str, Any] = {
        "reparameterize_backward": reparameterize_backward,
        "reparameterize_mean_kl_backward": reparameterize_mean_kl_backward,
    }
    op: Any = backward.get(name) or getattr(miracle_kernels, name)
    assert str(op._opoverload._schema) == f"miracle_kernels::{schema}"


class Arguments(NamedTuple):
    x: Tensor
    factor: int
    offset: float = 0.5


def check(given: Arguments) -> None:
    if given.factor < 0:
        raise ValueError(given.factor)


@takes(Arguments, check)
def scaled(given: Arguments) -> Tensor:
    """x times the factor."""
    return given.x * given.factor + given.offset


def test_the_function_of_a_tuple_takes_its_fields_and_their_defaults() -> None:
    assert str(inspect.signature(scaled)).startswith("(x: torch.Tensor, factor: int, offset: float = 0.5)")
    assert scaled.__name__ == "scaled" and scaled.__doc__ == "x times the factor."
    assert torch.equal(scaled(torch.ones(2), 3), torch.full((2,), 3.5))
    assert torch.equal(scaled(offset=0.0, factor=2, x=torch.ones(2)), torch.full((2,), 2.0))


def test_arguments_are_checked_before_anything_is_computed() -> None:
    with pytest.raises(ValueError, match="-1"):
        scaled(None, -1)
    with pytest.raises(TypeError, match="factor"):
        scaled(torch.ones(2))
    with pytest.raises(TypeError, match="another"):
        scaled(torch.ones(2), 1, another=2)
