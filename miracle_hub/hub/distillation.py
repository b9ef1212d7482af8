"""What a model said before it was coded, for refits to hold it to: more per batch than labels tell."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from miracle_hub.codec.folder import output_folder
from miracle_hub.errors import OptionError
from miracle_hub.training.convert import posterior_mean


class Teacher:
    """A dense copy of a variational transformers model as it was before coding.

    Source: Hinton et al. 2015 (arXiv:1503.02531) for outputs, Jiao et al. 2020 (arXiv:1909.10351) for hidden
    states; here these have equal weights, the error of each relative to its own variance.
    """

    def __init__(self, model: nn.Module, folder: Path | None = None, is_resumed: bool = False) -> None:
        """
        Args:
            folder: where the copy is kept for a coding run that is resumed.
            is_resumed: it is there, and `model` is not what it was.

        Raises:
            OutputWriteError: the copy cannot be written. OSError: it is no longer there.
        """
        self.dense: Any = posterior_mean(model)
        if folder is not None and is_resumed:
            self.dense = type(self.dense).from_pretrained(folder).to(next(model.parameters()).device)
        elif folder is not None:
            with output_folder(folder, overwrite=True) as temporary:
                self.dense.save_pretrained(temporary)
        self.dense.eval().requires_grad_(False)

    def loss(self, model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
        """KL of the outputs from the teacher's, in nats, plus the relative squared error of hidden states.

        Raises:
            OptionError: the model's outputs have no logits.
        """
        with torch.no_grad():
            wanted = self.dense(**inputs, output_hidden_states=True)
        found = model(**inputs, output_hidden_states=True)
        if getattr(found, "logits", None) is None:
            raise OptionError(
                f"distill: expected a model whose outputs have logits, found {type(found).__name__} of "
                f"{', '.join(found)}; pass distill=False"
            )
        mask = inputs.get("attention_mask")
        states = zip((found.hidden_states or ())[1:], (wanted.hidden_states or ())[1:], strict=True)
        errors = [_relative_error(_real(x, mask), _real(y, mask)) for x, y in states]
        loss = _difference(_real(found.logits, mask), _real(wanted.logits, mask))
        return loss + torch.stack(errors).mean() if errors else loss


def _real(states: Tensor, mask: Tensor | None) -> Tensor:
    """Rows `[n, features]`, in float32: of tokens, those that are not padding."""
    if mask is not None and states.ndim == 3 and states.shape[:2] == mask.shape:
        states = states[mask.bool()]
    return states.flatten(0, -2).float()


def _relative_error(found: Tensor, wanted: Tensor) -> Tensor:
    return (found - wanted).square().mean() / wanted.var()


def _difference(found: Tensor, wanted: Tensor) -> Tensor:
    """Between logits of classes, or, of a regression, between numbers."""
    if wanted.shape[-1] == 1:
        return F.mse_loss(found, wanted)
    return F.kl_div(found.log_softmax(-1), wanted.softmax(-1), reduction="batchmean")
