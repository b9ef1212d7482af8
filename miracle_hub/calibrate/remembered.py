"""What batch norms remember of their inputs, and the filter of images that comes nearest to it."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

# Choices; on ResNet-44 (benchmarks/self_inputs.py) more of them gain little.
_STEPS, _RATE = 40, 0.03
_BANDS = 6  # of frequencies, in octaves
_LEAST_VARIANCE = 1e-4  # relative, below which channels do not count as different


class Filter(nn.Module):
    """Colors mixed by a matrix in every band of frequencies, and shifted. It begins as no change at all.

    Args:
        low, high: what black and white are, per channel, beyond which no pixel goes.
    """

    low: Tensor
    high: Tensor

    def __init__(self, low: Float[Tensor, "c 1 1"], high: Float[Tensor, "c 1 1"]) -> None:
        super().__init__()
        channels = len(low)
        self.register_buffer("low", low)
        self.register_buffer("high", high)
        self.mix = nn.Parameter(torch.eye(channels).repeat(_BANDS, 1, 1))
        self.shift = nn.Parameter(torch.zeros(channels, 1, 1))

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        """Filtered images of the same size."""
        size = (x.shape[-2], x.shape[-1])
        kernel = torch.einsum("bij,bhw->ijhw", self.mix, _bands(*size).to(x)).to(torch.complex64)
        found = torch.einsum("ijhw,njhw->nihw", kernel, torch.fft.rfft2(x))
        return torch.minimum(torch.maximum(torch.fft.irfft2(found, s=size) + self.shift, self.low), self.high)


def _bands(height: int, width: int) -> Float[Tensor, "bands h w"]:
    """Weights of bands by frequency; they add up to 1."""
    frequency = torch.hypot(
        torch.fft.fftfreq(height)[:, None] * height, torch.fft.rfftfreq(width) * width
    ).clamp(1, height / 2)
    step = torch.tensor(height / 2).log() / (_BANDS - 1)
    return (1 - (frequency.log() / step - torch.arange(_BANDS)[:, None, None]).abs()).clamp(min=0)


def remembers(model: nn.Module) -> bool:
    """Whether a model has batch norms with statistics."""
    return bool(_norms(model))


def _norms(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if isinstance(m, nn.BatchNorm2d) and m.running_var is not None]


def fit(found: Filter, model: nn.Module, name: str, images: Float[Tensor, "n c h w"]) -> None:
    """Make a filter one under which the inputs of all batch norms have the statistics that they remember.

    Pixels that are fitted one by one (ZeroQ, arXiv:2001.00281) come no nearer, and cost a fit for each image.

    Args:
        name: of the model's input.
    """
    optimizer = torch.optim.Adam(found.parameters(), lr=_RATE)
    losses: list[Tensor] = []
    hooks = [
        norm.register_forward_pre_hook(lambda n, x: losses.append(_loss(n, x[0]))) for norm in _norms(model)
    ]
    frozen = [p for p in model.parameters() if p.requires_grad]
    try:
        for parameter in frozen:
            parameter.requires_grad_(False)
        for _ in range(_STEPS):
            losses.clear()
            with torch.enable_grad():
                model(**{name: found(images)})
                loss = torch.stack(losses).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    finally:
        for hook in hooks:
            hook.remove()
        for parameter in frozen:
            parameter.requires_grad_(True)
    found.requires_grad_(False)


def _loss(norm: Any, x: Tensor) -> Tensor:
    mean, variance, known = x.mean((0, 2, 3)), x.var((0, 2, 3)), norm.running_var + norm.eps
    shift = ((mean - norm.running_mean) ** 2 / known).mean()
    return shift + ((variance / known).clamp(min=_LEAST_VARIANCE).log() ** 2).mean()
