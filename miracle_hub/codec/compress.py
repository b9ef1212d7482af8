"""A model folder → a repository of payloads, one tensor in memory at a time."""

import time
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from miracle_hub.codec.budget import Budget, meet_budget
from miracle_hub.codec.config import read_quantization, write_config
from miracle_hub.codec.jobs import Job, refining
from miracle_hub.codec.naming import CARD, CONFIG, WEIGHTS_ENDING, stem_of
from miracle_hub.codec.payloads import Request
from miracle_hub.codec.plan import Coded, Plain, Plan, Why, lay_out, narrowed, plan_all
from miracle_hub.codec.report import Report
from miracle_hub.codec.repository import OutputFile, total_bytes
from miracle_hub.codec.source import copy_companions, list_tensors, weight_files
from miracle_hub.codec.stages import refined_files, refinement
from miracle_hub.codec.survey import survey
from miracle_hub.codec.writer import Writer
from miracle_hub.coding.backend import Backend, choose
from miracle_hub.errors import SourceError
from miracle_hub.files.whole import output_folder, refuse_overlap, writing
from miracle_hub.options import CompressOptions, budget_bytes, parse_size


def compress_folder(
    source: Path,
    out: Path,
    options: CompressOptions,
    *,
    card: Callable[[Path, Report], None] | None = None,
    coded: Mapping[str, bytes] | None = None,
    half: Set[str] | None = None,
) -> Report:
    """Compress a folder written by `save_pretrained`; see `miracle_hub.compress`.

    Args:
        card: writes README.md of what was compressed.
        coded: payloads of tensors that are coded already; no budget then means that all others stay plain.
        half: names of the vectors to store in 16 bits; None means that their values decide.
    """
    started = time.monotonic()
    if not coded:
        options.require_budget()
    backend, weights = choose(options.backend), _source_files(source, out)
    with output_folder(out, options.overwrite) as temporary:
        copied = _copy_and_count(source, temporary, weights)
        plans = plan_all(weights, options.modules_to_not_convert or [], coded or {}, half)
        n_weights = sum(plan.source.n_weights for plan in plans.values()) + copied.n_weights
        stages, jobs = _decide(plans, options, copied.n_bytes, n_weights, backend, half)
        written = Writer(temporary, plans, backend).write(stages, jobs, options.progress)
        n_bytes = sum(map(total_bytes, stages)) + copied.n_bytes
        report = Report(
            dense_bytes=sum(path.stat().st_size for path in weights) + copied.n_bytes,
            compressed_bytes=n_bytes,
            n_weights=n_weights,
            bits_per_weight=8 * n_bytes / n_weights,
            seconds=time.monotonic() - started,
            digest=written.digests[-1],
            backend=backend.name,
            plain={n: p.why.text(p.source.dtype) for n, p in plans.items() if isinstance(p, Plain)},
        )
        facts, tensors = _facts(report, options, plans), [plan.source for plan in plans.values()]
        write_config(source, temporary, facts, tensors, written.digests, written.guards)
        _write_card(card, temporary, report)
    return report


def _write_card(card: Callable[[Path, Report], None] | None, folder: Path, report: Report) -> None:
    if card is not None:
        with writing(folder / CARD):
            card(folder, report)


def _facts(report: Report, options: CompressOptions, plans: Mapping[str, Plan]) -> dict[str, Any]:
    """What config.json says of a compression, for readers."""
    excluded = options.modules_to_not_convert
    if isinstance(excluded, str):  # the names that a regular expression matched
        excluded = [
            name for name, plan in plans.items() if isinstance(plan, Plain) and plan.why is Why.EXCLUDED
        ]
    rate = round(report.bits_per_weight, 4)
    return {
        "bits_per_weight": rate,
        "seed": options.seed,
        "digest": report.digest,
        "modules_to_not_convert": excluded or None,
    }


def _source_files(source: Path, out: Path) -> list[Path]:
    """The weight files of a dense model that writing `out` does not touch."""
    weights = weight_files(source)
    refuse_overlap(source, out)
    method = read_quantization(source).get("quant_method")
    if method is not None:
        raise SourceError(
            f"{source / CONFIG}: expected a dense model, found one quantized with {method!r}; compress the "
            "model it was made from"
        )
    return weights


@dataclass(frozen=True)
class _Copied:
    """safetensors files in subfolders, copied as they are and counted."""

    n_bytes: int
    n_weights: int


def _copy_and_count(source: Path, target: Path, weights: list[Path]) -> _Copied:
    nested = [path for path in copy_companions(source, target, weights) if path.suffix == WEIGHTS_ENDING]
    n_weights = sum(t.n_weights for path in nested for t in list_tensors([path]))
    return _Copied(sum(path.stat().st_size for path in nested), n_weights)


def _decide(
    plans: dict[str, Plan],
    options: CompressOptions,
    copied_bytes: int,
    n_weights: int,
    backend: Backend,
    half: Set[str] | None,
) -> tuple[list[list[OutputFile]], list[list[Job]]]:
    """Files and jobs of every stage; tensors that cannot be coded, or have no budget, become plain."""
    shard_bytes, stem = parse_size(options.max_shard_size, "max_shard_size"), stem_of(1, options.stages)
    if not options.has_budget:
        left = {name: plan.source for name, plan in plans.items() if isinstance(plan, Coded)}
        plans |= {name: narrowed(Plain(source, Why.NO_BUDGET), half) for name, source in left.items()}
        return [lay_out(plans, {}, shard_bytes, stem)], [[]]
    n_coded = sum(isinstance(plan, Coded) for plan in plans.values())
    request = Request(options.window_bits, options.rotation, options.seed, n_coded, backend)
    curves, contents = survey(plans, request)
    refined = [refined_files(plans, request, stage, shard_bytes) for stage in range(2, options.stages + 1)]
    target = budget_bytes(options.bits_per_weight, options.size, n_weights)
    other_bytes = copied_bytes + sum(map(total_bytes, refined))
    choices = meet_budget(plans, curves, Budget(target, other_bytes, n_weights, shard_bytes, stem))
    first = [Job(plans[name].source, contents[name], choices[name]) for name in sorted(choices)]
    jobs = [first]
    for _ in refined:
        last = {job.source.name: job for job in jobs[-1]}
        jobs.append(refining(last, lambda source: refinement(source, request), backend))
    return [lay_out(plans, choices, shard_bytes, stem), *refined], jobs
