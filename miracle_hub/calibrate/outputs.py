"""What a model answers, how far another's answers are from it, and what an error of answers costs."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from miracle_hub.errors import CalibrationError

_NAMES = ("logits", "logits_per_image", "last_hidden_state")
# Of 1 - cosine of the mean state beside the relative error of every state. MiniLM's probes had it.
_COSINE_WEIGHT = 10.0
# Floats that are worked on at a time: the answers of a language model to one batch are as large as a third of
# the model, and every step of a formula makes a copy.
_PART = 1 << 22
# Of the largest answer. Sums on a GPU may differ by roundings; noise that matters is larger.
_REPEATABLE = 1e-3


def device_of(model: nn.Module) -> torch.device:
    """Where a model's weights are; the CPU for one without any."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def answers(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[str, Tensor]:
    """What a model answers to a batch, and what that is: "logits" or "states", `[..., d]`.

    Raises:
        CalibrationError: it is no tensor.
    """
    device = device_of(model)
    found: Any = model(**{name: values.to(device) for name, values in batch.items()})
    for name in _NAMES:
        value = getattr(found, name, None)
        if isinstance(value, Tensor):
            if name == "logits" and value.dim() == 4:  # of every pixel, [n, classes, height, width]
                value = value.movedim(1, -1)
            return (
                "states" if name == "last_hidden_state" or _are_numbers(model, value) else "logits"
            ), value
    if isinstance(found, Tensor) and found.is_floating_point():
        return ("logits" if found.dim() == 2 and found.shape[-1] > 1 else "states"), found
    what = str(found.dtype) if isinstance(found, Tensor) else type(found).__name__
    raise CalibrationError(
        f"{type(model).__name__}: expected logits, states or a tensor of real numbers as its answer, found "
        f"{what}; compress without calibration (--calibrate none)"
    )


def _are_numbers(model: nn.Module, logits: Tensor) -> bool:
    """Whether what is called logits is no choice among classes."""
    problem = getattr(getattr(model, "config", None), "problem_type", None)
    return logits.shape[-1] == 1 or problem == "regression"


def parts(values: Tensor) -> Iterator[slice]:
    """Some rows of a matrix at a time, as many as have few numbers together."""
    step = max(1, _PART // max(1, values.shape[-1]))
    return (slice(start, start + step) for start in range(0, len(values), step))


@torch.no_grad()
def require_repeatable(model: nn.Module, batch: Mapping[str, Tensor]) -> None:
    """
    Raises:
        CalibrationError: the same inputs have other answers when they are given again.
    """
    row = {name: values[:1] for name, values in batch.items()}
    (kind, first), (_, second) = answers(model, row), answers(model, row)
    if not torch.allclose(first, second, rtol=_REPEATABLE, atol=_REPEATABLE * float(first.abs().max())):
        raise CalibrationError(
            f"{type(model).__name__}: expected the same answers ({kind}) to the same inputs, found others "
            "the second time; give a model without noise of its own, or compress without calibration "
            "(--calibrate none)"
        )


def divergence(kind: str, found: Tensor, dense: Tensor) -> Tensor:
    """How far answers are from the dense model's, a mean over tokens: KL in nats, or of states the relative
    squared error and ten times 1 - cosine of their means.
    """
    if kind == "logits":
        log_p, log_q = dense.float().log_softmax(-1), found.float().log_softmax(-1)
        return (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    found = found.float()
    error = (found - dense).square().sum(-1) / dense.square().sum(-1).clamp(min=1e-12)
    cosine = nn.functional.cosine_similarity(_pooled(found), _pooled(dense), dim=-1)
    return error.mean() + _COSINE_WEIGHT * (1 - cosine).mean()


def sampled_gradient(kind: str, found: Tensor, generator: torch.Generator) -> Tensor:
    """A gradient of answers whose mean square is twice the second-order term of the sum of `divergence`.

    Args:
        generator: on the device of the answers.

    Of logits √p·s - p·Σ√p·s with random signs s, of states normal noise over their length; no labels are
    needed.

    Source: Martens 2020 (arXiv:1412.1193), section 9.2: the Fisher matrix, diag(p) - p·pᵀ, by samples of the
        model, p - one_hot(y). Deviation: these have the same second moments and lighter tails: feedback by as
        many tokens leaves 1 % less error.
    """
    if kind == "logits":
        logits, gradient = found.flatten(0, -2), found.new_empty(found.shape)
        for some in parts(logits):
            gradient.view_as(logits)[some] = _signed(logits[some].float().softmax(-1), generator)
        return gradient
    gradient = _noise(found, generator) * 2**0.5
    if found.dim() > 2:
        pooled, n_tokens = _pooled(found), found[0, ..., 0].numel()
        share = _noise(pooled, generator) * (_COSINE_WEIGHT / n_tokens) ** 0.5
        gradient = gradient + share.view(len(found), *[1] * (found.dim() - 2), -1)
    return gradient


def _signed(p: Tensor, generator: torch.Generator) -> Tensor:
    signs = torch.randint(0, 2, p.shape, generator=generator, device=p.device, dtype=torch.int8)
    drawn = p.sqrt() * (2 * signs - 1)
    return drawn - p * drawn.sum(-1, keepdim=True)


def _noise(values: Tensor, generator: torch.Generator) -> Tensor:
    length = values.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    return torch.randn(values.shape, generator=generator, device=values.device) / length


def _pooled(states: Tensor) -> Tensor:
    """The mean over all but the first and the last dimension."""
    return states.flatten(1, -2).mean(1) if states.dim() > 2 else states
