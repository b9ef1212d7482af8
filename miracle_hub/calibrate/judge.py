"""How far the answers of a file are from the dense model's, on rows that were held out."""

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from miracle_hub.calibrate.teacher import Teacher
from miracle_hub.codec.repository import open_repository

_UNITS = {
    "logits": "KL to the dense model, nats per token",
    "states": "relative squared error of states + 10 · (1 − cosine of their mean)",
}


class Judge:
    """Compares files with the dense model's answers to held-out rows.

    Attributes:
        model: to load files into.
    """

    def __init__(
        self,
        model: nn.Module,
        teacher: Teacher,
        names: Mapping[str, str] | None = None,
        base: Path | None = None,
    ) -> None:
        """
        Args:
            names: the model's, of tensors that files call otherwise.
            base: of files that have one.
        """
        self.model, self.teacher, self.names, self.base = model, teacher, names or {}, base

    @property
    def unit(self) -> str:
        """Of divergences."""
        return _UNITS[self.teacher.kept[0].kind]

    @torch.no_grad()
    def divergence(self, folder: Path) -> float:
        """Of what readers get of a compressed folder; infinite where answers are no numbers.

        The model has its weights afterwards.
        """
        own = tensors_of(self.model)
        for tensor in open_repository(folder, base=self.base).tensors:
            if (name := self.names.get(tensor.name, tensor.name)) in own:
                own[name].data.copy_(tensor.load(verify=False))
        found = self.teacher.mean_divergence(self.model)
        return found if math.isfinite(found) else math.inf


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by all of their names."""
    found: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    return found | dict(model.named_buffers(remove_duplicate=False))
