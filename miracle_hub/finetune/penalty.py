"""A penalty on what a plain fine-tuning changes, so that the difference to its start is small in a file."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from miracle_hub.errors import OptionError

KINDS = ("ratio", "l1", "l2")


class UpdatePenalty(TrainerCallback):
    """Holds a fine-tuning to its start: `Trainer(…, callbacks=[UpdatePenalty(model)])`, of any model.

    Σ weight · C(d) over tensors is added to the loss, by its gradients after they are clipped, where d is
    what a tensor has beyond its start, and C(d)

    - "ratio": ‖d‖₁/‖d‖₂, least where few weights move, all by as much;
    - "l1": ‖d‖₁, by which small changes become none;
    - "l2": ‖d‖₂², by which changes stay small.

    `compress(…, base=…)` then stores the difference.

    Source: Lam et al. 2019 (arXiv:1905.04079) for the ratio, of Aytekin et al. 2019 (arXiv:1905.01044), on
    what a tuning changes; Li et al. 2018 (arXiv:1802.01483) for the others.
    """

    def __init__(self, model: nn.Module, kind: str = "ratio", weight: float = 1e-6) -> None:
        """
        Args:
            model: at its start; the parameters that learn are the ones that are held.
            weight: of the penalty beside the loss; gradients of MiniLM's losses are about 1e-5 per weight.

        Raises:
            OptionError: an option is none.
        """
        if kind not in KINDS or not weight > 0:
            raise OptionError(
                f"UpdatePenalty: expected a kind of {', '.join(KINDS)} and a weight above 0, found {kind!r} "
                f"and {weight!r}; correct it"
            )
        self.kind, self.weight = kind, weight
        self._held = [(p, p.detach().clone()) for p in model.parameters() if p.requires_grad]

    @torch.no_grad()
    def penalty(self) -> float:
        """Σ weight · C(d) of the model as it is."""
        return self.weight * sum(float(self._cost(_change(*held))) for held in self._held)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """See `TrainerCallback`.

        Raises:
            OptionError: gradients would be multiplied by the scale of losses in float16.
        """
        if args.fp16 and not args.max_grad_norm:
            raise OptionError(
                "UpdatePenalty: expected gradients of the loss, found those of a scaled one (fp16 without "
                "max_grad_norm); use bf16, or set max_grad_norm"
            )

    @torch.no_grad()
    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """See `TrainerCallback`."""
        for parameter, start in self._held:
            if parameter.grad is not None:
                parameter.grad.add_(self._gradient(_change(parameter, start)), alpha=self.weight)

    def _cost(self, change: Tensor) -> Tensor:
        l1, l2 = change.abs().sum(), change.norm()
        ratio = l1 / l2.clamp(min=torch.finfo(l2.dtype).tiny)
        return {"ratio": ratio, "l1": l1, "l2": l2.square()}[self.kind]

    def _gradient(self, change: Tensor) -> Tensor:
        """Of `_cost`; 0 where nothing changed."""
        if self.kind == "l2":
            return 2 * change
        length = change.norm()
        if self.kind == "l1" or not float(length):
            return change.sign()
        return change.sign() / length - change * (change.abs().sum() / length**3)


def _change(parameter: Tensor, start: Tensor) -> Tensor:
    return parameter.detach() - start.to(parameter)
