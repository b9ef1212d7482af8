"""Streams to encode with slide, and what their messages must cost."""

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from streams import generator, table_of
from torch import Tensor

from miracle_hub.code import Code
from miracle_hub.coding import reference
from miracle_hub.coding.posterior import Posterior, Prior, importance_cost
from miracle_kernels.slide import slide_triton
from miracle_kernels.tuning import tiles

# The package's attribute `slide` is the op.
MODULE: Any = importlib.import_module("miracle_kernels.slide")
KINDS = ["one entry", "both signs"]
# Also windows that overlap by less than one step, and branches that need 16 bits.
CODES = [
    Code(8, 2, 1, 7),
    Code(8, 3, 2, 2**63, 9),
    Code(6, 4, 1),
    Code(9, 8, 3, 1, 5),
    Code(10, 1, 4, 2),
    Code(5, 4, 1, 3),
    Code(16, 15, 2, 4),
]


class Costs(NamedTuple):
    """quadratic · z² - linear · z per weight; unlike the package's Cost, one quadratic may serve them all."""

    quadratic: Tensor
    linear: Tensor


def set_tiles(monkeypatch: pytest.MonkeyPatch, **sizes: int) -> None:
    monkeypatch.setattr(MODULE, "tiles", lambda *args, **problem: tiles(*args, **problem) | sizes)


def random_cost(n: int, kind: str, seed: int = 0) -> Costs:
    """Of a Gaussian source, or of posteriors narrower and wider than the prior (quadratic of both signs)."""
    first, second = torch.randn(2, n, generator=generator(seed))
    return Costs(torch.ones(1), 2 * first) if kind == KINDS[0] else Costs(2 * second, 3 * first)


def gaussian_cost(n: int, variance: float, seed: int = 0) -> Costs:
    """Of posteriors of one variance whose means are normal like the prior."""
    posterior = Posterior(torch.randn(n, generator=generator(seed)), torch.full((n,), variance))
    cost = importance_cost(posterior, Prior(torch.tensor(0.0), torch.tensor(1.0)))
    return Costs(cost.quadratic, cost.linear)


def arguments(
    cost: Costs, code: Code, device: torch.device, selection: str = "best", seed: int = 0
) -> dict[str, Any]:
    tensors = dict(quadratic=cost.quadratic, linear=cost.linear, table=table_of(code))
    rest = dict(
        window_bits=code.window_bits,
        step_bits=code.step_bits,
        step_weights=code.step_weights,
        selection=selection,
        seed=seed,
    )
    return {name: tensor.to(device) for name, tensor in tensors.items()} | rest


def encode(
    cost: Costs,
    code: Code,
    device: torch.device,
    selection: str = "best",
    seed: int = 0,
    function: Callable[..., tuple[Tensor, Tensor]] = slide_triton,
) -> tuple[Tensor, float]:
    """Message and cost, which must be of the right types and belong together."""
    message, found = function(**arguments(cost, code, device, selection, seed))
    assert found.dtype == torch.float64 and found.shape == () and message.device == found.device
    check_message(cost, code, message.cpu(), float(found))
    return message.cpu(), float(found)


def check_message(cost: Costs, code: Code, message: Tensor, found: float) -> None:
    """Of the right length, zero behind its last bit, and decoding to exactly the cost found.

    Exactly but for float32: terms are rounded three times and summed pairwise in tiles of at most 4,096,
    so each passes through at most 15 roundings of 2⁻²⁴, which is less than 2⁻²⁰ of the sum of magnitudes.
    """
    n = cost.linear.numel()
    assert message.dtype == torch.uint8 and message.shape == (code.message_bytes(n),)
    assert not np.unpackbits(message.numpy())[code.message_bits(n) :].any()
    quadratic, linear = cost.quadratic.double(), cost.linear.double()
    z = reference.decode_stream(message, code, n).double()
    magnitude = float((quadratic.abs() * z * z + (linear * z).abs()).sum())
    assert abs(found - float((quadratic * z * z - linear * z).sum())) <= 2**-20 * magnitude


def least_cost(cost: Costs, code: Code) -> float:
    """Of all messages, by a float64 recursion over the whole stream."""
    n, nodes = cost.linear.numel(), 1 << code.overlap_bits
    z = table_of(code).double().numpy()
    padding = (0, code.steps(n) * code.step_weights - n)
    quadratic, linear = (
        torch.nn.functional.pad(values.expand(n).double(), padding).view(-1, 1, code.step_weights).numpy()
        for values in (cost.quadratic, cost.linear)
    )
    reached = np.zeros(nodes)
    for q, b in zip(quadratic, linear, strict=True):
        total = np.repeat(reached, 1 << code.step_bits) + (z * (q * z - b)).sum(1)
        reached = total.reshape(-1, nodes).min(0)
    return float(reached.min())


def constant(cost: Costs) -> float:
    """What makes the sum of costs a weighted squared error, whose relative size means something."""
    return float((cost.linear.double() ** 2 / (4 * cost.quadratic.double())).sum())


def every_message(code: Code, n: int) -> Tensor:
    """What each message decodes to, float64 [2^message_bits, n]."""
    bits = code.message_bits(n)
    shifts = bits - code.window_bits - code.step_bits * torch.arange(code.steps(n))
    states = (torch.arange(2**bits)[:, None] >> shifts) & (2**code.window_bits - 1)
    return table_of(code).double()[states].flatten(1)[:, :n]


def every_cost(cost: Costs, code: Code) -> np.ndarray:
    """float64 [2^message_bits]."""
    z = every_message(code, cost.linear.numel())
    return (z * (cost.quadratic.double() * z - cost.linear.double())).sum(1).numpy()


def number_of(message: Tensor, bits: int) -> int:
    return int.from_bytes(message.numpy().tobytes(), "big") >> (8 * message.numel() - bits)
