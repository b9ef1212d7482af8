"""What coding with refits is told."""

import math
from dataclasses import dataclass

from miracle_hub.checks import check_choice
from miracle_hub.errors import OptionError
from miracle_hub.training.schedule import ORDERS

_LEARNING_RATE = 3e-4  # a choice, for losses that have no fit before them; a Trainer takes its own


@dataclass(frozen=True)
class CodingOptions:
    """How coding alternates with refits.

    Attributes:
        groups: how many groups the values of all streams are coded in. They get smaller, so that what is
            left can always make up for what was coded: after g of G groups a share of (1 - g/G)² is left.
        refit_steps: steps of the optimizer after every group but the last.
        learning_rate: of the refits' Adam; it falls from group to group, to a tenth. None means 3e-4, or what
            suits a Trainer.
        order: "random", a part of every stream in every group, blocks of a block code at random; or
            "largest-kl", streams one after the other, and blocks, by their KL.

    Raises:
        OptionError: an option is none.
    """

    groups: int = 60
    refit_steps: int = 60
    learning_rate: float | None = None
    order: str = "random"

    def __post_init__(self) -> None:
        check_choice("order", self.order, ORDERS)
        are_counts = isinstance(self.groups, int) and isinstance(self.refit_steps, int)
        if not are_counts or self.groups < 1 or self.refit_steps < 0 or not 0 < self.rate() < math.inf:
            raise OptionError(
                "groups, refit_steps, learning_rate: expected at least one group, no negative number of "
                f"steps and a positive rate, found {self.groups}, {self.refit_steps} and {self.learning_rate}"
            )

    def rate(self) -> float:
        """The learning rate of the first refit."""
        return _LEARNING_RATE if self.learning_rate is None else self.learning_rate
