"""What an error of a weight costs the model, as somebody measured it: a Kronecker product."""

import hashlib
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from miracle_hub.coding.backend import Backend, rotated_matrix
from miracle_hub.coding.matrix import matrix_columns
from miracle_hub.coding.rotation import widest_rotation


@dataclass(frozen=True)
class Curvature:
    """An error E of a matrix W costs ½ Σ_i rows_i · E_i · columns · E_iᵀ nats per token, to second order.

    Attributes:
        columns: second moments of the inputs, weighted by the gradients of the outputs, float32
            `[columns, columns]`; None where they are not known, which means the unit matrix.
        rows: squared gradients of the outputs, float32 `[rows]` or `[1]`.
        damping: of the mean of the moments' diagonal, added to it: how little the moments are trusted.

    Source: Martens and Grosse 2015 (arXiv:1503.05671); Tseng et al. 2025 (YAQA, arXiv:2505.22988), section 3;
        here one pass, with inputs weighted by the gradients of their own token.
    """

    rows: Float[Tensor, " rows"]
    columns: Float[Tensor, "columns columns"] | None = None
    damping: float = 0.1

    @property
    def digest(self) -> str:
        """SHA-256 of both, in hexadecimal: of jobs whose results depend on them."""
        found = hashlib.sha256(str(self.damping).encode())
        for part in (self.rows, self.columns):
            found.update(b"-" if part is None else part.contiguous().numpy().tobytes())
        return found.hexdigest()

    def factor(self, rotation: int, backend: Backend) -> Float[Tensor, "columns columns"] | None:
        """U, upper triangular, with U·Uᵀ the damped moments of rotated columns; float64."""
        if self.columns is None:
            return None
        moments = rotated_matrix(self.columns, len(self.columns), rotation, backend)
        moments = rotated_matrix(moments.T.contiguous(), len(self.columns), rotation, backend).double()
        mean = moments.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)
        moments.diagonal().add_(self.damping * mean)
        return torch.linalg.cholesky(moments.flip(0, 1)).flip(0, 1)

    def cost(self, weights: Tensor, rotation: int, backend: Backend) -> Float[Tensor, " rows"]:
        """Nats per token that every row of a matrix costs if its relative squared error is 1.

        With feedback the errors of the columns are those of U's diagonal, not of the moments' own.
        """
        columns = matrix_columns(tuple(weights.shape))
        power = weights.float().reshape(-1, columns).square().mean(1)
        factor = self.factor(widest_rotation(columns, rotation), backend)
        trace = columns if factor is None else float(factor.diagonal().square().sum())
        return 0.5 * self.rows * power * trace
