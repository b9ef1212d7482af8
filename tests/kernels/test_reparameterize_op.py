"""reparameterize as torch ops: autograd, compilation, memory, and named errors for bad input."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from plain_draws import (
    BACKWARDS,
    FORWARDS,
    KL_BACKWARDS,
    KL_FORWARDS,
    SEED,
    STREAM_ID,
    block_noise,
    noise,
    normal,
    parameters64,
    plain_mean_kl,
    plain_mean_var,
    relative,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from miracle_hub.coding.quantiles import quantiles
from miracle_kernels import KernelInputError, reparameterize, reparameterize_mean_kl
from miracle_kernels.reparameterize import (
    reparameterize_backward,
    reparameterize_backward_triton,
    reparameterize_triton,
)
from miracle_kernels.reparameterize_mean_kl import (
    reparameterize_mean_kl_backward,
    reparameterize_mean_kl_backward_triton,
    reparameterize_mean_kl_triton,
)


def mean_var_loss(mean: Tensor, log_std: Tensor, scale: Tensor, table: Tensor, seed: int) -> Tensor:
    w, kl_nats = reparameterize(mean, log_std, table, scale, None, seed, STREAM_ID)
    return (w.sin().sum() + 0.1 * kl_nats) * 2


def mean_kl_loss(tau: Tensor, alpha: Tensor, scale: Tensor, table: Tensor, seed: int) -> Tensor:
    return reparameterize_mean_kl(tau, alpha, table, scale, None, 9.0, 20, seed, STREAM_ID).sin().sum() * 2


def inputs32(device: torch.device, n: int) -> tuple[Tensor, Tensor, Tensor]:
    one, two, log_scale = normal(n, 0).to(device), normal(n, 1).to(device) - 1, torch.tensor(-0.5).to(device)
    return one.requires_grad_(), two.requires_grad_(), log_scale.requires_grad_()


@pytest.mark.parametrize("loss", [mean_var_loss, mean_kl_loss])
def test_autograd_through_the_op_equals_float64(device: torch.device, loss: Callable) -> None:
    inputs, n = inputs32(device, 63), 63
    value = loss(*inputs, quantiles().to(device), SEED)
    found = torch.autograd.grad(value, inputs)
    wide = parameters64(inputs[0].detach(), inputs[1].detach(), inputs[2].detach())
    if loss is mean_var_loss:
        w, kl_nats = plain_mean_var(*wide, torch.zeros(n).double(), noise(n).double())
        expected = (w.sin().sum() + 0.1 * kl_nats) * 2
    else:
        expected = plain_mean_kl(*wide, 9.0, 20, block_noise(n, 20).double())[0].sin().sum() * 2
    assert relative(value.detach(), expected.detach()) <= 1e-5
    for one, two in zip(found, torch.autograd.grad(expected, wide), strict=True):
        assert relative(one, two) <= 1e-5


@pytest.mark.parametrize("loss", [mean_var_loss, mean_kl_loss])
def test_torch_compile_gives_the_same_for_every_seed(device: torch.device, loss: Callable) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    inputs, table = inputs32(device, 63), quantiles().to(device)
    for seed in (3, 4, 2**40, -5):
        one, two = compiled(*inputs, table, seed), loss(*inputs, table, seed)
        assert torch.equal(one, two)
        assert all(map(torch.equal, torch.autograd.grad(one, inputs), torch.autograd.grad(two, inputs)))


def test_the_ops_are_sound_torch_ops(device: torch.device) -> None:
    one, two, scale = inputs32(device, 63)
    table, prior_mean = quantiles().to(device), normal(63, 5).to(device)
    constants = (one.detach(), two.detach(), table, scale.detach())
    grad, number = normal(63, 6).to(device), torch.tensor(0.5, device=device)
    torch.library.opcheck(reparameterize, (one, two, table, scale, prior_mean, 5, 9, torch.bfloat16))
    torch.library.opcheck(reparameterize, (one, two, table, scale, None, 5, 9))
    torch.library.opcheck(reparameterize_backward, (grad, number, *constants, None, 5, 9))
    torch.library.opcheck(reparameterize_mean_kl, (one, two, table, scale, prior_mean, 9.0, 8, 5, 9))
    torch.library.opcheck(reparameterize_mean_kl_backward, (grad, *constants, 9.0, 8, 5, 9))


@pytest.mark.parametrize("loss", [mean_var_loss, mean_kl_loss])
def test_nothing_is_saved_but_what_the_caller_holds(device: torch.device, loss: Callable) -> None:
    inputs, table = inputs32(device, 1311), quantiles().to(device)
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        value = loss(*inputs, table, SEED)
    held = {tensor.data_ptr() for tensor in (*inputs, table)}
    extra = [tensor for tensor in saved if tensor.data_ptr() not in held]
    assert len(saved) - len(extra) == 4
    assert len(extra) == 1 and extra[0].numel() == 1311  # the argument of sin, w itself
    value.backward()


class Allocations(TorchDispatchMode):
    """Sizes of the tensors that torch.empty and its kin make."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if "empty" in func.__name__:
            self.sizes.append(result.numel())
        return result


def test_launches_allocate_w_and_then_the_gradients_only(device: torch.device) -> None:
    n = 5000
    one, two, scale = (tensor.detach() for tensor in inputs32(device, n))
    table, grad, rest = quantiles().to(device), torch.ones(n, device=device), (SEED, STREAM_ID)
    calls = [
        (lambda: reparameterize_triton(one, two, table, scale, None, *rest), 1),
        (lambda: reparameterize_backward_triton(grad, scale, one, two, table, scale, None, *rest), 2),
        (lambda: reparameterize_mean_kl_triton(one, two, table, scale, None, 9.0, 8, *rest), 1),
        (lambda: reparameterize_mean_kl_backward_triton(grad, one, two, table, scale, 9.0, 8, *rest), 2),
    ]
    for call, expected in calls:
        with Allocations() as allocations:
            call()
        large = [size for size in allocations.sizes if size > n // 100]
        assert large == [n] * expected


def test_gradients_that_no_one_wrote_out_are_taken(device: torch.device) -> None:
    """w.sum() sends back one number with strides of 0, and a KL of no use sends back nothing."""
    inputs, table = inputs32(device, 63), quantiles().to(device)
    w, _ = reparameterize(*inputs[:2], table, inputs[2], None, 0, 0)
    w.sum().backward()
    assert inputs[0].grad is not None and inputs[2].grad is not None
    assert torch.equal(inputs[0].grad, torch.ones(63, device=device))
    assert inputs[2].grad == 0


@pytest.mark.parametrize("op", [reparameterize, reparameterize_mean_kl])
def test_a_prior_mean_is_a_constant(op: Callable) -> None:
    tensors = (torch.zeros(8), torch.zeros(8), quantiles(), torch.tensor(0.0))
    rest = (0, 0) if op is reparameterize else (1.0, 8, 0, 0)
    with pytest.raises(KernelInputError, match="prior_mean: expected a constant, found a tensor that"):
        op(*tensors, torch.zeros(8, requires_grad=True), *rest)


BAD = [
    (dict(first=torch.zeros(8).double()), "(mean|tau): expected float32, found torch.float64"),
    (dict(second=torch.zeros(8).half()), "(log_std|alpha): expected float32, found torch.float16"),
    (dict(second=torch.zeros(7)), r"(log_std|alpha): expected shape \(8,\) like (mean|tau), found \(7,\)"),
    (dict(second=torch.zeros(2, 4)), r"expected shape \(8,\) like (mean|tau), found \(2, 4\)"),
    (dict(first=torch.zeros(16)[::2]), r"(mean|tau): expected a contiguous tensor, found strides \(2,\)"),
    (dict(second=torch.zeros(8, device="meta")), "expected all tensors on cpu, found meta"),
    (dict(quantiles=torch.zeros(65536)), "quantiles: expected float16, found torch.float32"),
    (dict(quantiles=torch.zeros(100).half()), "quantiles: expected 65536 entries, found 100"),
    (dict(prior_log_scale=torch.zeros(1)), "prior_log_scale: expected 0 dimensions, found 1"),
    (dict(prior_log_scale=torch.tensor(0)), "prior_log_scale: expected float32, found torch.int64"),
    (dict(prior_mean=torch.zeros(8).double()), "prior_mean: expected float32 or bfloat16 or float16, found"),
    (dict(prior_mean=torch.zeros(8, 1)), r"prior_mean: expected shape \(8,\) like .*, found \(8, 1\)"),
    (dict(seed=2**63), "seed: expected an integer from -9223372036854775808"),
    (dict(stream_id=2**32), "stream_id: expected an integer from 0 to 4294967295, found 4294967296"),
    (dict(dtype=torch.float64), "dtype: expected float32, bfloat16 or float16, found torch.float64"),
]  # fmt: skip
BAD_BLOCKS = [
    (dict(block_weights=0), "block_weights: expected an integer from 1 to 1024, found 0"),
    (dict(block_weights=1025), "block_weights: expected an integer from 1 to 1024, found 1025"),
    (dict(block_kl_nats=0.0), "block_kl_nats: expected a finite number of nats above 0, found 0.0"),
    (dict(block_kl_nats=math.inf), "block_kl_nats: expected a finite number of nats above 0, found inf"),
    (dict(block_kl_nats=math.nan), "block_kl_nats: expected a finite number of nats above 0, found nan"),
]


def good() -> dict[str, Any]:
    tensors: dict[str, Any] = dict(first=torch.zeros(8), second=torch.zeros(8), quantiles=quantiles())
    return tensors | dict(prior_log_scale=torch.tensor(0.0), prior_mean=None, seed=0, stream_id=0)


@pytest.mark.parametrize(("change", "message"), BAD)
def test_bad_input_of_mean_var_is_named(change: dict, message: str) -> None:
    arguments: dict[str, Any] = good() | change
    mean, log_std = arguments.pop("first"), arguments.pop("second")
    for function in FORWARDS:
        with pytest.raises(KernelInputError, match=f"reparameterize: .*{message}"):
            function(mean=mean, log_std=log_std, **arguments)


@pytest.mark.parametrize(("change", "message"), BAD + BAD_BLOCKS)
def test_bad_input_of_mean_kl_is_named(change: dict, message: str) -> None:
    arguments: dict[str, Any] = good() | dict(block_kl_nats=1.0, block_weights=4) | change
    tau, alpha = arguments.pop("first"), arguments.pop("second")
    for function in KL_FORWARDS:
        with pytest.raises(KernelInputError, match=f"reparameterize_mean_kl: .*{message}"):
            function(tau=tau, alpha=alpha, **arguments)


def test_a_bad_gradient_is_named() -> None:
    ok, table, scale = torch.zeros(8), quantiles(), torch.tensor(0.0)
    for backward in BACKWARDS:
        with pytest.raises(KernelInputError, match=r"grad_w: expected shape \(8,\) like mean, found \(7,\)"):
            backward(torch.zeros(7), scale, ok, ok, table, scale, None, 0, 0)
        with pytest.raises(KernelInputError, match="grad_kl_nats: expected 0 dimensions, found 1"):
            backward(ok, ok, ok, ok, table, scale, None, 0, 0)
    for backward in KL_BACKWARDS:
        with pytest.raises(KernelInputError, match="grad_w: expected float32 or bfloat16 or float16, found"):
            backward(ok.long(), ok, ok, table, scale, 1.0, 4, 0, 0)
        with pytest.raises(KernelInputError, match="block_weights: expected an integer from 1 to 1024"):
            backward(ok, ok, ok, table, scale, 1.0, 2000, 0, 0)
