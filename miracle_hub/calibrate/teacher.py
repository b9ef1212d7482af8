"""What the dense model answers to all inputs, in little memory, and how far another's answers are from it."""

import copy
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from miracle_hub.calibrate.outputs import answers, divergence, parts
from miracle_hub.calibrate.precision import fast_if_large
from miracle_hub.calibrate.rows import rows_of_batch, tokens_of

Batch = Mapping[str, Tensor]
# Logits that are kept of a token; all others count as one: a choice.
_KEPT = 128


@dataclass(frozen=True)
class _Answer:
    """Of one batch: states, or log probabilities of some classes, and of all others together."""

    kind: str
    values: Tensor
    classes: Tensor | None = None

    def divergence(self, found: Tensor) -> Tensor:
        values = self.values.to(found.device)
        if self.classes is None:
            return divergence(self.kind, found, values.float())
        return _FewClasses.apply(found, values, self.classes.to(found.device))


class Teacher:
    """The dense model's answers to batches, by their numbers."""

    def __init__(
        self, model: nn.Module, batches: Sequence[Batch], progress: bool = False, *, judges: bool = True
    ) -> None:
        """
        Args:
            judges: rather than that something is fitted to the answers, which large models then give faster.
        """
        self.batches, self.kept = batches, list[_Answer]()
        for batch in tqdm(batches, desc="dense answers", disable=not progress):
            with torch.no_grad(), nullcontext() if judges else fast_if_large(model):
                kind, found = answers(model, batch)
            self.kept.append(_kept(kind, found))

    def __len__(self) -> int:
        return len(self.batches)

    def some(self, n_tokens: int) -> "Teacher":
        """Of about so many tokens, from everywhere; nothing is asked again."""
        found, chosen = copy.copy(self), spread(self.batches, n_tokens)
        found.batches, found.kept = self.batches[chosen], self.kept[chosen]
        return found

    def divergence(self, model: nn.Module, number: int) -> Tensor:
        """Of a model's answers to one batch, a mean over its tokens."""
        _, found = answers(model, self.batches[number])
        return self.kept[number].divergence(found)

    @torch.no_grad()
    def mean_divergence(self, model: nn.Module) -> float:
        """Over all tokens of all batches."""
        sizes = [answer.values[..., 0].numel() for answer in self.kept]
        total = sum(float(self.divergence(model, i)) * n for i, n in enumerate(sizes))
        return total / sum(sizes)


def _kept(kind: str, found: Tensor) -> _Answer:
    if kind != "logits" or found.shape[-1] <= 4 * _KEPT:
        return _Answer(kind, found.cpu())
    logits, shape = found.flatten(0, -2), (*found.shape[:-1], _KEPT)
    tops = [logits[some].float().log_softmax(-1).topk(_KEPT) for some in parts(logits)]
    log_p = torch.cat([top.values.half() for top in tops]).view(shape)
    classes = torch.cat([top.indices.int() for top in tops]).view(shape)
    return _Answer(kind, log_p.cpu(), classes.cpu())


class _FewClasses(torch.autograd.Function):
    """The mean of `_kl` over tokens, some at a time, with its gradient found on the way: the copies that a
    formula makes are of few tokens.
    """

    @staticmethod
    def forward(ctx: Any, found: Tensor, values: Tensor, classes: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """
        Args:
            found: logits `[..., n]`.
            values: log probabilities of some classes, `[..., k]`.
            classes: their numbers.
        """
        gradient = found.new_empty(found.shape) if ctx.needs_input_grad[0] else None
        logits, values, classes = (x.flatten(0, -2) for x in (found, values, classes))
        total = 0.0
        for some in parts(logits):
            with torch.set_grad_enabled(gradient is not None):
                own = logits[some].detach().float().requires_grad_(gradient is not None)
                log_q = own.log_softmax(-1).gather(-1, classes[some].long())
                kl = _kl(values[some].float(), log_q).sum() / len(logits)
            if gradient is not None:
                gradient.view_as(logits)[some] = torch.autograd.grad(kl, own)[0]
            total += kl.detach()
        ctx.save_for_backward(gradient)
        return torch.as_tensor(total)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The gradient of the logits."""
        (found,) = ctx.saved_tensors
        return found * gradient, None, None


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL over some classes, and over all others as one."""
    own = (log_p.exp() * (log_p - log_q)).sum(-1)
    rest_p, rest_q = _rest(log_p), _rest(log_q)
    return own + rest_p * (rest_p.log() - rest_q.log())


def _rest(log_p: Tensor) -> Tensor:
    return (1 - log_p.exp().sum(-1)).clamp(min=1e-6)


def spread(batches: Sequence[Batch], n_tokens: int) -> slice:
    """Which batches, from everywhere among them, have about so many tokens; one at least."""
    tokens = sum(sum(map(tokens_of, rows_of_batch(dict(batch)))) for batch in batches)
    return slice(None, None, max(1, round(tokens / n_tokens)))
