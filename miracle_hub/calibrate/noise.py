"""Images and sounds that nobody took: with the spectra of natural ones, and little else of them."""

import torch
from jaxtyping import Float
from torch import Tensor

_SLOPE = 1.6  # of amplitudes by frequency: photographs have 1, small ones that were scaled down more
_GRAY = 0.9  # of natural images' variance is common to all colors
# Of pixels between 0 and 1, over images: what photographs have, nearly.
_MEAN, _MEAN_SPREAD, _CONTRAST = 0.46, 0.15, 0.25
# Disks that hide each other, of radii whose density falls as their cube, as of things in photographs.
_DISKS, _SMALLEST, _LARGEST = 60, 1 / 20, 1 / 2  # of an image's height
_NOISE = 0.3  # of an image that is noise with a natural spectrum, and no disks


def images(
    n: int, channels: int, height: int, width: int, generator: torch.Generator, has_noise: bool = True
) -> Float[Tensor, "n channels height width"]:
    """Dead leaves, disks of all sizes in front of each other, and noise; pixels between 0 and 1.

    Things have edges, and so have these (Lee, Mumford and Huang 2001; Baradad et al., arXiv:2106.05963).

    Args:
        has_noise: so that they have all frequencies; without, they have edges alone.
    """
    pixels = _colors(n, channels, generator).expand(n, channels, height, width)
    mean = _MEAN + _MEAN_SPREAD * torch.randn((n, 1, 1, 1), generator=generator)
    for _ in range(_DISKS):
        inside = _disk(n, height, width, generator)
        pixels = torch.where(inside, mean + _CONTRAST * _colors(n, channels, generator), pixels)
    if has_noise:
        spectral = _mixed(*(_spectral((n, c, height, width), generator) for c in (1, channels)))
        pixels = (1 - _NOISE) * pixels + _NOISE * (mean + _CONTRAST * spectral)
    return pixels.clamp(0, 1)


def _colors(n: int, channels: int, generator: torch.Generator) -> Tensor:
    return _mixed(*(torch.randn((n, c, 1, 1), generator=generator) for c in (1, channels)))


def _mixed(gray: Tensor, colors: Tensor) -> Tensor:
    return _GRAY**0.5 * gray + (1 - _GRAY) ** 0.5 * colors


def _disk(n: int, height: int, width: int, generator: torch.Generator) -> Tensor:
    """Where an ellipse is, one in every image."""
    u, y, x, turn, flat = torch.rand((5, n, 1, 1, 1), generator=generator)
    radius = height * (_LARGEST**-2 + u * (_SMALLEST**-2 - _LARGEST**-2)) ** -0.5
    dy, dx = torch.arange(height)[:, None] - y * height, torch.arange(width) - x * width
    sin, cos = (torch.pi * turn).sin(), (torch.pi * turn).cos()
    return ((dy * cos + dx * sin) / radius) ** 2 + ((dx * cos - dy * sin) / (radius * (0.5 + flat))) ** 2 < 1


def _spectral(shape: tuple[int, int, int, int], generator: torch.Generator) -> Tensor:
    """Of mean 0 and variance 1 in every image."""
    height, width = shape[-2:]
    white = torch.fft.rfft2(torch.randn(shape, generator=generator))
    frequency = torch.hypot(torch.fft.fftfreq(height)[:, None] * height, torch.fft.rfftfreq(width) * width)
    colored = torch.fft.irfft2(white / frequency.clamp(min=1) ** _SLOPE, s=(height, width))
    colored = colored - colored.mean((2, 3), keepdim=True)
    return colored / colored.std((2, 3), keepdim=True).clamp(min=1e-6)


_FRAME, _HOP = 512, 160  # samples, at the usual 16,000 a second
_SYLLABLE = (0.12, 0.3)  # seconds, from and to
_PITCH = (90.0, 220.0)  # Hz
# Centers of the first three formants of vowels, from and to, in Hz, and their widths.
_FORMANTS = ((300.0, 800.0, 120.0), (900.0, 2400.0, 180.0), (2300.0, 3200.0, 250.0))


def speech(seconds: float, rate: int, generator: torch.Generator) -> Float[Tensor, " samples"]:
    """Babble: syllables of voiced harmonics under formants, or of hiss, with pauses; samples within ±1."""
    n_frames = int(seconds * rate / _HOP) + 1
    frequency = torch.linspace(0, rate / 2, _FRAME // 2 + 1)[:, None]
    magnitude = torch.zeros(len(frequency), n_frames)
    start = 0
    while start < n_frames:
        length = max(2, int(_between(*_SYLLABLE, generator) * rate / _HOP))
        stop = min(start + length, n_frames)
        magnitude[:, start:stop] = _syllable(frequency, stop - start, generator)
        start = stop
    phase = torch.exp(2j * torch.pi * torch.rand(magnitude.shape, generator=generator))
    floor = 1e-3 * torch.rand(magnitude.shape, generator=generator)
    samples = torch.istft(
        (magnitude + floor) * phase,
        _FRAME,
        _HOP,
        window=torch.hann_window(_FRAME),
        length=int(seconds * rate),
    )
    return 0.5 * samples / samples.abs().max().clamp(min=1e-6)


def _syllable(frequency: Tensor, n_frames: int, generator: torch.Generator) -> Tensor:
    kind = _between(0, 1, generator)
    if kind < 0.15:
        return torch.zeros(len(frequency), n_frames)
    envelope = torch.sin(torch.pi * (torch.arange(n_frames) + 0.5) / n_frames) * _between(0.3, 1, generator)
    if kind < 0.3:
        return 0.2 * torch.sigmoid((frequency - _between(1500, 4000, generator)) / 500) * envelope
    tract = sum(
        torch.exp(-(((frequency - _between(low, high, generator)) / width) ** 2)) / (1 + number)
        for number, (low, high, width) in enumerate(_FORMANTS)
    )
    pitch = _between(*_PITCH, generator) * torch.linspace(1, _between(0.8, 1.2, generator), n_frames)
    harmonics = torch.cos(torch.pi * frequency / pitch) ** 8
    return (tract + 0.02) * (harmonics + 0.05) * envelope


def _between(low: float, high: float, generator: torch.Generator) -> float:
    return low + (high - low) * float(torch.rand((), generator=generator))
