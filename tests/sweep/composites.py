"""Composite models by their parts: from the compressed folder as from the decompressed one, bit for bit."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import miracle_hub
from miracle_hub.errors import BudgetError

from .tiny import classes_of, parts, tiny_config, tiny_model

_AUTO = (AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM)
_SIZES = ("size", "layers", "heads", "dim", "depth")
_RATES = (7, 8, 9, 6, 5, 11, 14, 17, 22, 27)


@dataclass
class Result:
    """What came of one composite.

    Attributes:
        reason: why it could not be built; empty if it was.
        loaded: classes that both folders were loaded with.
        refused: classes that neither of them can be loaded with.
        differences: of each class for which the two differ.
    """

    name: str
    reason: str = ""
    loaded: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    differences: dict[str, str] = field(default_factory=dict)


def composites() -> list[str]:
    """Every model type of transformers whose config has parts."""
    names = []
    for name in sorted(CONFIG_MAPPING.keys()):
        try:
            names += [name] if CONFIG_MAPPING[name].sub_configs else []
        except ImportError:
            continue
    return names


def compare(name: str, folder: Path, *, heads: bool = True) -> Result:
    """Save a tiny model, compress and decompress it, and load both with the classes of the whole and of its
    parts.

    Args:
        heads: with all of them; else without those that put a head on another.
    """
    result = Result(name)
    try:
        config = tiny_config(CONFIG_MAPPING[name]())
        model = tiny_model(config)
        model.save_pretrained(folder / "source")
    except Exception as error:
        result.reason = f"{type(error).__name__}: {str(error)[:200]}"
        return result
    _compress(folder)
    miracle_hub.decompress(folder / "out", folder / "dense", progress=False)
    source, dense = (json.loads((folder / f / "config.json").read_text()) for f in ("source", "dense"))
    if source != dense:
        result.differences["config.json"] = "the decompressed one is not the source's"
    wanted = [c for c in loaders(config, folder / "dense") if heads or "For" not in c.__name__ or c in _AUTO]
    for number, loader in enumerate(wanted):
        # Every second one in another dtype: each class by itself takes long enough.
        _compare(loader, folder, result, {"dtype": torch.bfloat16} if number % 2 else {})
    return result


def _compress(folder: Path) -> None:
    """At the first rate that its matrices allow: what is not coded has 16 bits or more."""
    for rate in _RATES:
        try:
            options: dict[str, Any] = {
                "window_bits": 8,
                "calibrate": None,
                "progress": False,
                "overwrite": True,
            }
            miracle_hub.compress(folder / "source", folder / "out", bits_per_weight=rate, **options)
            return
        except BudgetError:
            if rate == _RATES[-1]:
                raise


def loaders(config: PretrainedConfig, folder: Path) -> Iterator[Any]:
    """Classes to load a composite and its parts with: those whose config transformers finds in the folder's.

    Of parts below parts it often does not, and makes a random model of the default size instead.
    """
    yield from _AUTO
    seen = set()
    for part in (config, *parts(config)):
        if type(part) not in seen and _is_found(part, folder):
            seen.add(type(part))
            yield from classes_of(part)


def _is_found(part: PretrainedConfig, folder: Path) -> bool:
    found = type(part).from_pretrained(folder).to_dict()
    expected = part.to_dict()
    return all(found.get(n) == v for n, v in expected.items() if isinstance(v, int) and n.endswith(_SIZES))


def _compare(loader: Any, folder: Path, result: Result, arguments: dict[str, Any]) -> None:
    name = loader.__name__
    dense, ours = _load(loader, folder / "dense", arguments), _load(loader, folder / "out", arguments)
    if isinstance(dense, Exception) and type(dense) is type(ours):
        result.refused.append(name)
    elif isinstance(dense, Exception) or isinstance(ours, Exception):
        result.differences[name] = f"{arguments}: dense {_text(dense)}, compressed {_text(ours)}"
    elif found := difference(ours, dense):
        result.differences[name] = f"{arguments}: {found}"
    else:
        result.loaded.append(name)


def _load(loader: Any, folder: Path, arguments: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    try:
        return loader.from_pretrained(folder, output_loading_info=True, **arguments)
    except Exception as error:
        return error


def _text(outcome: Any) -> str:
    if isinstance(outcome, Exception):
        return f"{type(outcome).__name__}: {str(outcome)[:200]}"
    return "loads"


def difference(ours: tuple[Any, dict], dense: tuple[Any, dict]) -> str:
    """What of two loads differs; empty if nothing does. Weights that the checkpoint lacks are random."""
    if ours[1] != dense[1]:
        return f"loading info {ours[1]} and {dense[1]}"[:400]
    if ours[0].dtype != dense[0].dtype or ours[0].config.dtype != dense[0].config.dtype:
        return f"dtype {ours[0].dtype}, dense {dense[0].dtype}"
    if fields := _unequal_fields(ours[0].config.to_dict(), dense[0].config.to_dict()):
        return f"config: {fields}"
    new = set(dense[1]["missing_keys"]) | {name for name, *_ in dense[1]["mismatched_keys"]}
    return next(filter(None, _unequal(ours[0].state_dict(), dense[0].state_dict(), new)), "")


def _unequal_fields(ours: dict[str, Any], dense: dict[str, Any]) -> list[str]:
    names = (ours.keys() | dense.keys()) - {"_name_or_path"}
    return [name for name in sorted(names) if ours.get(name) != dense.get(name)]


def _unequal(ours: dict[str, Tensor], dense: dict[str, Tensor], new: set[str]) -> Iterator[str]:
    if ours.keys() != dense.keys():
        yield f"names {sorted(ours.keys() ^ dense.keys())[:3]}"
        return
    for name, tensor in dense.items():
        if name in new or not isinstance(tensor, Tensor):
            continue
        if ours[name].dtype != tensor.dtype:
            yield f"{name}: {ours[name].dtype}, dense {tensor.dtype}"
        elif not torch.equal(ours[name], tensor):
            yield f"{name}: values"
