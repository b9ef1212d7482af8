"""The dense model of a folder, as it can be run: by the class that config.json names, without its code."""

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedModel

from miracle_hub.codec.naming import CONFIG
from miracle_hub.errors import CalibrationError

_POOLER = "pooler."  # which encoders have that were trained without one; nothing else depends on it


def load_dense(folder: Path) -> nn.Module:
    """The model of a folder in float32 and evaluation mode, on the CPU.

    Its class is the first of config.json's `architectures`, or, where it names none, that of `AutoModel`. An
    encoder without weights for a pooler has none.

    Raises:
        CalibrationError: there is no config.json, the class is unknown or code of the repository, a package
            is missing, or weights and class do not belong together.
    """
    config = _config(folder)
    cls = _class(folder, config)
    model, found = _loaded(folder, cls, config)
    if found["missing_keys"] and all(name.startswith(_POOLER) for name in found["missing_keys"]):
        model, found = _loaded(folder, cls, config, add_pooling_layer=False)
    _require_whole(folder, model, found)
    return model.eval()


def _loaded(folder: Path, cls: Any, config: Any, **options: Any) -> tuple[nn.Module, dict[str, Any]]:
    """
    Raises:
        CalibrationError: it cannot be loaded.
    """
    try:
        return cls.from_pretrained(
            folder, config=config, dtype=torch.float32, output_loading_info=True, local_files_only=True,
            trust_remote_code=False, use_safetensors=True, **options,
        )  # fmt: skip
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a stranger's config may break a stranger's class in any way
        raise _refusal(folder, cls.__name__, error) from error


def _config(folder: Path) -> Any:
    """
    Raises:
        CalibrationError: there is none that transformers knows.
    """
    if not (folder / CONFIG).is_file():
        raise CalibrationError(
            f"{folder}: expected a model that can be run, found no {CONFIG}, which names its class; save "
            "it with save_pretrained, or compress without calibration (--calibrate none)"
        )
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # a stranger's config may break a class in any way
        raise _refusal(folder, "AutoConfig", error) from error


def _class(folder: Path, config: Any) -> Any:
    """
    Raises:
        CalibrationError: transformers has no such class.
    """
    stated = json.loads((folder / CONFIG).read_text(encoding="utf-8")).get("architectures")
    name = stated[0] if isinstance(stated, list) and stated else None
    if name is None:
        return AutoModel
    cls = getattr(transformers, name, None) if isinstance(name, str) else None
    if not (isinstance(cls, type) and issubclass(cls, PreTrainedModel)):
        own = ", whose code in the repository is never run" if hasattr(config, "auto_map") else ""
        raise CalibrationError(
            f"{folder / CONFIG}: expected a class of transformers {transformers.__version__}, found {name!r}"
            f"{own}; upgrade transformers, or compress without calibration (--calibrate none)"
        )
    return cls


def _refusal(folder: Path, name: str, error: Exception) -> CalibrationError:
    said = " ".join(str(error).split())[:200]
    return CalibrationError(
        f"{folder}: expected a model that {name} loads without code of its repository, found "
        f"{type(error).__name__}: {said}; install what it needs, or compress without calibration "
        "(--calibrate none)"
    )


def _require_whole(folder: Path, model: nn.Module, found: dict[str, Any]) -> None:
    """
    Raises:
        CalibrationError: the class has tensors that the files lack, or the files some that it does not know.
    """
    buffers = {name for name, _ in model.named_buffers()}  # which older versions saved
    missing = sorted(found["missing_keys"])
    unknown = sorted(set(found["unexpected_keys"]) - buffers)
    misfit = sorted(str(key) for key in found.get("mismatched_keys", ()))
    for names, what in ((missing, "without weights"), (unknown, "left over"), (misfit, "of another shape")):
        if names:
            raise CalibrationError(
                f"{folder}: expected exactly the tensors of {type(model).__name__}, which config.json names, "
                f"found {len(names)} {what} (as {names[0]}); name the class that the weights were trained "
                "with in config.json, or compress without calibration (--calibrate none)"
            )
