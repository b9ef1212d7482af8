"""A model folder → a folder of payloads, one tensor in memory at a time."""

import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from miracle_hub.code import FORMAT_VERSION, QUANT_METHOD, Code
from miracle_hub.codec.artifact import (
    OutputFile,
    raw_bytes,
    read_config,
    read_quantization,
    write_index,
)
from miracle_hub.codec.plan import (
    EXCLUDED,
    LARGEST_RMS,
    OUT_OF_RANGE,
    Budget,
    TensorPlan,
    lay_out,
    mark_narrowed,
    meet_budget,
    plan_tensor,
    total_bytes,
)
from miracle_hub.codec.rates import Choice, Sample, measure_options, sample_rows
from miracle_hub.codec.source import companion_files, list_tensors, weight_files
from miracle_hub.codec.stages import (
    encode_refinement,
    lay_out_stage,
    refinement_code,
    stage_digests,
    stage_name,
    stem_of,
    write_indices,
)
from miracle_hub.codec.tensor import TORCH_DTYPES, encode_tensor
from miracle_hub.coding.backend import Backend, choose
from miracle_hub.errors import NonFiniteWeightError, OptionError, SourceError
from miracle_hub.files.container import Entry, write_file
from miracle_hub.files.whole import output_folder, refuse_overlap, writing
from miracle_hub.format.payload import decode_header, is_payload
from miracle_hub.options import CompressOptions, budget_bytes, parse_size

CODED, NO_BUDGET = "coded by training", "no budget for it"


@dataclass(frozen=True)
class Report:
    """What a compression did; sizes in bytes, `bits_per_weight` of whole files, `backend` as chosen."""

    dense_bytes: int
    compressed_bytes: int
    n_weights: int
    bits_per_weight: float
    seconds: float
    digest: str
    backend: str


def compress_folder(
    source: Path,
    out: Path,
    options: CompressOptions,
    *,
    card: Callable[[Path, Report], None] | None = None,
    payloads: Mapping[str, bytes] | None = None,
) -> Report:
    """Compress a folder written by `save_pretrained`; see `miracle_hub.compress`.

    With `payloads`, of tensors that are coded already, no budget means that all others stay plain.
    """
    started, excluded = time.monotonic(), options.modules_to_not_convert or []
    window_bits, seed, stages = options.window_bits, options.seed, options.stages
    shard_bytes = parse_size(options.max_shard_size, "max_shard_size")
    if not options.has_budget and not payloads:
        raise OptionError("expected either bits_per_weight or size, found neither; give one of them")
    chosen, weights = choose(options.backend), _source_files(source, out)
    with output_folder(out, options.overwrite) as temporary:
        copied = _copy_companions(source, temporary, weights)
        plans = _plan(weights, options.rotation, excluded, payloads or {})
        n_weights = sum(plan.source.n_weights for plan in plans.values()) + copied.n_weights
        stem = "model" if stages == 1 else stem_of(1)
        target = _target_bytes(options, n_weights)
        budget = None if target is None else Budget(target, copied.n_bytes, n_weights, shard_bytes, stem)
        choices, refined = _choices(plans, budget, window_bits, seed, chosen, stages)
        files = [lay_out(plans, choices, shard_bytes, stem), *refined]
        writer = _Writer(temporary, plans, choices, refinement_code(window_bits, seed), chosen)
        digests = writer.write(files, options.progress)
        facts = (time.monotonic() - started, digests[-1], chosen.name)
        report = _report(weights, files, copied, n_weights, facts)
        _write_config(source, temporary, report, _names(excluded, plans), seed, _main_dtype(plans), digests)
        _write_card(card, temporary, report)
    return report


def _write_card(card: Callable[[Path, Report], None] | None, folder: Path, report: Report) -> None:
    if card is not None:
        with writing(folder / "README.md"):
            card(folder, report)


@dataclass(frozen=True)
class _Copied:
    """safetensors files in subfolders, copied as they are and counted."""

    n_bytes: int
    n_weights: int


def _report(
    weights: list[Path],
    files: list[list[OutputFile]],
    copied: _Copied,
    n_weights: int,
    facts: tuple[float, str, str],
) -> Report:
    dense_bytes = sum(path.stat().st_size for path in weights) + copied.n_bytes
    n_bytes = sum(map(total_bytes, files)) + copied.n_bytes
    return Report(dense_bytes, n_bytes, n_weights, 8 * n_bytes / n_weights, *facts)


def _target_bytes(options: CompressOptions, n_weights: int) -> int | None:
    """Bytes of the whole files; None where no budget is given."""
    if not options.has_budget:
        return None
    return budget_bytes(options.bits_per_weight, options.size, n_weights)


def _names(excluded: list[str] | str, plans: dict[str, TensorPlan]) -> list[str]:
    """What config.json says: a list as it was given, or the names that a regular expression matches."""
    if isinstance(excluded, str):
        return [name for name, plan in plans.items() if plan.reason == EXCLUDED]
    return list(excluded)


def _source_files(source: Path, out: Path) -> list[Path]:
    """The weight files of a dense model that writing `out` does not touch."""
    weights = weight_files(source)
    refuse_overlap(source, out)
    method = read_quantization(source).get("quant_method")
    if method is not None:
        raise SourceError(
            f"{source / 'config.json'}: expected a dense model, found one quantized with {method!r}; "
            "compress the model it was made from"
        )
    return weights


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


def _plan(
    weights: list[Path], rotation: int, excluded: list[str] | str, payloads: Mapping[str, bytes]
) -> dict[str, TensorPlan]:
    """The plan of every tensor of the source.

    Raises:
        SourceError: a tensor looks like a payload, or a payload is that of no tensor.
    """
    plans = {}
    for tensor in list_tensors(weights):
        if tensor.dtype == "U8" and len(tensor.shape) == 1 and is_payload(tensor.head(4).numpy().tobytes()):
            raise SourceError(
                f"{tensor.path}: {tensor.name}: expected plain numbers, found bytes that begin like a "
                "compressed tensor (MRCL), which readers would take for one; decompress the source first, "
                "or store the tensor in another dtype or shape"
            )
        if tensor.name in payloads:
            plans[tensor.name] = TensorPlan(tensor, CODED, payload=payloads[tensor.name])
        else:
            plans[tensor.name] = mark_narrowed(plan_tensor(tensor, rotation, excluded))
    if missing := sorted(set(payloads) - set(plans)):
        raise SourceError(
            f"payloads: expected those of tensors of the source, found one of {missing[0]!r}, which it has "
            f"not; it has {', '.join(sorted(plans)[:4])}, …"
        )
    return plans


def _left_plain(plan: TensorPlan) -> TensorPlan:
    return plan if plan.reason else mark_narrowed(replace(plan, reason=NO_BUDGET))


def _survey(plans: dict[str, TensorPlan], backend: Backend) -> list[Sample]:
    """Rows of every tensor to be coded, each read once; those that no scale suits become plain."""
    coded = [plan for plan in plans.values() if not plan.reason]
    samples = []
    for plan in coded:
        weights = _load_finite(plan)
        sample = sample_rows(plan.source.name, weights, plan.columns, plan.rotation, len(coded), backend)
        if 1 / LARGEST_RMS <= sample.rms <= LARGEST_RMS or not bool(weights.any()):
            samples.append(sample)
        else:
            plans[plan.source.name] = replace(plan, reason=OUT_OF_RANGE)
    if not samples:
        found = "; ".join(sorted({plan.reason for plan in plans.values()})) or "no tensors at all"
        raise SourceError(
            f"expected at least one tensor to compress, found none ({found}); keep this model as it is"
        )
    return samples


def _choices(
    plans: dict[str, TensorPlan],
    budget: Budget | None,
    window_bits: int,
    seed: int,
    backend: Backend,
    stages: int,
) -> tuple[dict[str, Choice], list[list[OutputFile]]]:
    """How every tensor that is left to code is coded, without a budget none, and the stages above."""
    if budget is None:
        plans.update({name: _left_plain(plan) for name, plan in plans.items()})
        return {}, []
    samples = _survey(plans, backend)
    measure_options(samples, window_bits, seed, backend)
    code = refinement_code(window_bits, seed)
    refined = [lay_out_stage(plans, code, n, budget.max_shard_bytes) for n in range(2, stages + 1)]
    other_bytes = budget.other_bytes + sum(map(total_bytes, refined))
    return meet_budget(plans, samples, replace(budget, other_bytes=other_bytes)), refined


def _load_finite(plan: TensorPlan) -> Tensor:
    weights = plan.source.load()
    finite = torch.isfinite(weights.float()).flatten()  # in float32, in which it would be decoded
    if not bool(finite.all()):
        at = int(finite.int().argmin())
        raise NonFiniteWeightError(
            f"{plan.source.name}: expected finite weights, found {weights.flatten()[at].item()} at "
            f"position {at} ({plan.source.path}); repair the model, or leave the tensor out with "
            "modules_to_not_convert"
        )
    return weights


@dataclass
class _Writer:
    """Encodes and writes every tensor, one in memory at a time."""

    folder: Path
    plans: dict[str, TensorPlan]
    choices: dict[str, Choice]
    refinement: Code
    backend: Backend

    def write(self, stages: list[list[OutputFile]], progress: bool) -> list[str]:
        """The files of all stages; returns the digest of the first n stages, for every n."""
        n_weights = sum(plan.source.n_weights for plan in self.plans.values() if not plan.reason)
        total, off = n_weights * len(stages), not progress
        with tqdm(total=total, unit="weights", unit_scale=True, desc="compress", disable=off) as bar:
            digests = [self._write_stage(number, files, bar) for number, files in enumerate(stages, 1)]
        self._write_indices(stages)
        return stage_digests(digests)

    def _write_stage(self, number: int, files: list[OutputFile], bar: tqdm) -> dict[str, int]:
        """The files of one stage; returns the digests of its payloads."""
        plans = {stage_name(name, number): plan for name, plan in self.plans.items()}
        digests: dict[str, int] = {}

        def data(entry: Entry) -> bytes:
            raw, is_payload = self._data(plans[entry.name], number)
            if is_payload:
                digests[entry.name] = decode_header(raw, entry.name)[0].digest
                bar.update(plans[entry.name].source.n_weights)
            return raw

        for file in files:
            write_file(self.folder / file.name, file.entries, file.metadata, data)
        return digests

    def _data(self, plan: TensorPlan, stage: int) -> tuple[bytes, bool]:
        """What the file holds of a tensor, and whether that is a payload."""
        source = plan.source
        if stage > 1:
            return encode_refinement(plan, self.refinement, self.folder, stage, self.backend), True
        if plan.payload is not None:
            return plan.payload, True
        if plan.reason:
            return raw_bytes(source.load().half() if plan.narrowed else source.load()), False
        segments = self.choices[source.name].segments()
        weights = source.load()
        return encode_tensor(weights, segments, plan.rotation, where=source.name, backend=self.backend), True

    def _write_indices(self, stages: list[list[OutputFile]]) -> None:
        if len(stages) > 1:
            write_indices(self.folder, stages)
        elif len(stages[0]) > 1:
            write_index(self.folder, stages[0])


def _main_dtype(plans: dict[str, TensorPlan]) -> str:
    """The floating dtype that most of the source's weights have, as transformers spells it."""
    counts: dict[str, int] = {}
    for plan in plans.values():
        if plan.source.dtype in TORCH_DTYPES:
            counts[plan.source.dtype] = counts.get(plan.source.dtype, 0) + plan.source.n_weights
    return str(TORCH_DTYPES[max(counts, key=lambda dtype: counts[dtype])]).removeprefix("torch.")


def _write_config(
    source: Path,
    target: Path,
    report: Report,
    excluded: list[str],
    seed: int,
    dtype: str,
    digests: list[str],
) -> None:
    """config.json with the quantization_config that makes transformers call the plug-in."""
    config = read_config(source)
    if not config:
        return
    if config.get("dtype", config.get("torch_dtype")) is None:
        # transformers would otherwise take the dtype of the first plain tensor, which may be narrowed.
        config["dtype"] = dtype
    config["quantization_config"] = {
        "quant_method": QUANT_METHOD,
        "format_version": 1 if len(digests) == 1 else FORMAT_VERSION,
        "bits_per_weight": round(report.bits_per_weight, 4),
        "seed": seed,
        "digest": report.digest,
        "modules_to_not_convert": excluded or None,
    }
    if len(digests) > 1:
        # An attribute of the config, so that from_pretrained(..., stages=1) changes it.
        config["stages"] = len(digests)
        config["quantization_config"]["stage_digests"] = digests
    with writing(target / "config.json"):
        (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")
