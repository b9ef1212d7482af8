"""Random model folders: compressed and decompressed they load equal, and every file is accounted for.

A folder is a random architecture of transformers at tiny size, in a random dtype, with tensors beside its
weights that are no weights (masks, tables, counters) and files beside it that only their names explain.
"""

import random
import shutil
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import miracle_hub
from miracle_hub.errors import BudgetError, SourceError

from ..sweep.tiny import classes_of, tiny_config
from .environment import WORK

_MOST_WEIGHTS = 1_200_000  # of a tiny model: a folder takes a second
_DTYPES = (torch.float32, torch.float32, torch.float16, torch.bfloat16)
# Beside every model: what stays byte for byte, whoever it is for.
_CARRIED: dict[str, bytes] = {
    "tokenizer.json": b"{}",
    "chat_template.jinja": b"{{ messages }}",
    "modeling_own.py": b"raise SystemExit\n",
    "merges.txt": b"",
    "1_Pooling/config.json": b'{"word_embedding_dimension": 32}',
    "a folder/ünïcode name.txt": "ü".encode(),
    "deep/er/and/deeper/vocab.bpe": b"\x00\xff",
    "2_Dense/config.json": b"{}",
    "generation_config.json": b"{}",
    "preprocessor_config.json": b"{}",
}
# What may stay away if the report says why, and may not be lost without a word.
_ODD: dict[str, bytes] = {
    "pytorch_model.bin": b"pickle",
    "tf_model.h5": b"hdf",
    "model.onnx": b"onnx",
    "onnx/model_quantized.onnx": b"onnx",
    "optimizer.pt": b"pickle",
    "training_args.bin": b"pickle",
    "model_head.pkl": b"pickle",
    "voices/a.pt": b"pickle",
    "2_Dense/pytorch_model.bin": b"pickle",
    "weights.gguf": b"GGUF",
    "flax_model.msgpack": b"flax",
    "events.out.tfevents": b"log",
    "README.md": b"# A model\n",
}
_NESTED = ("3_Dense/model.safetensors", "adapter_model.safetensors", "value_head.safetensors")


@dataclass
class Outcome:
    """What came of a folder.

    Attributes:
        faults: in words; none means that everything held.
    """

    name: str
    faults: list[str] = field(default_factory=list)
    what: str = "equal"

    def claim(self, holds: bool, otherwise: str) -> None:
        if not holds:
            self.faults.append(otherwise)


def random_folders(seed: int, n_folders: int) -> Counter[str]:
    """Compress, verify, load and decompress random folders; what came of them.

    Raises:
        AssertionError: a folder did not come out as it went in.
    """
    warnings.simplefilter("ignore", UserWarning)  # of how much stays as it is: such models are made here
    counts, faults = Counter[str](), []
    for number in range(n_folders):
        outcome = one_folder(seed, number)
        counts[f"folders: {outcome.what}"] += 1
        faults += [f"folder {number} ({outcome.name}): {fault}" for fault in outcome.faults]
    assert not faults, f"{len(faults)} faults, the first:\n" + "\n".join(faults[:20])
    return counts


def one_folder(seed: int, number: int) -> Outcome:
    """The folder of this number, tried."""
    generator, root = random.Random(f"{seed} {number}"), WORK / "folders"
    shutil.rmtree(root, ignore_errors=True)
    source, out, dense = root / "source", root / "out", root / "dense"
    model = drawn_model(generator)
    extra = write_folder(generator, source, model)
    outcome, options = Outcome(type(model).__name__), _options(generator)
    report = _compressed(source, out, options, outcome)
    if report is None:
        return outcome
    verification = miracle_hub.verify(out, dense=source)
    outcome.claim(not verification.defects, f"verify finds {verification.defects[:1]}")
    miracle_hub.inspect(out)
    miracle_hub.decompress(out, dense, progress=False)
    _check_size(outcome, report, out)
    _check_files(outcome, report, source, out, dense)
    _check_extra(outcome, extra, dense)
    outcome.what = "equal"
    _check_loading(outcome, out, dense, model, keeps=options["stages"] == 1)
    return outcome


def _compressed(source: Path, out: Path, options: dict[str, Any], outcome: Outcome) -> Any:
    """The report; None where nothing can be coded, or what stays as it is leaves no room for the rest."""
    for bits in (5, 8, 12, 16):
        try:
            return miracle_hub.compress(
                source, out, bits_per_weight=bits, calibrate=None, progress=False, **options
            )
        except BudgetError:
            outcome.what = "no budget for it"
        except SourceError as error:
            if "expected at least one tensor to compress" not in str(error):
                raise
            outcome.what = "nothing large enough to code"
    return None


def drawn_model(generator: random.Random) -> PreTrainedModel:
    """A class of any architecture, at tiny size; those that cannot be made so are passed over."""
    while True:
        try:
            config = tiny_config(CONFIG_MAPPING[generator.choice(sorted(CONFIG_MAPPING))]())
            config.validate()  # as save_pretrained does
            model_class = generator.choice(classes_of(config))
            with torch.device("meta"):
                n_weights = sum(p.numel() for p in model_class(config).parameters())
            if 0 < n_weights <= _MOST_WEIGHTS:
                torch.manual_seed(generator.randrange(1 << 30))
                model: Any = model_class(config)
                return model.eval().to(generator.choice(_DTYPES))
        except Exception:  # whatever sizes that do not suit each other lead to
            continue


def write_folder(generator: random.Random, folder: Path, model: PreTrainedModel) -> dict[str, Tensor]:
    """The folder of a model; the tensors that are in it and no weights."""
    model.save_pretrained(folder)
    extra = _put_tensors(generator, folder)
    for name, data in _drawn(generator, _CARRIED) | _drawn(generator, _ODD):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    for name in generator.sample(_NESTED, generator.randrange(2)):
        (folder / name).parent.mkdir(exist_ok=True)
        save_file({"linear.weight": torch.randn(32, 40)}, folder / name)
    return extra


def _drawn(generator: random.Random, files: dict[str, bytes]) -> set[tuple[str, bytes]]:
    return set(generator.sample(sorted(files.items()), generator.randrange(len(files) // 2)))


def _put_tensors(generator: random.Random, folder: Path) -> dict[str, Tensor]:
    """Add some to the weights; where those are in shards, to the first."""
    path = min(folder.glob("model*.safetensors"))
    kinds = {f"extra.{name}": tensor for name, tensor in _no_weights().items()}
    extra = dict(generator.sample(sorted(kinds.items()), generator.randrange(len(kinds))))
    save_file(load_file(path) | extra, path, metadata={"format": "pt"})
    return extra


def _no_weights() -> dict[str, Tensor]:
    """Tensors that no error may touch, each larger than what stays plain for its size."""
    lower, time = torch.tril(torch.ones(64, 64)), torch.arange(64.0)
    angles = time[:, None] * 10_000.0 ** (-torch.arange(0, 1, 1 / 32))
    return {
        "causal": lower,
        "causal_half": lower.half(),
        "causal_bool": lower.bool(),
        "mask_infinite": torch.zeros(64, 64).masked_fill(lower == 0, -torch.inf),
        "mask_least_half": torch.zeros(64, 64, dtype=torch.half).masked_fill(lower == 0, -65504),
        "mask_least": torch.zeros(64, 64).masked_fill(lower == 0, torch.finfo(torch.float32).min),
        "positions": torch.arange(4096).reshape(64, 64),
        "positions_floating": torch.arange(4096.0).reshape(64, 64),
        "relative": (time[:, None] - time[None]).int(),
        "cos": angles.cos(),
        "sin_bfloat16": angles.sin().bfloat16(),
        "table": torch.linspace(0, 1, 2048).reshape(2, 1024),
        "counter": torch.tensor(7),
    }


def _options(generator: random.Random) -> dict[str, Any]:
    return {
        "window_bits": generator.choice((8, 10)),
        "stages": generator.choice((1, 1, 1, 2)),
        "max_shard_size": generator.choice(("5GB", "5GB", "200KB")),
    }


def _check_size(outcome: Outcome, report: Any, out: Path) -> None:
    n_bytes = sum(path.stat().st_size for path in out.rglob("*.safetensors"))
    outcome.claim(
        report.compressed_bytes == n_bytes, f"{report.compressed_bytes} reported, {n_bytes} written"
    )


def _check_files(outcome: Outcome, report: Any, source: Path, out: Path, dense: Path) -> None:
    """Every file of the source is in both folders, is weights, or is left out with a reason."""
    for path in sorted(path for path in source.rglob("*") if path.is_file()):
        name = path.relative_to(source).as_posix()
        told = report.left_out.get(name)
        if name == "config.json" or (path.suffix == ".safetensors" and told is None):
            continue  # what is in them is compared tensor by tensor
        outcome.claim(not told or name not in _CARRIED, f"{name} is left out: {told}")
        for folder in (out, dense):
            kept = (folder / name).is_file() and (folder / name).read_bytes() == path.read_bytes()
            outcome.claim(kept or bool(told) or name == "README.md", f"{name} is lost in {folder.name}")


def _check_extra(outcome: Outcome, extra: dict[str, Tensor], dense: Path) -> None:
    found = {name: t for path in dense.glob("model*.safetensors") for name, t in load_file(path).items()}
    for name, tensor in extra.items():
        outcome.claim(name in found and _is_same(found[name], tensor), f"{name} is not what it was")


def _check_loading(outcome: Outcome, out: Path, dense: Path, model: PreTrainedModel, keeps: bool) -> None:
    """Bits and dtypes of what from_pretrained gives, of both folders.

    Args:
        keeps: also with layers that stay compressed.
    """
    wanted = _loaded(dense, type(model))
    if isinstance(wanted, Exception):
        outcome.what = "not loaded by transformers, dense or compressed"
    else:
        of_source = _loaded(dense.with_name("source"), type(model))
        assert isinstance(of_source, dict), of_source
        for name in {name for name, _ in model.named_buffers()} & wanted.keys():
            outcome.claim(_is_same(wanted[name], of_source[name]), f"{name}, a buffer, is not what it was")
    for keep_compressed in (False, True) if keeps else (False,):
        found = _loaded(out, type(model), keep_compressed)
        if isinstance(found, Exception) or isinstance(wanted, Exception):
            outcome.claim(isinstance(found, type(wanted)), f"{found!r:.300} instead of {wanted!r:.300}")
            continue
        outcome.claim(
            found.keys() == wanted.keys(), f"other tensors: {sorted(found.keys() ^ wanted.keys())[:3]}"
        )
        for name in found.keys() & wanted.keys():
            outcome.claim(_is_same(found[name], wanted[name]), f"{name} loads as another tensor")


def _loaded(
    folder: Path, model_class: type[PreTrainedModel], keep_compressed: bool = False
) -> dict[str, Tensor] | Exception:
    """What a user's model holds; of layers that stay compressed, made ordinary again."""
    kept = miracle_hub.MiracleConfig(keep_compressed=True)
    options: dict[str, Any] = {"quantization_config": kept} if keep_compressed else {}
    try:
        model = model_class.from_pretrained(folder, **options)
        return (model.dequantize() if keep_compressed else model).state_dict()
    except Exception as error:  # whatever a model raises
        return error


def _is_same(one: Tensor, two: Tensor) -> bool:
    return one.dtype == two.dtype and one.shape == two.shape and torch.equal(_bits(one), _bits(two))


def _bits(tensor: Tensor) -> Tensor:
    """So that NaN equals itself."""
    return tensor.contiguous().view(-1).view(torch.uint8)
