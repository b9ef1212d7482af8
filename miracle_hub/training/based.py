"""The base of a variational model: what its priors have as means."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor, nn


@dataclass(frozen=True)
class TrainingBase:
    """A model elsewhere, of which a repository states where it is, and holds the differences to it.

    Attributes:
        folder: of its files.
        unchanged: names of tensors of the model that are the base's, bit for bit, and are to stay so.
        tensors: those of the base by the names that the model has for them, on the CPU.
    """

    folder: Path
    unchanged: frozenset[str]
    tensors: Mapping[str, Tensor] = field(default_factory=dict)

    def freeze(self, model: nn.Module) -> None:
        """Let training leave alone what nothing is to be stored of."""
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if name in self.unchanged:
                parameter.requires_grad_(False)
