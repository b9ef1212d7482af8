"""What a model said before it was coded, for refits to hold it to: more per batch than labels tell."""

from collections.abc import Iterator, Mapping
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from miracle_hub.errors import OptionError
from miracle_hub.files.sealed import crc_of, read_sealed, write_sealed
from miracle_hub.training.convert import posterior_mean

# A batch says more of hidden states than of its few outputs, whose gradients are large and rare. MiniLM on
# SST-2 at 1 bit, after 15 of 31 groups with 30 refits each, KL of outputs in nats and error of hidden states:
# 0.078 and 0.274 at a weight of 1, 0.065 and 0.243 at 3, 0.063 and 0.223 at 10, 0.061 and 0.213 at 100.
_HIDDEN_WEIGHT = 10.0


class Teacher:
    """A dense copy of a variational transformers model as it was before coding.

    Source: Hinton et al. 2015 (arXiv:1503.02531) for outputs, Jiao et al. 2020 (arXiv:1909.10351) for hidden
    states; here the error of each state is relative to its own variance, and their mean counts tenfold.
    """

    def __init__(self, model: nn.Module, kept: Path | None = None) -> None:
        """
        Args:
            kept: where the copy is, of a run that is resumed: `model` is then not what it was.

        Raises:
            FormatError: the copy is gone, or damaged.
        """
        self.dense: Any = posterior_mean(model)
        if kept is not None:
            self.dense.load_state_dict(read_sealed(kept)[0], strict=False)  # tied ones are there once
        self.dense.eval().requires_grad_(False)

    @cached_property
    def crc(self) -> str:
        """CRC-32 of the copy: a run goes on with the same teacher only."""
        return crc_of(_tensors(self.dense), {})

    def tensors(self) -> Iterator[Tensor]:
        """All that the copy consists of, as it is in use."""
        yield from chain(self.dense.parameters(), self.dense.buffers())

    def keep(self, path: Path) -> None:
        """Write the copy, for a run that goes on after an interruption.

        Raises:
            OutputWriteError: it cannot be written.
        """
        write_sealed(path, _tensors(self.dense), {})

    def loss(self, model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
        """Difference of the outputs from the teacher's, plus ten times the relative error of hidden states.

        That of the outputs is the KL of classes in nats, or, of a regression, the squared error.

        Raises:
            OptionError: the model's outputs have no logits.
        """
        # With labels, from which a decoder has its inputs, and the config its kind of problem.
        options: Any = {**inputs, "output_hidden_states": True, "return_dict": True}
        with torch.no_grad():
            wanted = dict(self.dense(**options))
        found = dict(model(**options))
        if "logits" not in found:
            raise OptionError(
                "distill: expected a model whose outputs have logits, found "
                f"{', '.join(found) or 'none'}; pass distill=False"
            )
        masks = _masks(inputs)
        loss = self._difference(*(_logits(o["logits"], masks["hidden_states"]) for o in (found, wanted)))
        errors = [
            _relative_error(*(_real(states, mask) for states in pair))
            for name, mask in masks.items()
            for pair in zip((found.get(name) or ())[1:], (wanted.get(name) or ())[1:], strict=True)
        ]
        return loss + _HIDDEN_WEIGHT * torch.stack(errors).mean() if errors else loss

    def _difference(self, found: Tensor, wanted: Tensor) -> Tensor:
        """Between logits of classes, or of many a yes or no, or, of a regression, between numbers."""
        kind = getattr(self.dense.config, "problem_type", None)
        if kind == "regression" or wanted.shape[-1] == 1:
            return F.mse_loss(found, wanted)
        if kind == "multi_label_classification":
            # The KL of two sigmoids is their cross entropy less the entropy of the wanted one.
            yes, cross_entropy = wanted.sigmoid(), F.binary_cross_entropy_with_logits
            entropy = cross_entropy(wanted, yes, reduction="sum")
            return (cross_entropy(found, yes, reduction="sum") - entropy) / len(wanted)
        return F.kl_div(found.log_softmax(-1), wanted.softmax(-1), reduction="batchmean")


def _tensors(dense: nn.Module) -> dict[str, Tensor]:
    """Parameters, tied ones once, and buffers, on the CPU."""
    kept, named = set(dense.state_dict()), chain(dense.named_parameters(), dense.named_buffers())
    return {name: t.detach().cpu().contiguous() for name, t in named if name in kept}


def _masks(inputs: Mapping[str, Any]) -> dict[str, Tensor | None]:
    """Which tokens are no padding, by the name of the states that are theirs."""
    mask, labels = inputs.get("attention_mask"), inputs.get("labels")
    decoder = inputs.get("decoder_attention_mask", labels != -100 if labels is not None else None)
    return {"hidden_states": mask, "encoder_hidden_states": mask, "decoder_hidden_states": decoder}


def _real(states: Tensor, mask: Tensor | None) -> Tensor:
    """Rows `[n, features]`, in float32: of tokens, those that are not padding."""
    if mask is not None and states.ndim == 3 and states.shape[:2] == mask.shape:
        states = states[mask.bool()]
    return states.flatten(0, -2).float()


def _logits(logits: Tensor, mask: Tensor | None) -> Tensor:
    """Rows `[n, classes]`; of a segmentation `[images, classes, height, width]`."""
    return _real(logits.movedim(1, -1) if logits.ndim == 4 else logits, mask)


def _relative_error(found: Tensor, wanted: Tensor) -> Tensor:
    return (found - wanted).square().mean() / wanted.var().clamp(min=1e-12)  # some layers are constant
