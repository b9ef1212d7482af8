"""An adapter of PEFT → a smaller one, of the same names; the factors of LoRA are balanced before.

FORMAT.md, "Adapter". All else is as of any other tensors without a config.json.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from miracle_hub.codec.compress import compress_folder
from miracle_hub.codec.config import read_config
from miracle_hub.codec.factors import Pair, are_factors, balanced, squared, squared_distance
from miracle_hub.codec.naming import ADAPTER, ADAPTER_CONFIG
from miracle_hub.codec.plan import Coded, Plan
from miracle_hub.codec.report import Report
from miracle_hub.codec.repository import open_repository
from miracle_hub.codec.source import SourceTensor
from miracle_hub.errors import OptionError
from miracle_hub.options import CompressOptions

_OF_A = re.compile(r"(.*\blora_(?:embedding_)?)A(\..*)?")
# Of LoraConfig, peft 0.21: what says where factors are, how they began, how their product is scaled, or what
# is beside it. With others (KaSA's diagonal, block-diagonal factors, several experts in one) more than the
# product may count.
_OF_THE_PRODUCT = {
    *("peft_type", "peft_version", "task_type", "auto_mapping", "base_model_name_or_path", "revision"),
    *("inference_mode", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "lora_dropout"),
    *("target_modules", "exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern"),
    *("layer_replication", "trainable_token_indices", "fan_in_fan_out", "bias", "lora_bias", "use_dora"),
    *("use_qalora", "qalora_group_size", "megatron_core", "init_lora_weights", "loftq_config"),
    *("eva_config", "corda_config", "lora_ga_config"),
}


def compress_adapter(
    source: Path,
    out: Path,
    options: CompressOptions,
    *,
    card: Callable[[Path, Report], None] | None = None,
    not_downloaded: Mapping[str, str] | None = None,
) -> Report:
    """Compress a folder with adapter_config.json and adapter_model.safetensors; no model is run.

    Args:
        card, not_downloaded: see `compress_folder`.

    Raises:
        SourceError: and its subclasses: the adapter cannot be read.
        BudgetError: the size cannot be met.
        OptionError: it is one of models alone.
    """
    _refuse_options_of_models(options)
    config = read_config(source, ADAPTER_CONFIG)
    with TemporaryDirectory(prefix="miracle-") as folder:
        balancing = Balancing(config, Path(folder) / ADAPTER)
        return compress_folder(
            source, out, options, card=card, arranged=balancing.arrange, judged=balancing.judge,
            not_downloaded=not_downloaded,
        )  # fmt: skip


def _refuse_options_of_models(options: CompressOptions) -> None:
    """
    Raises:
        OptionError: there are stages, or a base.
    """
    if options.stages != 1:
        raise OptionError(
            f"stages: expected 1 for an adapter, which PEFT reads from one file, found {options.stages}; "
            "leave it out"
        )
    if options.base is not None:
        raise OptionError(
            f"base: expected none for an adapter, which is added to its own base, found {options.base}; "
            "leave it out, or merge the adapter into its model (merge_and_unload, save_pretrained), and "
            "compress that with this base"
        )


class Balancing:
    """Pairs of factors, which become others of the same product before they are coded."""

    def __init__(self, config: Mapping[str, Any], path: Path) -> None:
        """
        Args:
            config: adapter_config.json.
            path: of a file for the new factors, while they are coded.
        """
        self.why_not, self.path = why_not_balanced(config), path
        self.pairs: list[tuple[SourceTensor, SourceTensor]] = []

    def arrange(self, plans: dict[str, Plan]) -> dict[str, float]:
        """Exchange the sources of factors that are to be coded; returns what their errors are worth: the mean
        square of their product, beside that of the others.
        """
        found, powers = dict[str, Tensor](), dict[str, float]()
        for b_plan, a_plan in () if self.why_not else list(_pairs(plans)):
            sources = b_plan.source, a_plan.source
            b, a = (source.load() for source in sources)
            power, pair = squared(b, a), balanced(b, a)
            if power == 0 or not all(bool(torch.isfinite(factor).all()) for factor in pair):
                continue  # nothing to balance, or float16 is too narrow for the result
            self.pairs.append(sources)
            for plan, factor in zip((b_plan, a_plan), pair, strict=True):
                name = plan.source.name
                found[name] = factor.contiguous()
                powers[name] = power / (b.shape[0] * a[0].numel())
                plans[name] = replace(plan, source=replace(plan.source, path=self.path))
        save_file(found, self.path)
        mean = math.exp(sum(map(math.log, powers.values())) / max(1, len(powers)))
        return {name: power / mean for name, power in powers.items()}

    def judge(self, folder: Path, report: Report) -> Report:
        """The report with what became of the products.

        Args:
            folder: with the compressed adapter.
        """
        note = f"factors of LoRA stay as they are, not balanced: {self.why_not}"
        if self.pairs:
            error = f"{_error(self.pairs, folder):.4g}"
            note = f"{len(self.pairs)} pairs of factors, balanced; of their products, relative error² {error}"
        return replace(report, notes=(*report.notes, note) if self.pairs or self.why_not else report.notes)


def _error(pairs: list[tuple[SourceTensor, SourceTensor]], folder: Path) -> float:
    """Σ ‖decoded B·A - B·A‖² / Σ ‖B·A‖²."""
    decoded, error, power = {t.name: t for t in open_repository(folder).tensors}, 0.0, 0.0
    for b, a in pairs:
        pair: Pair = (b.load(), a.load())
        error += squared_distance(pair, (decoded[b.name].load().cpu(), decoded[a.name].load().cpu()))
        power += squared(*pair)
    return error / power


def _pairs(plans: Mapping[str, Plan]) -> Iterator[tuple[Coded, Coded]]:
    """B and A of every pair, both to be coded."""
    for name, a in plans.items():
        match = _OF_A.fullmatch(name)
        b = plans.get(f"{match[1]}B{match[2] or ''}") if match else None
        if isinstance(a, Coded) and isinstance(b, Coded) and are_factors(b.source.shape, a.source.shape):
            yield b, a


def why_not_balanced(config: Mapping[str, Any]) -> str:
    """Why factors of an adapter stay as they are; empty if nothing but their products counts.

    Args:
        config: adapter_config.json.
    """
    if (kind := config.get("peft_type")) != "LORA":
        return f"peft_type {kind}"
    others = sorted(name for name, value in config.items() if value and name not in _OF_THE_PRODUCT)
    return f"adapter_config.json has {', '.join(others)}" if others else ""
