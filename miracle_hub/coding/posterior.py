"""What the sender knows (posterior), what both sides know (prior), and the cost that follows.

Standardize by the prior: m = (mean_q - mean_p) / scale and v = (std_q / scale)². Then, up to a
constant per weight, the log importance weight of a standard normal candidate z is

    log q/p = ½ (1 - 1/v) z² + (m/v) z          (nats)

and encoders minimize  cost(z) = quadratic · z² - linear · z = -2 log q/p.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float32
from torch import Tensor

from miracle_hub.errors import OptionError


@dataclass(frozen=True)
class Posterior:
    """A Gaussian per weight: where a good weight lies and how far it may move.

    Attributes:
        mean: `[n]`, in the unit of the weights.
        variance: `[n]`, positive.
    """

    mean: Float[Tensor, " n"]
    variance: Float[Tensor, " n"]


@dataclass(frozen=True)
class Prior:
    """N(mean, scale²) per weight, known to sender and receiver; both broadcast to `[n]`."""

    mean: Float[Tensor, "*#shape"]
    scale: Float[Tensor, "*#shape"]


def standard_prior() -> Prior:
    """N(0, 1) for every value, float32: of posteriors that are given in units of their prior."""
    return Prior(torch.zeros(1), torch.ones(1))


@dataclass(frozen=True)
class Cost:
    """`quadratic · z² - linear · z` per weight of a stream, in stream order."""

    quadratic: Float32[Tensor, " n"]
    linear: Float32[Tensor, " n"]

    def to(self, device: torch.device) -> "Cost":
        """The same on another device."""
        return Cost(self.quadratic.to(device), self.linear.to(device))

    def log_importance_weights(self, z: Float32[Tensor, "*n_draws n"]) -> Float32[Tensor, "*n_draws"]:
        """log q/p of whole streams of candidates, in nats, up to a constant of the stream."""
        return -0.5 * (z * (self.quadratic * z - self.linear)).sum(-1)


def importance_cost(posterior: Posterior, prior: Prior) -> Cost:
    """The cost whose exp(-cost/2) is the importance weight q/p.

    Raises:
        OptionError: a variance or a scale is not positive.

    Source: Havasi et al. 2019 (arXiv:1810.00440), algorithm 1; the public code lacks the factor ½.
    """
    for name, values in (("variance", posterior.variance), ("prior scale", prior.scale)):
        if not bool((values > 0).all()):
            raise OptionError(
                f"{name}: expected positive values, found {float(values.min())}; "
                "use squared_error_cost for a posterior without spread"
            )
    mean, variance = _standardized(posterior, prior)
    return Cost(1 / variance - 1, 2 * mean / variance)


def squared_error_cost(standardized: Float32[Tensor, " n"]) -> Cost:
    """The limit of small equal variances: cost(z) = (z - m)² up to a constant, m = weight / scale."""
    return Cost(torch.ones(1).expand(standardized.numel()), 2 * standardized)


def kl_nats(posterior: Posterior, prior: Prior) -> Float[Tensor, " n"]:
    """KL(q‖p) of every weight, in nats: (m² + v - 1 - log v) / 2."""
    mean, variance = _standardized(posterior, prior)
    return (mean**2 + variance - 1 - variance.log()) / 2


def log_importance_weight(posterior: Posterior, prior: Prior, z: Float[Tensor, " n"]) -> float:
    """log q/p of one candidate of a stream, in nats, constants included: z is in units of the prior."""
    mean, variance = _standardized(posterior, prior)
    return float(0.5 * (z.square() - (z - mean).square() / variance - variance.log()).sum())


def _standardized(posterior: Posterior, prior: Prior) -> tuple[Tensor, Tensor]:
    """Mean and variance in units of the prior."""
    return (posterior.mean - prior.mean) / prior.scale, posterior.variance / prior.scale**2
