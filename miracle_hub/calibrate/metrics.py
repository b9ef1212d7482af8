"""What errors of states between blocks cost: second moments of the gradients of the model's answers."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn
from tqdm import tqdm

from miracle_hub.calibrate.blocks import Batch, Chain
from miracle_hub.calibrate.outputs import answers, device_of, sampled_gradient
from miracle_hub.calibrate.precision import fast_products

# Of the mean of the diagonal, added to it: how little the moments are trusted.
_DAMPING = 0.1


def metrics_of(
    model: nn.Module, chains: Sequence[Chain], batches: Sequence[Batch], seed: int, progress: bool = False
) -> list[list[Float[Tensor, "d d"]]]:
    """L of every block of every chain: an error e of the states h after it costs ‖e·L‖²/‖h‖², up to a factor.

    L·Lᵀ are the damped second moments of gradients times ‖h‖: norms of later layers divide by about as much.

    Args:
        batches: of which the dense model's sampled answers are differentiated.
    """
    generator = torch.Generator(device_of(model)).manual_seed(seed)
    with _watched(chains) as sums:
        for batch in tqdm(batches, desc="states", disable=not progress):
            with torch.enable_grad(), fast_products(device_of(model)):
                kind, answer = answers(model, batch)
            answer.backward(sampled_gradient(kind, answer.detach(), generator))
    return [[_factor(sums[id(block)]) for block in chain.blocks] for chain in chains]


@contextmanager
def _watched(chains: Sequence[Chain]) -> Iterator[dict[int, Tensor]]:
    """Sums of products of the gradients of what blocks return, by block."""
    sums: dict[int, Tensor] = {}

    def watch(block: nn.Module, _inputs: tuple, output: object) -> None:
        states = output[0] if isinstance(output, tuple) else output
        assert isinstance(states, Tensor)
        if not torch.is_grad_enabled():
            return
        length = states.detach().norm(dim=-1, keepdim=True)

        def add(gradient: Tensor) -> None:
            rows = (gradient * length).flatten(0, -2).float()
            sums[id(block)] = sums.get(id(block), 0) + rows.T @ rows

        states.requires_grad_(True).register_hook(add)

    handles = [block.register_forward_hook(watch) for chain in chains for block in chain.blocks]
    try:
        yield sums
    finally:
        for handle in handles:
            handle.remove()


def _factor(moments: Tensor) -> Tensor:
    mean = moments.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)
    damped = moments / mean + _DAMPING * torch.eye(len(moments), device=moments.device)
    return torch.linalg.cholesky(damped.double()).float()
