"""A model folder → a repository of payloads, one tensor in memory at a time."""

import time
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from miracle_hub.codec.budget import Budget, meet_budget, require_reachable
from miracle_hub.codec.companions import of_source
from miracle_hub.codec.comparing import TUNED
from miracle_hub.codec.config import LOSSLESS, read_config, read_quantization, write_config
from miracle_hub.codec.curvature import Curvature
from miracle_hub.codec.detector import TO_COMPRESS, require
from miracle_hub.codec.differences import Differences, differences_of
from miracle_hub.codec.finite import NON_FINITE
from miracle_hub.codec.jobs import Job, refining
from miracle_hub.codec.keeping import Roles, kept_bytes, warn_of_kept
from miracle_hub.codec.knowledge import Knowledge, curvatures
from miracle_hub.codec.lossless import keep
from miracle_hub.codec.naming import CARD, CONFIG
from miracle_hub.codec.payloads import Request
from miracle_hub.codec.plan import Coded, Exact, Plain, Plan, Ready, Same, Why, lay_out, narrowed, plan_all
from miracle_hub.codec.rates import Chosen
from miracle_hub.codec.report import Report
from miracle_hub.codec.repository import OutputFile, open_repository, total_bytes
from miracle_hub.codec.source import is_adapter, list_tensors, stem_in, weight_files
from miracle_hub.codec.stages import refined_files, refinement
from miracle_hub.codec.stored import StoredTensor
from miracle_hub.codec.survey import survey
from miracle_hub.codec.weighing import by_cost
from miracle_hub.codec.worth import by_worth, worths
from miracle_hub.codec.writer import Writer
from miracle_hub.coding.backend import Backend, choose
from miracle_hub.coding.narrowing import half_holds
from miracle_hub.errors import BudgetError
from miracle_hub.files.whole import output_folder, refuse_overlap, writing
from miracle_hub.options import CompressOptions
from miracle_hub.sizes import budget_bytes, parse_size


def compress_folder(
    source: Path,
    out: Path,
    options: CompressOptions,
    *,
    card: Callable[[Path, Report], None] | None = None,
    coded: Mapping[str, bytes] | None = None,
    half: Set[str] | None = None,
    not_downloaded: Mapping[str, str] | None = None,
    roles: Callable[[Path], Roles] = lambda source: Roles(),
    knowledge: Knowledge | None = None,
    judged: Callable[[Path, Report], Report] = lambda folder, report: report,
    base: Path | None = None,
    arranged: Callable[[dict[str, Plan]], Mapping[str, float]] = lambda plans: {},
) -> Report:
    """Compress a folder written by `save_pretrained`; see `miracle_hub.compress`.

    Args:
        card: writes README.md.
        coded: payloads of tensors that are coded already; no budget then means that all others stay plain.
        half: names of the vectors to store in 16 bits; None means that their values decide.
        not_downloaded: files of the source that are not even in the folder, and why.
        roles: finds what the model's class says of its tensors; without it their values decide.
        knowledge: what is known of the model beside its weights.
        judged: completes the report by what is written, before the folder has its name.
        base: a folder with the model to whose tensors only the differences are stored.
        arranged: replaces plans before any rate is chosen, and tells what errors of tensors are worth.
    """
    started, backend, weights = time.monotonic(), choose(options.backend), _source_files(source, out)
    if not coded:
        options.require_budget()
    with output_folder(out, options.overwrite) as temporary:
        copied = _copy_and_count(source, temporary, weights, not_downloaded or {})
        plans = plan_all(weights, options.modules_to_not_convert or [], coded or {}, half)
        differences = differences_of(source, base, plans, options, _tensors_of)
        non_finite = keep(plans, known := Roles() if options.exact else roles(source), differences, options)
        shares = arranged(plans) if differences is None else differences.relative
        n_weights = sum(plan.source.n_weights for plan in plans.values()) + copied.n_weights
        given = (options, copied.n_bytes, n_weights, backend, half, knowledge, differences, shares)
        stages, jobs = _decide(source, plans, *given)
        tuned = _take(knowledge, plans, jobs, backend)
        written = Writer(temporary, plans, backend).write(stages, jobs, options.progress)
        told = _told(source, options, n_weights, differences, plans) | {"judged_by": known.said_by}
        told |= {"digest": written.digests[-1], "backend": backend.name}
        report = _report(plans, copied, sum(map(total_bytes, stages)), n_weights, weights, told)
        facts = _facts(report, options, plans, {NON_FINITE: non_finite, TUNED: tuned})
        facts |= differences.base.facts() if differences else {}
        tensors, made = [plan.source for plan in plans.values()], (written.digests, written.guards)
        write_config(source, temporary, facts, tensors, *made, bool(report.exact), base is not None)
        report = replace(judged(temporary, report), seconds=time.monotonic() - started)
        _write_card(card, temporary, report)
    _warn_of_kept(plans, report)
    return report


def _warn_of_kept(plans: Mapping[str, Plan], report: Report) -> None:
    if not report.lossless:  # which was asked for
        warn_of_kept(plans, report.compressed_bytes)


def _report(
    plans: Mapping[str, Plan],
    copied: "_Copied",
    staged_bytes: int,
    n_weights: int,
    weights: list[Path],
    told: Mapping[str, Any],
) -> Report:
    """What plans and copies tell of a compression, and all else that is told."""
    n_bytes = staged_bytes + copied.n_bytes
    return Report(
        dense_bytes=sum(path.stat().st_size for path in weights) + copied.n_bytes,
        compressed_bytes=n_bytes,
        n_weights=n_weights,
        bits_per_weight=8 * n_bytes / n_weights,
        plain=_whys(plans, Plain),
        exact=_whys(plans, Exact),
        kept_bytes=sum(kept_bytes(plans).values()),
        carried=copied.carried,
        left_out=copied.left_out,
        **told,
    )


def _whys(plans: Mapping[str, Plan], kind: type[Plain] | type[Exact]) -> dict[str, str]:
    """Tensors that are stored as they are, and why."""
    return {n: p.why.text(p.source.dtype) for n, p in plans.items() if isinstance(p, kind)}


def _write_card(card: Callable[[Path, Report], None] | None, folder: Path, report: Report) -> None:
    if card is not None:
        with writing(folder / CARD):
            card(folder, report)


def _facts(
    report: Report, options: CompressOptions, plans: Mapping[str, Plan], lists: Mapping[str, list[str]]
) -> dict[str, Any]:
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
        **({LOSSLESS: True} if report.lossless else {}),
        **{field: names for field, names in lists.items() if names},
    }


def _source_files(source: Path, out: Path) -> list[Path]:
    """The weight files of a dense model that writing `out` does not touch."""
    require(source, TO_COMPRESS)
    weights = weight_files(source)
    refuse_overlap(out, source)
    read_quantization(source)
    return weights


def _notes(source: Path, differences: Differences | None, is_lossless: bool) -> tuple[str, ...]:
    """What from_pretrained will miss, and what else to know of a difference."""
    told = () if differences is None else differences.notes(source, is_lossless)
    if is_adapter(source):
        return told
    lacking = "no config.json" if not (source / CONFIG).exists() else "no model_type in config.json"
    if "model_type" in read_config(source):
        return told
    return (*told, f"{lacking}: not for from_pretrained; miracle_hub.load_state_dict reads the tensors")


@dataclass(frozen=True)
class _Copied:
    """What is copied as it is, of which safetensors files are counted; and what is left out."""

    n_bytes: int
    n_weights: int
    carried: Mapping[str, str]
    left_out: Mapping[str, str]


def _copy_and_count(
    source: Path, target: Path, weights: list[Path], not_downloaded: Mapping[str, str]
) -> _Copied:
    companions = of_source(source, weights)
    companions.copy(target)
    n_bytes = sum(path.stat().st_size for path in companions.weights)
    n_weights = sum(t.n_weights for path in companions.weights for t in list_tensors([path]))
    return _Copied(n_bytes, n_weights, companions.carried, {**companions.left_out, **not_downloaded})


def _decide(
    source: Path,
    plans: dict[str, Plan],
    options: CompressOptions,
    copied_bytes: int,
    n_weights: int,
    backend: Backend,
    half: Set[str] | None,
    knowledge: Knowledge | None,
    differences: Differences | None,
    shares: Mapping[str, float],
) -> tuple[list[list[OutputFile]], list[list[Job]]]:
    """Files and jobs of every stage; tensors that cannot be coded, or have no budget, become plain."""
    shard_bytes, stem = parse_size(options.max_shard_size, "max_shard_size"), stem_in(source, options.stages)
    left = {name: plan.source for name, plan in plans.items() if isinstance(plan, Coded)}
    is_ready = differences is not None or any(isinstance(plan, Ready) for plan in plans.values())
    if not options.has_budget or (is_ready and not left):
        plans |= {name: narrowed(Plain(tensor, Why.NO_BUDGET), half) for name, tensor in left.items()}
        files = lay_out(plans, {}, shard_bytes, stem)
        _require_within(total_bytes(files) + copied_bytes, options, n_weights)
        return [files], [[]]
    request = Request(options.window_bits, options.rotation, options.seed, len(left), backend)
    curves, contents = survey(plans, request)
    refined = [refined_files(plans, request, stage, shard_bytes) for stage in range(2, options.stages + 1)]
    target, other_bytes = _asked(options, n_weights), copied_bytes + sum(map(total_bytes, refined))
    assert target is not None
    budget = Budget(target, other_bytes, n_weights, shard_bytes, stem, options.bits_per_weight)
    require_reachable(plans, curves, budget)
    costs = {} if knowledge is None else curvatures(knowledge, plans, curves)
    plans |= {} if knowledge is None else _changing(knowledge, plans)
    worth = worths([plan.source for plan in plans.values()], read_config(source))
    worth |= {name: worth.get(name, 1.0) * share for name, share in shares.items()}
    curves = by_cost(by_worth(curves, worth), plans, costs, worth, request, knowledge)
    choices = meet_budget(plans, curves, budget)
    if differences is not None:
        differences.leave_out(plans, choices)
    jobs = [_first_jobs(plans, choices, contents, costs)]
    for _ in refined:
        last = {job.source.name: job for job in jobs[-1]}
        jobs.append(refining(last, lambda source: refinement(source, request), backend))
    return [lay_out(plans, choices, shard_bytes, stem), *refined], jobs


def _first_jobs(
    plans: Mapping[str, Plan],
    choices: Mapping[str, Chosen],
    contents: Mapping[str, str],
    costs: Mapping[str, Curvature],
) -> list[Job]:
    return [
        Job(plan.source, contents[name], choices[name], curvature=costs.get(name), based=plan.based)
        for name in sorted(choices)
        if isinstance(plan := plans[name], Coded)
    ]


def _changing(knowledge: Knowledge, plans: Mapping[str, Plan]) -> dict[str, Plan]:
    """What may change, statistics and small matrices, is plain, and has 16 bits where those hold it."""
    found: dict[str, Plan] = {}
    for name, plan in plans.items():
        if not isinstance(plan, Plain | Exact) or plan.why is Why.EXCLUDED:
            continue
        is_statistic = knowledge.is_estimated(name)
        if is_statistic or (plan.why is Why.SMALL and knowledge.is_tuned(name)):
            why = Why.STATISTICS if is_statistic else Why.SMALL
            fits = plan.source.dtype == "F32" and half_holds(plan.source.load())
            found[name] = Plain(plan.source, why, fits)
    return found


def _take(
    knowledge: Knowledge | None, plans: dict[str, Plan], jobs: list[list[Job]], backend: Backend
) -> list[str]:
    """Put in place what somebody else makes of payloads and plain tensors; returns the names of these."""
    if knowledge is None:
        return []
    payloads = knowledge.encode(plans, jobs[0], backend)
    plans |= {name: Ready(plans[name].source, payload) for name, payload in payloads.items()}
    jobs[0] = [job for job in jobs[0] if job.source.name not in payloads]
    found = {n: (p, knowledge.plain(p.source)) for n, p in plans.items() if isinstance(p, Plain)}
    tuned = {n: replace(plan, tuned=values) for n, (plan, values) in found.items() if values is not None}
    plans |= tuned
    return sorted(tuned)


def _tensors_of(folder: Path) -> Sequence[StoredTensor]:
    """See `based.Read`."""
    return open_repository(folder).tensors


def _told(
    source: Path,
    options: CompressOptions,
    n_weights: int,
    differences: Differences | None,
    plans: Mapping[str, Plan],
) -> dict[str, Any]:
    """What a report says of what was asked for, and of a base."""
    asked = {
        "notes": _notes(source, differences, options.exact),
        "budget_bytes": _asked(options, n_weights),
        "lossless": options.exact,
    }
    if differences is None:
        return asked
    same = [name for name, plan in plans.items() if isinstance(plan, Same) and plan.based is None]
    base = differences.base
    return asked | {
        "base": base.said,
        "n_same": len(same),
        "n_differing": len(base.digests) - len(same),
        "differences_left_out": base.left_out,
    }


def _asked(options: CompressOptions, n_weights: int) -> int | None:
    return budget_bytes(options.bits_per_weight, options.size, n_weights) if options.has_budget else None


def _require_within(n_bytes: int, options: CompressOptions, n_weights: int) -> None:
    """
    Raises:
        BudgetError: what training coded, and what stays plain, is above the budget, and nothing is left to
            code.
    """
    if (budget := _asked(options, n_weights)) is not None and n_bytes > budget:
        raise BudgetError(
            f"size: {budget:,} bytes were asked for, but everything is coded already, in {n_bytes:,} bytes; "
            "ask for that or more, or give the budget to make_variational"
        )
