"""A model folder → a folder of payloads, one tensor in memory at a time."""

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from miracle_hub.codec.artifact import (
    DEFAULT_SHARD_SIZE,
    OutputFile,
    parse_size,
    raw_bytes,
    read_config,
    repository_digest,
    write_index,
)
from miracle_hub.codec.folder import output_folder
from miracle_hub.codec.plan import (
    TensorPlan,
    lay_out,
    mark_narrowed,
    meet_budget,
    plan_tensor,
    total_bytes,
)
from miracle_hub.codec.rates import Choice, measure_options, sample_rows
from miracle_hub.codec.source import companion_files, list_tensors, weight_files
from miracle_hub.codec.tensor import encode_tensor
from miracle_hub.config import FORMAT_VERSION, QUANT_METHOD
from miracle_hub.errors import BudgetError, NonFiniteWeightError, OptionError, SourceError
from miracle_hub.format.container import Entry, write_file, writing
from miracle_hub.format.payload import decode_header

# Windows of 14 bits: on two cores 1 M weights/s at 2 bits and 4 % more squared error than windows
# of 16 bits, which take four times as long (benchmarks/rate_distortion.py).
DEFAULT_WINDOW_BITS = 14


@dataclass(frozen=True)
class Report:
    """What a compression did; sizes in bytes, `bits_per_weight` of whole files."""

    dense_bytes: int
    compressed_bytes: int
    n_weights: int
    bits_per_weight: float
    seconds: float
    digest: str


def compress_folder(
    source: Path,
    out: Path,
    *,
    bits_per_weight: float | None = None,
    size: str | int | None = None,
    window_bits: int = DEFAULT_WINDOW_BITS,
    rotation: int | None = None,
    seed: int = 0,
    modules_to_not_convert: list[str] | None = None,
    max_shard_size: str | int = DEFAULT_SHARD_SIZE,
    overwrite: bool = False,
    card: Callable[[Path, Report], None] | None = None,
    progress: bool = True,
) -> Report:
    """Compress a folder written by `save_pretrained`; see `miracle_hub.compress`."""
    excluded = list(modules_to_not_convert or [])
    started = time.monotonic()
    weights = weight_files(source)
    _check_source(source, out)
    if (bits_per_weight is None) == (size is None):
        raise OptionError("give either bits_per_weight or size, not both and not neither")
    with output_folder(out, overwrite) as temporary:
        copied = _copy_companions(source, temporary, weights)
        plans = _plan(weights, rotation, excluded)
        n_weights = sum(plan.source.n_weights for plan in plans.values()) + copied.n_weights
        target = parse_size(size) if size is not None else _bytes_of(bits_per_weight, n_weights)
        choices, files = _choose(plans, target - copied.n_bytes, window_bits, seed, max_shard_size)
        digest = _write(temporary, files, plans, choices, progress)
        report = Report(
            dense_bytes=sum(path.stat().st_size for path in weights) + copied.n_bytes,
            compressed_bytes=sum(p.stat().st_size for p in temporary.rglob("*.safetensors")),
            n_weights=n_weights,
            bits_per_weight=8 * (total_bytes(files) + copied.n_bytes) / n_weights,
            seconds=time.monotonic() - started,
            digest=digest,
        )
        _write_config(source, temporary, report, excluded, seed)
        if card is not None:
            card(temporary, report)
    return report


@dataclass(frozen=True)
class _Copied:
    """safetensors files in subfolders, copied as they are and counted."""

    n_bytes: int
    n_weights: int


def _bytes_of(bits_per_weight: float | None, n_weights: int) -> int:
    if bits_per_weight is None or not 0 < bits_per_weight < 64:
        raise BudgetError(f"bits_per_weight: expected a number above 0 and below 64, found {bits_per_weight}")
    return int(bits_per_weight * n_weights / 8)


def _check_source(source: Path, out: Path) -> None:
    if out.resolve() == source.resolve() or source.resolve() in out.resolve().parents:
        raise OptionError(f"{out}: the output must not be the source folder or inside it")
    config = read_config(source)
    method = config.get("quantization_config", {}).get("quant_method")
    if method is not None:
        raise SourceError(
            f"{source / 'config.json'}: expected a dense model, found one quantized with {method!r}; "
            "compress the model it was made from"
        )


def _copy_companions(source: Path, target: Path, weights: list[Path]) -> _Copied:
    nested = []
    for relative in companion_files(source, weights):
        with writing(target / relative):
            (target / relative).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / relative, target / relative)
        if relative.suffix == ".safetensors":
            nested.append(target / relative)
    n_weights = sum(t.n_weights for path in nested for t in list_tensors([path]))
    return _Copied(sum(path.stat().st_size for path in nested), n_weights)


def _plan(weights: list[Path], rotation: int | None, excluded: list[str]) -> dict[str, TensorPlan]:
    plans = [plan_tensor(tensor, rotation, excluded) for tensor in list_tensors(weights)]
    if all(plan.reason for plan in plans):
        raise SourceError(
            f"{weights[0].parent}: no tensor is large enough to compress; the largest has "
            f"{max((plan.source.n_weights for plan in plans), default=0)} weights"
        )
    return {plan.source.name: mark_narrowed(plan) for plan in plans}


def _choose(
    plans: dict[str, TensorPlan],
    target_bytes: int,
    window_bits: int,
    seed: int,
    max_shard_size: str | int,
) -> tuple[dict[str, Choice], list[OutputFile]]:
    """Measure every coded tensor's curve, then meet the budget."""
    coded = [plan for plan in plans.values() if not plan.reason]
    samples = []
    for plan in coded:
        weights = _load_finite(plan)
        samples.append(sample_rows(plan.source.name, weights, plan.columns, plan.rotation, len(coded)))
    measure_options(samples, window_bits, seed)
    shard_bytes = parse_size(max_shard_size, "max_shard_size")
    choices = meet_budget(plans, samples, target_bytes, shard_bytes)
    return choices, lay_out(plans, choices, shard_bytes)


def _load_finite(plan: TensorPlan) -> Tensor:
    weights = plan.source.load()
    finite = torch.isfinite(weights.float()).flatten()
    if not bool(finite.all()):
        at = int(finite.int().argmin())
        raise NonFiniteWeightError(
            f"{plan.source.name}: expected finite weights, found {weights.flatten()[at].item()} at "
            f"position {at} ({plan.source.path}); repair the model, or leave the tensor out with "
            "modules_to_not_convert"
        )
    return weights


def _write(
    folder: Path,
    files: list[OutputFile],
    plans: dict[str, TensorPlan],
    choices: dict[str, Choice],
    progress: bool,
) -> str:
    """Encode and write every tensor; returns the digest of the repository."""
    digests: dict[str, int] = {}
    n_weights = sum(plan.source.n_weights for plan in plans.values() if not plan.reason)
    with tqdm(total=n_weights, unit="weights", unit_scale=True, desc="compress", disable=not progress) as bar:

        def data(entry: Entry) -> bytes:
            plan = plans[entry.name]
            if plan.narrowed:
                return raw_bytes(plan.source.load().half())
            if plan.reason:
                return raw_bytes(plan.source.load())
            segments = choices[entry.name].segments()
            payload = encode_tensor(_load_finite(plan), segments, plan.rotation, where=entry.name)
            digests[entry.name] = decode_header(payload, entry.name)[0].digest
            bar.update(plan.source.n_weights)
            return payload

        for file in files:
            write_file(folder / file.name, file.entries, file.metadata, data)
    if len(files) > 1:
        write_index(folder, files)
    return repository_digest(digests)


def _write_config(source: Path, target: Path, report: Report, excluded: list[str], seed: int) -> None:
    """config.json with the quantization_config that makes transformers call the plug-in."""
    config = read_config(source)
    if not config:
        return
    config["quantization_config"] = {
        "quant_method": QUANT_METHOD,
        "format_version": FORMAT_VERSION,
        "bits_per_weight": round(report.bits_per_weight, 4),
        "seed": seed,
        "digest": report.digest,
        "modules_to_not_convert": excluded or None,
    }
    with writing(target / "config.json"):
        (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")
