"""What is killed, raced and starved: every verb on a tiny model, and what it is to have made."""

import random
import shutil
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from transformers import BertConfig, BertModel, BertTokenizer

import miracle_hub
from miracle_hub.files import whole as folder_module
from miracle_hub.finetune import fit as fit_module
from miracle_hub.training.checkpoint import Checkpoint

from ..training.networks import loss_of, variational_net
from .environment import HUB, WORK

Tree = dict[str, bytes]
REPO_ID = "user/model"
_WORDS = ["good", "bad", "film", "a", "the", "very", "movie", "is", "awful", "nice"]
_QUIET: dict[str, Any] = {"window_bits": 8, "calibrate": None, "progress": False}


@dataclass(frozen=True)
class Verb:
    """A verb on a folder that holds what `prepare` put there.

    Attributes:
        made: of the folder, what a user would see of the output; {} for nothing.
        lives: how often it may be killed before it is left to end.
        overwrites: what was there before may still be there after a kill.
        may_vanish: it may even be hidden, until the next run.
    """

    name: str
    run: Callable[[Path], object]
    made: Callable[[Path], Tree]
    prepare: Callable[[Path], object] = lambda folder: None
    lives: int = 1
    overwrites: bool = False
    may_vanish: bool = False


def tree(folder: Path) -> Tree:
    """Every file below a folder with its bytes, and every folder."""
    return {
        str(path.relative_to(folder)): b"" if path.is_dir() else path.read_bytes()
        for path in sorted(folder.rglob("*"))
    }


def is_hidden(path: str) -> bool:
    return any(part.startswith(".") for part in Path(path).parts)


def output(folder: Path) -> Tree:
    return {path: data for path, data in tree(folder / "out").items() if not is_hidden(path)}


def _once(name: str, make: Callable[[Path], object]) -> Path:
    """A folder below WORK, made when it is first asked for."""
    if not (WORK / name).exists():
        make(WORK / name)
    return WORK / name


def _save_dense(folder: Path) -> None:
    """A tiny BERT with its tokenizer."""
    folder.mkdir()
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *_WORDS]
    BertTokenizer({word: i for i, word in enumerate(vocabulary)}).save_pretrained(folder)
    torch.manual_seed(0)
    sizes: dict[str, Any] = dict(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
    )
    BertModel(BertConfig(vocab_size=15, max_position_embeddings=64, **sizes)).save_pretrained(folder)


def dense() -> Path:
    return _once("dense", _save_dense)


def compressed() -> Path:
    return _once("compressed", lambda out: miracle_hub.compress(dense(), out, bits_per_weight=5, **_QUIET))


def sentences() -> Path:
    """Sentences that are positive where "good" or "nice" is in them."""

    def write(path: Path) -> None:
        drawn = [random.Random(i).choices(_WORDS, k=5) for i in range(100)]
        rows = [f"{' '.join(words)}\t{int('good' in words or 'nice' in words)}\n" for words in drawn]
        path.write_text("sentence\tlabel\n" + "".join(rows))

    return _once("sentences.tsv", write)


def compress(folder: Path, seed: int = 0, overwrite: bool = False) -> None:
    miracle_hub.compress(dense(), folder / "out", bits_per_weight=4, seed=seed, overwrite=overwrite, **_QUIET)


def decompress(folder: Path, overwrite: bool = False) -> None:
    miracle_hub.decompress(compressed(), folder / "out", overwrite=overwrite, progress=False)


def put_older(folder: Path) -> None:
    """An output of before."""
    shutil.copytree(compressed(), folder / "out")


def without_exchange(folder: Path) -> None:
    """What a system does that cannot exchange two names."""
    exchange, folder_module._exchange = folder_module._exchange, lambda one, other: False
    try:
        compress(folder, overwrite=True)
    finally:
        folder_module._exchange = exchange


def code(folder: Path, seed: int = 0, out: Path | None = None) -> None:
    """Code a network with refits, its state kept at every step, and save it."""
    out = out or folder / "out"
    torch.manual_seed(0)
    model = variational_net(streams="network", selection="sample", seed=seed)
    miracle_hub.code_model(
        model,
        loss_of(model),
        options=miracle_hub.CodingOptions(groups=6, refit_steps=4),
        checkpoint=Checkpoint(folder / "state", every_seconds=0),
        journal=miracle_hub.Journal(folder / "journal", plot_every_seconds=1e9),
        progress=False,
    )
    out.mkdir(exist_ok=True)
    miracle_hub.save(model, out / "net.safetensors")


def fit(folder: Path) -> None:
    """Fine-tune and code; checkpoints of both at every few steps."""
    arguments, defaults = fit_module._arguments, Checkpoint.__init__.__defaults__

    def frequent(*given: Any) -> Any:
        found = arguments(*given)
        found.save_steps = 3
        return found

    fit_module._arguments, Checkpoint.__init__.__defaults__ = frequent, (0.0, "")
    try:
        with redirect_stdout(StringIO()):  # the Trainer prints its figures
            miracle_hub.fit(
                dense(), folder / "out", data=sentences(), rate=1.0, steps=12, batch_size=4, groups=4,
                refit_steps=4, learning_rate=1e-3, resume=True, progress=False,
            )  # fmt: skip
    finally:
        fit_module._arguments, Checkpoint.__init__.__defaults__ = arguments, defaults


def put_repository(folder: Path) -> None:
    """What is to be pushed, and a Hub that has nothing of it."""
    shutil.copytree(compressed(), folder / "out")
    HUB.repositories.clear()
    HUB.uploads.clear()


def push(folder: Path) -> None:
    miracle_hub.push(folder / "out", REPO_ID)


def pushed(folder: Path) -> Tree:
    """What the Hub has, and in how many commits; {} before the first commit of files."""
    repository = HUB.repositories.get(REPO_ID)
    if repository is None or not repository.files():
        return {}
    n_commits = sum(bool(files) for files in repository.commits.values())
    return {path: blob.data for path, blob in repository.files().items()} | {"commits": bytes(n_commits)}


VERBS = {
    verb.name: verb
    for verb in (
        Verb("compress", compress, output),
        Verb("compress over an older folder", lambda f: compress(f, overwrite=True), output, put_older,
             overwrites=True),
        Verb("decompress", decompress, output),
        Verb("decompress over an older folder", lambda f: decompress(f, overwrite=True), output, put_older,
             overwrites=True),
        Verb("compress where names cannot be exchanged", without_exchange, output, put_older,
             overwrites=True, may_vanish=True),
        Verb("code", code, output, lives=3),
        Verb("push", push, pushed, put_repository),
        Verb("fit", fit, output, lives=3),
    )
}  # fmt: skip
