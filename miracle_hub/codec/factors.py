"""The factors of a low-rank product, changed so that coding them costs the product least.

B·A stays the same when B becomes B·R and A becomes R⁻¹·A, for any invertible R: LoRA (Hu et al. 2021,
arXiv:2106.09685, section 4.1) trains one such pair, and the best to code is another. Noise in all entries of
both, of a share of their mean squares, adds ‖B‖²·‖A‖² times that share, over the rank, to the square of the
product. This is least, (Σ s)² of the singular values s of the product, where both factors have the square
roots of these: B = U·√S·Q and A = Qᵀ·√S·Vᵀ with any orthogonal Q. That one is taken by which all columns of
B, and all rows of A, have the same square, so that one prior suits them all.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]  # B and A


def are_factors(b_shape: Sequence[int], a_shape: Sequence[int]) -> bool:
    """Whether B `[out, rank, 1…]` and A `[rank, in, …]` have a product that only their product decides."""
    return len(b_shape) == len(a_shape) > 1 and b_shape[1] == a_shape[0] and set(b_shape[2:]) <= {1}


def balanced(b: Tensor, a: Tensor) -> Pair:
    """Another B `[out, rank, 1…]` and A `[rank, in, …]` of the same product, in their own dtypes and shapes.

    The product is kept to the rounding of these dtypes; see above for what is better in it.
    """
    rank = a.shape[0]
    left, left_core = torch.linalg.qr(b.double().flatten(1))
    right, right_core = torch.linalg.qr(a.double().flatten(1).T)
    u, singular, vh = torch.linalg.svd(left_core @ right_core.T, full_matrices=False)
    n_values = len(singular)
    roots = torch.zeros(n_values, rank, dtype=torch.float64)
    roots[:, :n_values] = singular.sqrt().diag()
    turn = _levelling(roots.T @ roots)
    b_new, a_new = left @ u @ roots @ turn, (right @ vh.T @ roots @ turn).T
    return b_new.view_as(b).to(b.dtype), a_new.reshape_as(a).to(a.dtype)


def _levelling(gram: Tensor) -> Tensor:
    """The orthogonal Q `[rank, rank]` for which all of the diagonal of QᵀGQ is the same (Schur and Horn).

    One rotation after the other makes an entry of the diagonal the mean, in the plane of the largest and the
    smallest.
    """
    rank = len(gram)
    turn, mean = torch.eye(rank, dtype=gram.dtype), float(gram.diagonal().mean())
    for _ in range(rank - 1):
        turned = turn.T @ gram @ turn
        high, low = int(turned.diagonal().argmax()), int(turned.diagonal().argmin())
        above, below = float(turned[high, high]) - mean, mean - float(turned[low, low])
        if above <= 1e-12 * mean or below <= 1e-12 * mean:
            break
        across = float(turned[high, low])
        # cos²·high + 2·cos·sin·across + sin²·low = mean, divided by cos²
        tangent = (across + (across**2 + above * below) ** 0.5) / below
        cosine = (1 + tangent**2) ** -0.5
        rotation = torch.tensor([[1.0, -tangent], [tangent, 1.0]], dtype=gram.dtype) * cosine
        turn[:, [high, low]] = turn[:, [high, low]] @ rotation
    return turn


def squared(b: Tensor, a: Tensor) -> float:
    """‖B·A‖², without the product."""
    b, a = b.double().flatten(1), a.double().flatten(1)
    return float(((b.T @ b) * (a @ a.T)).sum())


def squared_distance(one: Pair, other: Pair) -> float:
    """‖B·A - B'·A'‖², without the products."""
    (b, a), (b_other, a_other) = one, other
    columns = torch.cat((b.double().flatten(1), -b_other.double().flatten(1)), 1)
    return squared(columns, torch.cat((a.double().flatten(1), a_other.double().flatten(1))))
