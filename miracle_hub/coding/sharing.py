"""Weights that share values: the hashing trick as a seeded hash with signs, and plain tiling.

FORMAT.md, "Network", says which weight takes which value. With the hash every value has its fair share of
weights, and every tensor is hashed differently.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float32, Int64
from numba import njit
from torch import Tensor
from torch.library import custom_op

from miracle_hub.checks import check_choice
from miracle_hub.code import Code
from miracle_hub.coding.order import permutation
from miracle_hub.coding.philox import philox4x32
from miracle_hub.errors import OptionError

# Position in this tuple is the number in the file: append only.
KINDS = ("none", "hash", "tile")


@dataclass(frozen=True)
class Sharing:
    """How many values stand for a tensor's weights, and which for which.

    Raises:
        OptionError: an unknown kind, or a number of values that cannot be.
    """

    kind: str
    n_values: int
    n_weights: int

    def __post_init__(self) -> None:
        check_choice("sharing", self.kind, KINDS)
        least = self.n_weights if self.kind == "none" else 1
        if not least <= self.n_values <= self.n_weights:
            raise OptionError(
                f"sharing: expected {least} to {self.n_weights} values for {self.n_weights} weights, found "
                f"{self.n_values}; share less or more"
            )

    def places(self, seed: int, number: int) -> tuple[Int64[Tensor, " n"], Float32[Tensor, " n"]]:
        """For every weight, the value it takes and the sign it takes it with.

        Args:
            seed: of the code.
            number: of the tensor in its network.

        Source: Chen et al. 2015 (arXiv:1504.04788), section 4; deviation: a permutation instead of
        independent draws, which would leave values without a weight.
        """
        weights = torch.arange(self.n_weights)
        if self.kind != "hash":
            return weights % self.n_values, torch.ones(self.n_weights)
        shuffled = permutation(self.n_weights, Code(1, 1, 1, seed, number))
        signs = 1.0 - 2.0 * (philox4x32((weights, 0, number, 1), seed)[2] & 1).float()
        return shuffled % self.n_values, signs


@custom_op("miracle_hub::expand", mutates_args=())
def expand(values: Tensor, places: Tensor, signs: Tensor) -> Tensor:
    """Weights from shared values: signs · values[places], float32 `[n]`. The gradient reaches values.

    torch's own indexing takes three times as long on a CPU, most of it in the backward pass.
    """
    if values.is_cuda:
        return values.index_select(0, places) * signs
    out = torch.empty_like(signs)
    _gather(values.numpy(), places.numpy(), signs.numpy(), out.numpy())
    return out


@custom_op("miracle_hub::expand_backward", mutates_args=())
def expand_backward(grad: Tensor, places: Tensor, signs: Tensor, n_values: int) -> Tensor:
    """The gradient of the values: sums over all weights that take them."""
    if grad.is_cuda:
        return grad.new_zeros(n_values).index_add_(0, places, grad * signs)
    out = torch.zeros(n_values)
    _scatter(grad.contiguous().numpy(), places.numpy(), signs.numpy(), out.numpy())
    return out


@njit(nogil=True, cache=True)
def _gather(values: np.ndarray, places: np.ndarray, signs: np.ndarray, out: np.ndarray) -> None:
    for i in range(out.shape[0]):
        out[i] = values[places[i]] * signs[i]


@njit(nogil=True, cache=True)
def _scatter(grad: np.ndarray, places: np.ndarray, signs: np.ndarray, out: np.ndarray) -> None:
    for i in range(grad.shape[0]):
        out[places[i]] += grad[i] * signs[i]


@expand.register_fake
def _(values: Tensor, places: Tensor, signs: Tensor) -> Tensor:
    return torch.empty_like(signs)


@expand_backward.register_fake
def _(grad: Tensor, places: Tensor, signs: Tensor, n_values: int) -> Tensor:
    return grad.new_empty(n_values)


def _save(ctx, inputs, output) -> None:
    values, places, signs = inputs
    ctx.save_for_backward(places, signs)
    ctx.n_values = values.numel()


def _back(ctx, grad: Tensor):
    return expand_backward(grad, *ctx.saved_tensors, ctx.n_values), None, None


expand.register_autograd(_back, setup_context=_save)
