"""Small image networks beside their dense selves: agreement of the likeliest class, accuracy, KL.

ResNet-20 and ResNet-44 (akamaster/pytorch_resnet_cifar10): agreement and KL on 10,000 JPEG images of CIFAR-10
(test images; for dev the first 2,000 training images), accuracy on the raw subset (1,000 test images; for dev
the first 1,000 training images). JPEG images are not the raw ones: the dense nets lose ten points on them, so
accuracy is told of raw images only. LeNet-5 (Caffe), whose pixels are / 256: MNIST test, or the last 10,000
training images for dev.
"""

import io
import json
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from lenet import mnist
from PIL import Image
from record import DATA
from safetensors.torch import save_file
from torch import Tensor, nn

_MEAN, _STD = torch.tensor((0.485, 0.456, 0.406)), torch.tensor((0.229, 0.224, 0.225))
_DEV_IMAGES, _QUICK_IMAGES, _BATCH = 2000, 500, 500


class _Block(nn.Module):
    """Two convolutions; the shortcut has no weights ("option A")."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        self.padding = width // 4 if width_in != width else 0

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.padding:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.padding, self.padding))
        return F.relu(y + x)


class ResNet(nn.Module):
    """The CIFAR ResNet of depth 6 n + 2; normalized images [n, 3, 32, 32] → logits [n, 10]."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        n = (depth - 2) // 6
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        self.layer1, self.layer2, self.layer3 = (
            _stage(n, 16, 16, 1),
            _stage(n, 16, 32, 2),
            _stage(n, 32, 64, 2),
        )
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        return self.linear(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))


def _stage(n: int, width_in: int, width: int, stride: int) -> nn.Sequential:
    return nn.Sequential(_Block(width_in, width, stride), *(_Block(width, width, 1) for _ in range(n - 1)))


def resnet_state(depth: int) -> dict[str, Tensor]:
    """The state dict of a checkpoint in the data."""
    (path,) = (DATA / "resnet_cifar10").glob(f"resnet{depth}-*.th")
    state = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    return {name.removeprefix("module."): tensor.contiguous() for name, tensor in state.items()}


def lenet_state() -> dict[str, Tensor]:
    """The state dict of Caffe's file, for LeNet5(rectifies=False); its linear layers are named ip there."""
    found = np.load(DATA / "lenet5_mnist" / "lenet5.npz")
    return {name.replace("ip", "fc"): torch.from_numpy(found[name].copy()) for name in found.files}


def write_folder(folder: Path, state: dict[str, Tensor]) -> None:
    """A folder with one safetensors file and a config.json that names no class of transformers."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"model": folder.name}, indent=2) + "\n")


@cache
def jpeg_images(split: str, n: int, first: int = 0) -> Tensor:
    """Normalized JPEG images [n, 3, 32, 32] of "train" or "test"."""
    found = np.load(DATA / "cifar10" / f"cifar10_{split}_jpeg.npz")
    joined, at = found["jpeg"].tobytes(), found["offsets"]
    images = [_pixels(joined[at[i] : at[i + 1]]) for i in range(first, first + n)]
    return _normalized(np.stack(images))


def _pixels(jpeg: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB"))


def _normalized(images: np.ndarray) -> Tensor:
    return ((torch.from_numpy(images).float() / 255 - _MEAN) / _STD).permute(0, 3, 1, 2).contiguous()


@cache
def _raw_images(split: str) -> tuple[Tensor, Tensor]:
    """1,000 raw images and their labels."""
    found = np.load(DATA / "cifar10" / "cifar10_raw_subset.npz")
    images, labels = found[f"{split}_images"][:1000], found[f"{split}_labels"][:1000]
    return _normalized(images), torch.from_numpy(labels.astype(np.int64))


@torch.inference_mode()
def logits(model: nn.Module, images: Tensor) -> Tensor:
    """Of all images, a batch at a time."""
    return torch.cat([model(batch) for batch in images.split(_BATCH)])


@cache
def _dense_logits(dense: nn.Module, which: str, split: str, n: int) -> Tensor:
    images = (
        jpeg_images("train" if split == "dev" else "test", n) if which == "cifar" else digits(split, n)[0]
    )
    return logits(dense, images)


def compared(here: Tensor, there: Tensor) -> dict[str, float]:
    """Logits beside the dense model's: agreement of the likeliest class, and KL(dense ‖ here) in nats."""
    same = (here.argmax(1) == there.argmax(1)).float().mean()
    p, q = torch.log_softmax(there, 1), torch.log_softmax(here, 1)
    return {"agreement": 100 * float(same), "kl": float((p.exp() * (p - q)).sum(1).mean())}


def _accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    return 100 * float((logits(model, images).argmax(1) == labels).float().mean())


def measure_cifar(
    model: nn.Module, dense: nn.Module, folder: Path, split: str, quick: bool
) -> dict[str, float]:
    """Agreement and KL on JPEG images, accuracy on raw ones."""
    n = _QUICK_IMAGES if quick else (_DEV_IMAGES if split == "dev" else 10_000)
    here = logits(model, jpeg_images("train" if split == "dev" else "test", n))
    raw = _raw_images("train" if split == "dev" else "test")
    return compared(here, _dense_logits(dense, "cifar", split, n)) | {"accuracy": _accuracy(model, *raw)}


@cache
def digits(split: str, n: int) -> tuple[Tensor, Tensor]:
    """Images of MNIST / 256 and their labels, of the split's 10,000."""
    images, labels = mnist("train" if split == "dev" else "t10k")
    return images[-10_000:][:n].float() / 256, labels[-10_000:][:n]


def measure_mnist(
    model: nn.Module, dense: nn.Module, folder: Path, split: str, quick: bool
) -> dict[str, float]:
    """Agreement, KL and accuracy on digits."""
    images, labels = digits(split, _QUICK_IMAGES if quick else 10_000)
    found = compared(logits(model, images), _dense_logits(dense, "mnist", split, len(images)))
    return found | {"accuracy": _accuracy(model, images, labels)}


def cifar_to_calibrate() -> Tensor:
    """2,000 normalized JPEG training images, none of them of dev."""
    return jpeg_images("train", _DEV_IMAGES, _DEV_IMAGES)


def mnist_to_calibrate() -> Tensor:
    """2,000 training images, none of them of dev."""
    return mnist("train")[0][:_DEV_IMAGES].float() / 256
