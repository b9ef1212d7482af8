"""How far the answers of a file are from the dense model's, on rows that were held out."""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from miracle_hub.calibrate.teacher import Batch, Teacher, spread
from miracle_hub.codec.repository import open_repository

# Whoever gives more rows has no better figure for it: of SmolLM2's tokens so many took half a minute.
_MOST_TOKENS = 8192
_UNITS = {
    "logits": "KL to the dense model, nats per token",
    "states": "relative squared error of states + 10 · (1 − cosine of their mean)",
}


class Judge:
    """Keeps the dense model's answers to held-out rows.

    Attributes:
        model: to load files into; dense when the judge is made.
    """

    def __init__(self, model: nn.Module, held_out: Sequence[Batch]) -> None:
        self.model, self.teacher = model, Teacher(model, spread(held_out, _MOST_TOKENS))

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
        for tensor in open_repository(folder).tensors:
            if tensor.name in own:
                own[tensor.name].data.copy_(tensor.load(verify=False))
        found = self.teacher.mean_divergence(self.model)
        return found if math.isfinite(found) else math.inf


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by all of their names."""
    found: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    return found | dict(model.named_buffers(remove_duplicate=False))
