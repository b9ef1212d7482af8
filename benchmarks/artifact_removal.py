"""A network that cleans JPEGs, tuned to a set of images: bytes of its update against what they gain.

    python benchmarks/artifact_removal.py --base        trains the base, on JPEGs of one quality: minutes
    python benchmarks/artifact_removal.py               results/artifact-removal.json

The images are those of CIFAR-10 that are there without loss; a set is one picture of all its images, so that
a JPEG has one header. The base is trained on half of the training images, with JPEGs of quality 20. Sets are
test images, of which the sender has the originals; the receiver has the base and gets a JPEG and an update.
The same bytes could have bought a better JPEG: what that gains, cleaned by the base, stands beside.

After Lam et al. 2019 (arXiv:1905.04079).
"""

import argparse
import io
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from deltas import file_bytes
from PIL import Image
from record import DATA, record
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel, Trainer, TrainingArguments

import miracle_hub
from miracle_hub import CodingOptions, MiracleConfig, MiracleTrainer, UpdatePenalty

BASE_QUALITY, SIDE = 20, 32


class CleanerConfig(PretrainedConfig):
    """Of `Cleaner`."""

    model_type = "jpeg-cleaner"

    def __init__(self, width: int = 48, **options: Any) -> None:
        self.width = width
        super().__init__(**options)


class Cleaner(PreTrainedModel):
    """What a JPEG lacks, added to it: four layers, 44,000 weights."""

    config_class = CleanerConfig
    main_input_name = "pixels"

    def __init__(self, config: CleanerConfig) -> None:
        super().__init__(config)
        widths = (3, config.width, config.width, config.width, 3)
        layers = [nn.Conv2d(*pair, 3, padding=1) for pair in zip(widths, widths[1:], strict=False)]
        self.layers = nn.ModuleList(layers)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """As torch does."""

    def forward(self, pixels: Tensor, labels: Tensor | None = None, **options: Any) -> dict[str, Tensor]:
        """Pixels `[images, 3, 32, 32]` in 0 … 1 → their loss and `logits`, which are pixels too."""
        x = pixels - 0.5
        for layer in self.layers[:-1]:
            x = layer(x).relu()
        found = {"logits": pixels + self.layers[-1](x)}
        if labels is not None:
            found = {"loss": 100 * (found["logits"] - labels).square().mean(), **found}
        return found


@dataclass(frozen=True)
class Pictures:
    """A set: originals and JPEG, float32 `[images, 3, 32, 32]`, and bytes of the JPEG."""

    originals: Tensor
    jpegs: Tensor
    n_bytes: int

    @classmethod
    def of(cls, images: np.ndarray, quality: int) -> "Pictures":
        """Of uint8 images `[images, 32, 32, 3]`, at a quality of JPEG."""
        columns = next(n for n in (25, 20, 10, 5, 1) if len(images) % n == 0)
        grid = images.reshape(-1, columns, SIDE, SIDE, 3).swapaxes(1, 2)
        buffer = io.BytesIO()
        Image.fromarray(grid.reshape(-1, columns * SIDE, 3)).save(
            buffer, "jpeg", quality=quality, optimize=True
        )
        whole = np.asarray(Image.open(io.BytesIO(buffer.getvalue())))
        decoded = whole.reshape(-1, SIDE, columns, SIDE, 3).swapaxes(1, 2).reshape(images.shape)
        return cls(_pixels(images), _pixels(decoded), len(buffer.getvalue()))

    def psnr(self, model: nn.Module | None = None) -> float:
        """Of the JPEG, or of what a network makes of it, in 0 … 255 whole numbers, in dB."""
        found = self.jpegs
        if model is not None:
            with torch.inference_mode():
                parts = [model.eval()(part)["logits"] for part in found.split(100)]
            found = (255 * torch.cat(parts)).round().clamp(0, 255) / 255
        return -10 * math.log10(float((found - self.originals).square().mean()))

    def rows(self) -> list[dict[str, Tensor]]:
        """For the Trainer."""
        return [{"pixels": x, "labels": y} for x, y in zip(self.jpegs, self.originals, strict=True)]


def _pixels(images: np.ndarray) -> Tensor:
    return torch.from_numpy(images.copy()).permute(0, 3, 1, 2).float() / 255


def trainer(kind: Any, model: nn.Module, rows: Any, a: argparse.Namespace, steps: int, **options: Any) -> Any:
    """One of either kind."""
    arguments = TrainingArguments(
        output_dir=str(a.folder / "trainer"), max_steps=steps, per_device_train_batch_size=16,
        learning_rate=options.pop("rate"), seed=0, warmup_steps=0.06, use_cpu=True, report_to=[],
        save_strategy="no", logging_steps=200, disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    return kind(model=model, args=arguments, train_dataset=rows, **options)


def make_base(images: Any, a: argparse.Namespace) -> None:
    """Train the base on one half of the training images; the other half says how well."""
    torch.manual_seed(0)
    model, half = Cleaner(CleanerConfig()), len(images["train_images"]) // 2
    training, held_out = (
        Pictures.of(part, BASE_QUALITY) for part in np.split(images["train_images"], [half])
    )
    trainer(Trainer, model, training.rows(), a, a.base_steps, rate=2e-3).train()
    model.save_pretrained(a.folder / "base")
    print(f"held out: JPEG {held_out.psnr():.3f} dB, cleaned {held_out.psnr(model):.3f} dB", flush=True)


def sets(images: Any) -> dict[str, tuple[np.ndarray, int]]:
    """Test images and the quality of their JPEG, by name."""
    tests, labels = images["test_images"], images["test_labels"]
    ships = tests[labels == 8][:100]
    return {
        "500 images, quality 10": (tests[:500], 10),
        "500 images, quality 20": (tests[:500], 20),
        f"{len(ships)} ships, quality 20": (ships, 20),
    }


def loaded(out: Path, base: Path) -> nn.Module:
    """What plain from_pretrained gives."""
    return Cleaner.from_pretrained(out, quantization_config=MiracleConfig(base=base))


def fitted(pictures: Pictures, size: int, a: argparse.Namespace) -> tuple[int, nn.Module]:
    """An update that is fitted for its size."""
    base, out = a.folder / "base", a.folder / "out"
    model = Cleaner.from_pretrained(base)
    config = MiracleConfig(size=size, base=base, target_modules="all-matrices")
    miracle_hub.make_variational(model, config)
    groups, refit = 11, 20
    tuner = trainer(
        MiracleTrainer, model, pictures.rows(), a, a.steps - (groups - 1) * refit, rate=a.fit_rate
    )
    tuner.train()
    tuner.compress(out, options=CodingOptions(groups, refit, 5e-4), overwrite=True, distill=False)
    return file_bytes(out), loaded(out, base)


def tuned(pictures: Pictures, a: argparse.Namespace, penalty: float = 0.0) -> nn.Module:
    """A plain fine-tune, under a penalty if it has a weight, in a folder."""
    model = Cleaner.from_pretrained(a.folder / "base")
    callbacks = [UpdatePenalty(model, "ratio", penalty)] if penalty else []
    trainer(Trainer, model, pictures.rows(), a, a.steps, rate=5e-4, callbacks=callbacks).train()
    model.save_pretrained(a.folder / "tuned")
    return model


def compressed(size: int, a: argparse.Namespace) -> tuple[int, nn.Module]:
    """The fine-tune in the folder, as a difference of a size."""
    base, out = a.folder / "base", a.folder / "out"
    miracle_hub.compress(
        a.folder / "tuned", out, size=size, base=base, calibrate=None, overwrite=True, progress=False
    )
    return file_bytes(out), loaded(out, base)


def bought(images: np.ndarray, quality: int, n_bytes: int, base: nn.Module) -> tuple[int, float]:
    """The quality of JPEG that so many bytes pay for, and the dB of it, cleaned by the base; between two
    qualities in proportion to bytes.
    """
    before = Pictures.of(images, quality)
    wanted, last = before.n_bytes + n_bytes, before
    for better in range(quality + 1, 100):
        found = Pictures.of(images, better)
        if found.n_bytes > wanted:
            share = (wanted - last.n_bytes) / (found.n_bytes - last.n_bytes)
            return better - 1, last.psnr(base) + share * (found.psnr(base) - last.psnr(base))
        last = found
    return 99, last.psnr(base)


def measured(name: str, images: np.ndarray, quality: int, a: argparse.Namespace) -> dict[str, Any]:
    """All updates of one set."""
    pictures, base = Pictures.of(images, quality), Cleaner.from_pretrained(a.folder / "base")
    start = pictures.psnr(base)
    found: dict[str, Any] = {"set": name, "jpeg_bytes": pictures.n_bytes, "jpeg": pictures.psnr()}
    found |= {"base": start, "dense_gain": pictures.psnr(tuned(pictures, a)) - start, "rows": []}
    made = {"plain": lambda size: compressed(size, a), "fit": lambda size: fitted(pictures, size, a)}
    for method in ("plain", "ratio", "fit"):
        if method == "ratio":
            found["ratio_gain"] = pictures.psnr(tuned(pictures, a, a.penalty)) - start
        for size in a.sizes:
            n_bytes, model = made.get(method, made["plain"])(size)
            better, decibels = bought(images, quality, n_bytes, base)
            row = {"method": method, "bytes": n_bytes, "gain": pictures.psnr(model) - start}
            found["rows"].append(row | {"same_bytes_quality": better, "same_bytes_gain": decibels - start})
            print(name, json.dumps(found["rows"][-1]), flush=True)
    return found


def main() -> None:
    """The base, or all sets."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--folder", type=Path, default=Path("artifact-work"))
    p.add_argument("--base", action="store_true")
    p.add_argument("--base-steps", type=int, default=3000)
    p.add_argument("--steps", type=int, default=600)
    p.add_argument("--fit-rate", type=float, default=2e-3)
    p.add_argument("--penalty", type=float, default=1e-5)
    p.add_argument("--sizes", type=int, nargs="+", default=[1500, 2500, 5000])
    p.add_argument("--threads", type=int, default=1)
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    images = np.load(DATA / "cifar10" / "cifar10_raw_subset.npz")
    if a.base:
        make_base(images, a)
        return
    rows = [measured(name, *given, a) for name, given in sets(images).items()]
    base = Cleaner.from_pretrained(a.folder / "base")
    facts = {"n_weights": base.num_parameters(), "steps": a.steps, "penalty": a.penalty}
    record("artifact-removal", {**facts, "base_quality": BASE_QUALITY, "sets": rows})


if __name__ == "__main__":
    main()
