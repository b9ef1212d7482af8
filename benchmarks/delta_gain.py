"""By which gain differences of low rates are best multiplied (codec/aligned.py), on several fine-tunes.

    python benchmarks/delta_gain.py --sst2 FOLDER      ten minutes; FOLDER is that of benchmarks/deltas.py

For several κ and rates: the divergence of the fine-tune's answers from those of what is loaded, over that
from the base's, without calibration. κ = 1 is least squares. Chosen on all models but those of `--aside`.
"""

import argparse
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from record import DATA, record
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from zoo_models import as_module, dense_folder
from zoo_vision import jpeg_images, write_folder

from miracle_hub.codec import aligned
from miracle_hub.codec.compress import compress_folder
from miracle_hub.codec.decompress import load_state_dict
from miracle_hub.options import CompressOptions

KAPPAS = (1.0, 10.0, 30.0, 100.0, 300.0, 1000.0)
_CONTEXT = 256


@dataclass
class Tune:
    """A base and its fine-tune.

    Attributes:
        answers: log probabilities, of inputs that neither was fitted to.
        rates: bits per weight; of small models a third of a file is names and headers.
    """

    name: str
    base: Path
    tuned: Path
    model: Callable[[Path], nn.Module]
    answers: Callable[[nn.Module], Tensor]
    rates: tuple[float, ...] = (1.0, 0.5)

    def kept(self, bits: float) -> float:
        """The divergence of what is loaded over that of the base."""
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "out"
            options = CompressOptions(bits_per_weight=bits, window_bits=12, progress=False)
            compress_folder(self.tuned, out, options, base=self.base)
            loaded = self.model(self.tuned)
            loaded.load_state_dict(load_state_dict(out, base=self.base), strict=False)
        wanted, own, other = (
            self.answers(m) for m in (self.model(self.tuned), loaded, self.model(self.base))
        )
        return _kl(wanted, own) / _kl(wanted, other)


def _kl(p: Tensor, q: Tensor) -> float:
    return float((p.exp() * (p - q)).sum(-1).mean())


def fit(model: nn.Module, steps: int, rate: float, loss: Callable[[torch.Generator], Tensor]) -> None:
    """Plain Adam."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters(), rate)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(generator).backward()
        optimizer.step()


def sst2(folder: Path) -> Tune:
    """all-MiniLM-L6-v2 with a head, of benchmarks/deltas.py, on 872 sentences of its test."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "tuned")
    rows = (DATA / "glue" / "SST-2" / "test.tsv").read_text(encoding="utf-8").splitlines()[1:]
    batch = tokenizer([row.rsplit("\t", 1)[0] for row in rows], padding=True, return_tensors="pt")

    @torch.inference_mode()
    def answers(model: nn.Module) -> Tensor:
        parts = zip(batch["input_ids"].split(128), batch["attention_mask"].split(128), strict=True)
        return torch.cat([model(input_ids=i, attention_mask=m).logits.log_softmax(-1) for i, m in parts])

    load: Callable[[Path], nn.Module] = AutoModelForSequenceClassification.from_pretrained
    return Tune("MiniLM, SST-2", folder / "headed", folder / "tuned", load, answers, (0.3, 0.1))


def shakespeare(folder: Path) -> Tune:
    """stories260K on plays, of which the last tenth is kept apart."""
    base = dense_folder("stories260k")
    text = (DATA / "text" / "tinyshakespeare.txt").read_text(encoding="utf-8")
    ids = torch.tensor(AutoTokenizer.from_pretrained(base)(text)["input_ids"])
    seen, apart = ids[: len(ids) * 9 // 10], ids[len(ids) * 9 // 10 :]
    model = AutoModelForCausalLM.from_pretrained(base)

    def loss(generator: torch.Generator) -> Tensor:
        starts = torch.randint(len(seen) - _CONTEXT, (8,), generator=generator)
        windows = torch.stack([seen[start : start + _CONTEXT] for start in starts])
        return model(input_ids=windows, labels=windows).loss

    fit(model, 300, 5e-4, loss)
    model.save_pretrained(folder)
    windows = apart[: 20 * _CONTEXT].view(20, _CONTEXT)

    @torch.inference_mode()
    def answers(model: nn.Module) -> Tensor:
        return model(input_ids=windows).logits.log_softmax(-1)

    return Tune("stories260K, plays", base, folder, AutoModelForCausalLM.from_pretrained, answers)


def jpegs(folder: Path, depth: int) -> Tune:
    """A ResNet on JPEG images, for which it was not made; on 2,000 others."""
    name = f"resnet{depth}"
    base = dense_folder(name)
    model = as_module(name, base)
    images = jpeg_images("train", 8000)
    labels = torch.from_numpy(
        np.load(DATA / "cifar10" / "cifar10_train_jpeg.npz")["labels"][:8000].astype(np.int64)
    )

    def loss(generator: torch.Generator) -> Tensor:
        some = torch.randint(len(images), (64,), generator=generator)
        return F.cross_entropy(model(images[some]), labels[some])

    fit(model, 200, 2e-4, loss)
    write_folder(folder, {key: tensor.contiguous() for key, tensor in model.state_dict().items()})
    others = jpeg_images("test", 2000)

    @torch.inference_mode()
    def answers(model: nn.Module) -> Tensor:
        return torch.cat([model(batch).log_softmax(-1) for batch in others.split(500)])

    return Tune(f"ResNet-{depth}, JPEG images", base, folder, partial(as_module, name), answers)


def rows(tunes: list[Tune], kappas: list[float]) -> Iterator[dict[str, float | str]]:
    """One for every fine-tune, rate and κ."""
    for tune in tunes:
        for bits in tune.rates:
            for aligned.ALIGNMENT in kappas:
                row = {"model": tune.name, "bits": bits, "kappa": aligned.ALIGNMENT, "kl": tune.kept(bits)}
                print(row, flush=True)
                yield row


def main() -> None:
    """Measure, print and record."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--sst2", type=Path)
    p.add_argument("--kappa", nargs="+", type=float, default=list(KAPPAS))
    p.add_argument("--aside", action="store_true", help="ResNet-44 only, which nothing is chosen on")
    a = p.parse_args()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        at = Path(folder)
        if a.aside:
            tunes = [jpegs(at / "44", 44)]
        else:
            tunes = [*([sst2(a.sst2)] if a.sst2 else []), shakespeare(at / "plays"), jpegs(at / "20", 20)]
        found = list(rows(tunes, a.kappa))
    record("delta_gain_aside" if a.aside else "delta_gain", found)


if __name__ == "__main__":
    main()
