"""Batch norms' statistics, estimated anew: what their inputs have become since weights were coded.

Errors of weights change the mean and the variance of what a batch norm gets, channel by channel, and its
statistics do not know of it. What is matched is the dense model, not the inputs at hand: both models see the
same rows, and statistics move as those of the rows do. So inputs that are none of the training's, as noise,
say as much as others of what errors changed, and where nothing was coded nothing moves.

Source: Nagel et al. 2019 (arXiv:1906.04721), section 4.2, corrects means; Sun et al. 2019, "Hybrid 8-bit
    floating point training" (NeurIPS), estimates statistics anew under the weights that are used.
"""

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from miracle_hub.calibrate.journal import Journal
from miracle_hub.calibrate.rows import rows_of_batch, tokens_of

# Of the rows at hand; 256 images of 32 × 32 pixels, or 83 of 224 × 224, all in memory at once: a choice.
_MOST_TOKENS = 1 << 14
# A channel that hardly varies on the rows, against what is known of it, says nothing of its variance; and
# what it says of others has limits.
_LEAST_VARIANCE, _MOST_CHANGE = 1e-3, 16.0

_BUFFERS = ("running_mean", "running_var")

Moments = tuple[Float[Tensor, " channels"], Float[Tensor, " channels"]]


class Norms:
    """The batch norms of a model that have statistics, and what the dense model gives them.

    Attributes:
        named: by the names of their modules.
    """

    def __init__(self, model: nn.Module, batches: Sequence[Mapping[str, Tensor]]) -> None:
        """
        Args:
            model: dense, in evaluation mode.
            batches: keyword arguments of its forward; the first rows of one shape are used.
        """
        self.model = model
        self.named: dict[str, Any] = {n: m for n, m in model.named_modules() if _has_statistics(m)}
        self.rows = _joined(batches) if self.named else {}
        self.dense: dict[str, Moments] = {}
        self.known = {name: _statistics(norm) for name, norm in self.named.items()}
        self._run(self.dense.setdefault)

    def __len__(self) -> int:
        return len(self.named)

    def among(self, names: Collection[str]) -> "Norms":
        """Those of which both buffers are among names of tensors."""
        found = copy.copy(self)
        found.named = {
            name: norm for name, norm in self.named.items() if {f"{name}.{b}" for b in _BUFFERS} <= set(names)
        }
        return found

    @property
    def buffers(self) -> dict[str, Tensor]:
        """Means and variances, by their names in the state dict."""
        return {
            f"{name}.{which}": getattr(norm, which) for name, norm in self.named.items() for which in _BUFFERS
        }

    def estimate(self) -> None:
        """Set the statistics to what the model's weights, as they are now, make of the rows: layer after
        layer, so that each sees what those before it now give. A norm's first use counts.
        """
        left = self.named.keys() & self.dense.keys()

        def look(name: str, moments: Moments) -> None:
            if name in left:
                left.remove(name)
                self._set(name, moments)

        self._run(look)

    def estimate_or_undo(self, journal: Journal) -> None:
        """The same; what does not help on held-out rows is undone."""
        statistics = list(self.buffers.values())
        before = [values.clone() for values in statistics]

        def undo() -> None:
            for own, values in zip(statistics, before, strict=True):
                own.copy_(values)

        self.estimate()
        journal.report_or_undo("statistics of batch norms estimated", undo)

    @torch.no_grad()
    def _run(self, look: Callable[[str, Moments], object]) -> None:
        """Run the rows; `look` sees the moments of a norm's inputs before the norm does."""

        def hook(name: str) -> Callable[[nn.Module, tuple], None]:
            def see(norm: nn.Module, given: tuple) -> None:
                look(name, _moments(given[0]))

            return see

        handles = [norm.register_forward_pre_hook(hook(name)) for name, norm in self.named.items()]
        try:
            if handles:
                device = next(self.model.parameters()).device
                self.model(**{name: values.to(device) for name, values in self.rows.items()})
        finally:
            for handle in handles:
                handle.remove()

    def _set(self, name: str, moments: Moments) -> None:
        norm, (mean, variance), (dense_mean, dense_variance) = self.named[name], moments, self.dense[name]
        known_mean, known_variance = self.known[name]
        varies = (dense_variance > _LEAST_VARIANCE * known_variance) & (variance > 0)
        change = torch.where(varies, variance / dense_variance.clamp(min=1e-30), 1.0)
        change = change.clamp(1 / _MOST_CHANGE, _MOST_CHANGE)
        norm.running_mean.copy_(mean + (known_mean - dense_mean) * change.sqrt())
        norm.running_var.copy_((known_variance * change - norm.eps).clamp(min=0))


def _has_statistics(module: nn.Module) -> bool:
    return isinstance(module, _BatchNorm) and module.running_mean is not None and not module.training


def _statistics(norm: Any) -> Moments:
    """As the dense model has them; of variances what is divided by."""
    return norm.running_mean.clone(), norm.running_var + norm.eps


def _moments(x: Tensor) -> Moments:
    rows = x.transpose(0, 1).flatten(1).float()
    return rows.mean(1), rows.var(1, correction=0)


def _joined(batches: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    shapes = {name: values.shape[1:] for name, values in batches[0].items()}
    rows: list[dict[str, Tensor]] = []
    for batch in batches:
        if {name: values.shape[1:] for name, values in batch.items()} == shapes:
            rows += rows_of_batch(dict(batch))
    n = max(1, _MOST_TOKENS // tokens_of(rows[0]))
    return {name: torch.stack([row[name] for row in rows[:n]]) for name in shapes}
