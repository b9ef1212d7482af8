"""What a stream asks of its posterior, and what a posterior starts from."""

from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

from torch import Tensor

from miracle_hub.training.blocks import StreamBudget
from miracle_hub.training.layout import Layout


@dataclass(frozen=True)
class Start:
    """What a posterior is made of.

    Attributes:
        values: float32 `[n]` in stream order, the weights to start from.
        scales: `[scales]`, of the prior at the start.
        layout: which value has which scale.
        budget: the KL that the message pays for.
        beta: the first weight of the KL in the loss, where it is annealed.
        beta_rate: its relative change per step.
    """

    values: Tensor
    scales: Tensor
    layout: Layout
    budget: StreamBudget
    beta: float
    beta_rate: float


class Posterior(Protocol):
    """Gaussians of a stream's values, and the scales of the prior that they are coded under.

    A torch module too, whose parameters are what is fitted. Everything is in stream order.

    Attributes:
        has_noise: whether training draws weights, instead of using one value of each.
        has_penalty: whether `penalty` is something.
        budget: the KL that the message pays for.
    """

    has_noise: ClassVar[bool]
    has_penalty: ClassVar[bool]
    budget: StreamBudget

    def scales(self) -> Tensor:
        """The prior's, `[scales]`: as they are by now, or as they were fixed."""
        ...

    def value_scales(self) -> Tensor:
        """The prior's scale of every value, `[n]`, or `[1]` for all of them."""
        ...

    def fix_scales(self) -> None:
        """Round the scales as files hold them, and keep them: what is coded depends on them."""
        ...

    def draw(self, seed: Tensor, stream_id: int) -> Tensor:
        """Values `[n]` for a step of training, in units of the weights, with gradients.

        Args:
            seed: int64 `[]` on the CPU, of the noise.
            stream_id: of the noise too.
        """
        ...

    def sample(self, seed: Tensor, stream_id: int) -> Tensor:
        """Values `[n]` drawn from what would be coded now, in units of the weights, without gradients."""
        ...

    def mean(self) -> Tensor:
        """Values `[n]` to evaluate at, in units of the weights, without gradients."""
        ...

    def set_mean(self, values: Tensor, are_set: Tensor) -> str | None:
        """Have the mean at given values, where they are set, and elsewhere where it is.

        Args:
            values: `[n]`, in units of the weights.
            are_set: bool `[n]`.

        Returns:
            what was expected, what was found and what to do, if the posterior cannot; it is as before then.
        """
        ...

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean and variance `[n]` of what would be coded now, in units of the prior, without gradients."""
        ...

    def kl_nats(self) -> Tensor:
        """KL of every block, `[blocks]`, with gradients where it is not fixed."""
        ...

    def penalty(self) -> Tensor | None:
        """What every block adds to the loss, `[blocks]`, in nats; None for nothing."""
        ...

    def after_step(self) -> None:
        """Called after every step of the optimizer."""
        ...


@runtime_checkable
class Weighted(Protocol):
    """A posterior that has less noise where errors cost more.

    Attributes:
        curvature: what an error costs, of the columns of the weights as a matrix, relative to their mean;
            `[1]` if it is the same for all of them.
    """

    curvature: Tensor
