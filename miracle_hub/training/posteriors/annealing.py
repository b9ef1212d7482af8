"""The weight β of the KL in the loss: a number per block, which follows the block's KL to its budget."""

import math

import torch
from torch import Tensor, nn


class Annealing(nn.Module):
    """β of every block.

    Buffers: `moves`, float32 `[blocks]`: how often β went up, less how often down. Counts are exact up to
    2^24, also where buffers are averaged; a logarithm in float32 would lose a hundredth of every published
    move.

    Source: Havasi et al. 2019 (arXiv:1810.00440), algorithm 2, lines 15 to 27.
    """

    moves: Tensor

    def __init__(self, n_blocks: int, beta: float, rate: float) -> None:
        """
        Args:
            beta: at the beginning.
            rate: a move multiplies or divides by 1 + rate.
        """
        super().__init__()
        self.first, self.rate = beta, rate
        self.register_buffer("moves", torch.zeros(n_blocks))

    def beta(self) -> Tensor:
        """β by now, `[blocks]`."""
        return self.first * (self.moves * math.log1p(self.rate)).exp()

    def move(self, is_above: Tensor) -> None:
        """Up where a block's KL is above its budget, else down."""
        self.moves.add_(torch.where(is_above, 1.0, -1.0))
