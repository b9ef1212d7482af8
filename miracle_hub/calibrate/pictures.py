"""Noise like images for a vision net: of its size, scaled as its processor scales."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from miracle_hub.calibrate.modality import Modality, main_input, modality_of
from miracle_hub.calibrate.noise import images
from miracle_hub.calibrate.remembered import Filter, fit, remembers
from miracle_hub.calibrate.rows import Found, rows_of_batch, tokens_of
from miracle_hub.errors import CalibrationError, SourceError
from miracle_hub.evaluate.batches import read_processor

_LEAST_ROWS = 16
_AT_ONCE = 64
# Pixels of all images that a filter is fitted on, and how many images at least: choices that bound time.
_FITTED, _LEAST_FITTED = 1 << 16, 8
_SIZES = (32, 28, 64, 96, 224, 299, 384)  # of images, tried in this order where nothing says it
_LARGE = 224  # tried first by nets for photographs
_LARGE_KERNEL = 5  # of a first convolution with strides, as nets for photographs have
# What images are scaled by where nothing says it: as torchvision's nets.
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def picture_rows(model: Any, folder: Path, wanted: int, generator: torch.Generator) -> Found:
    """Rows that have `wanted` tokens together.

    Raises:
        CalibrationError: the model is none that takes images, or of none of the usual sizes.
    """
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    leads = next((m for m in model.modules() if isinstance(m, nn.Embedding | nn.Linear | nn.Conv2d)), None)
    if first is None or (modality_of(model) is Modality.ARRAY and leads is not first):
        raise CalibrationError(
            f"{type(model).__name__}: expected a model of which it is known what it takes (texts, images or "
            "sounds), found another; give data (--calibrate DATA), as an npz of its inputs"
        )
    processor = _processor(folder)
    mean, std, said = _scaling(processor, first.in_channels)
    size = _size(model, processor, first)
    draw = _Images(mean, std, size, generator)
    if remembers(model):
        draw.fit(model)
        said += ", filtered as batch norms remember"
    rows: list[dict[str, Tensor]] = []
    while sum(map(tokens_of, rows)) < wanted or len(rows) < _LEAST_ROWS:
        rows += rows_of_batch({main_input(model): draw(_AT_ONCE)})
    return Found(rows, "self", f"{len(rows):,} images of disks and noise, {size[0]} × {size[1]}, {said}")


class _Images:
    """Draws images as a model takes them."""

    def __init__(self, mean: Tensor, std: Tensor, shape: tuple[int, int], generator: torch.Generator) -> None:
        self.mean, self.std, self.shape, self.generator = mean, std, shape, generator
        self.filter: Filter | None = None

    def __call__(self, n: int) -> Tensor:
        pixels = images(n, len(self.mean), *self.shape, self.generator, has_noise=self.filter is None)
        scaled = (pixels - self.mean) / self.std
        return scaled if self.filter is None else self.filter.cpu()(scaled)

    def fit(self, model: nn.Module) -> None:
        """To what the model's batch norms remember."""
        device = next(model.parameters()).device
        self.filter = Filter(-self.mean / self.std, (1 - self.mean) / self.std)
        n = min(_AT_ONCE, max(_LEAST_FITTED, _FITTED // (self.shape[0] * self.shape[1])))
        drawn = self(n).detach().to(device)
        fit(self.filter.to(device), model, main_input(model), drawn)


def _processor(folder: Path) -> Any:
    """The image processor beside a model, or None."""
    try:
        return read_processor([folder])
    except SourceError:
        return None


def _scaling(processor: Any, channels: int) -> tuple[Tensor, Tensor, str]:
    """What pixels between 0 and 1 are scaled by."""
    if processor is None:
        said = "scaled as usual, for want of a processor"
        mean, std = (_MEAN, _STD) if channels == len(_MEAN) else (None, None)
    else:
        mean, std = getattr(processor, "image_mean", None), getattr(processor, "image_std", None)
        said = "scaled as by its processor"
    mean, std = (torch.tensor(x).float() for x in (mean or (0.0,) * channels, std or (1.0,) * channels))
    return mean[:, None, None], std[:, None, None], said


def _size(model: Any, processor: Any, first: nn.Conv2d) -> tuple[int, int]:
    """Height and width: what processor or config says, or the first usual size that the model runs on.

    Raises:
        CalibrationError: it runs on none.
    """
    for found in (getattr(processor, "crop_size", None), getattr(processor, "size", None)):
        height, width = (getattr(found, name, None) for name in ("height", "width"))
        if isinstance(height, int) and isinstance(width, int):
            return height, width
    size = getattr(getattr(model, "config", None), "image_size", None)
    if isinstance(size, int):
        return size, size
    if isinstance(size, list | tuple) and len(size) == 2:
        return int(size[0]), int(size[1])
    is_large = first.kernel_size[0] >= _LARGE_KERNEL and first.stride[0] > 1
    sizes = sorted(_SIZES, key=lambda n: n != _LARGE) if is_large else _SIZES
    said = ""
    for size in sizes:
        try:
            with torch.no_grad():
                model(**{main_input(model): torch.zeros(1, first.in_channels, size, size)})
        except (RuntimeError, ValueError) as error:
            said = str(error).partition("\n")[0]
            continue
        return size, size
    raise CalibrationError(
        f"{type(model).__name__}: expected a net for images of one of the usual sizes {list(sizes)}, found "
        f"that it takes none ({said}); give data (--calibrate DATA), as an npz of its inputs"
    )
