"""KL per block: values and gradients of the numba loops against float64 autograd."""

import pytest
import torch

from miracle_hub.coding.block_kl import block_kl_nats


@pytest.mark.parametrize("block_weights", [1, 40, 128])
@pytest.mark.parametrize("n_scales", ["one", "each"])
@pytest.mark.parametrize("spread", [1.0, 1e-3])
def test_values_and_gradients_are_those_of_float64(block_weights: int, n_scales: str, spread: float) -> None:
    """At a small spread q is nearly p, where e^u - 1 - u has lost its digits in float32."""
    torch.manual_seed(0)
    n = 300_007  # two chunks, and a last block that is short
    inputs = [
        torch.randn(n) * spread,
        torch.randn(n) * spread,
        torch.randn(n if n_scales == "each" else 1) / 9,
    ]
    inputs[1] = inputs[1] + inputs[2]
    inputs = [x.requires_grad_() for x in (t.detach() for t in inputs)]
    found = block_kl_nats(inputs[0], inputs[1], inputs[2], block_weights)
    grad = torch.randn_like(found)
    found.backward(grad)
    mean, log_std, log_scales = doubles = [x.detach().double().requires_grad_() for x in inputs]
    u = 2 * (log_std - log_scales)
    each = 0.5 * ((mean * (-log_scales).exp()).square() + torch.expm1(u) - u)
    expected = torch.nn.functional.pad(each, (0, -n % block_weights)).view(-1, block_weights).sum(1)
    expected.backward(grad.double())
    pairs = [
        (found.detach(), expected.detach()),
        *((x.grad, y.grad) for x, y in zip(inputs, doubles, strict=True)),
    ]
    for ours, theirs in pairs:
        assert ours is not None and theirs is not None
        assert float((ours - theirs).norm()) <= 1e-5 * float(theirs.norm())
