"""The kinds of posteriors by the names that options have for them."""

from collections.abc import Callable

from miracle_hub.training.posteriors.mean_kl import MeanKL
from miracle_hub.training.posteriors.mean_var import MeanVar
from miracle_hub.training.posteriors.protocol import Posterior, Start
from miracle_hub.training.posteriors.test_channel import TestChannel

POSTERIORS: dict[str, Callable[[Start], Posterior]] = {
    "mean-kl": MeanKL,
    "mean-var": MeanVar,
    "test-channel": TestChannel,
}
