"""Variational models as users make them, and the small files and repositories they become."""

import logging
import zlib
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from miracle_hub.codec.compress import compress_folder
from miracle_hub.codec.handed_out import require_finite
from miracle_hub.codec.keeping import Roles
from miracle_hub.codec.modules import module_tensors, read_state
from miracle_hub.codec.naming import STREAM
from miracle_hub.codec.network import encode_stream_entry, spec_of, write_network
from miracle_hub.codec.report import Report
from miracle_hub.codec.stream_payload import payload_of_stream
from miracle_hub.errors import OptionError, ProcessError, WrittenWeightError
from miracle_hub.files.whole import temporary_beside, writing
from miracle_hub.finetune.agreement import (
    adopt,
    require_own_tensors,
    require_same,
    say_other_dtypes,
    say_what_changed,
)
from miracle_hub.finetune.base import training_base
from miracle_hub.finetune.budget import plan_file, statistics_of
from miracle_hub.format.network import NetworkHeader
from miracle_hub.hub.card import write_card
from miracle_hub.names import matches, offer
from miracle_hub.options import CompressOptions
from miracle_hub.training import convert
from miracle_hub.training.codes import FilePlan
from miracle_hub.training.config import VariationalConfig, refuse_old_names
from miracle_hub.training.drawn import coded_names
from miracle_hub.training.guard import check_model
from miracle_hub.training.model import Variational, variational_of
from miracle_hub.training.processes import written_once
from miracle_hub.training.rounding import planned_half, round_as_written, unwrapped
from miracle_hub.training.stream import message_of

if TYPE_CHECKING:
    from miracle_hub.plugin.config import MiracleConfig

_LOGGER = logging.getLogger("miracle_hub")


def make_variational(
    model: nn.Module, config: "MiracleConfig | VariationalConfig | None" = None, **options: Any
) -> nn.Module:
    """Make a model one whose weights can be coded, in place, and return it.

    Make the optimizer after this: the parameters are others. With Mean-KL and Mean-Var weights have Gaussian
    posteriors: in training mode every forward pass has a draw of them, in evaluation mode they are the means.
    The test channel, the default of streams of tensors, is no variational inference: its weights are plain
    ones, fitted without noise, and become Gaussians when they are coded.

    Args:
        config: or the same as keywords: `make_variational(model, bits_per_weight=1.0)`. Of a budget of the
            whole file (`bits_per_weight`, `size`), which `save` or `compress_model` write, at least 99 % are
            used, and never more: header, vectors, scales and messages are planned before training. With
            `base` the file is a difference to another model: priors have its weights as their means.

    Raises:
        OptionError: nothing matches, a parameter cannot be converted, or an option is unknown.
        SourceError, BaseModelError: the base cannot be had, or has no tensor of the model.
        BudgetError: the budget is below what the code, or the file, can use, or above it; or between two
            sizes of a file so small that it can have nothing in between.
    """
    if (config is None) == (not options):
        raise OptionError(
            "make_variational: expected either a config or options as keywords; give one of them, such as "
            "bits_per_weight=1.0"
        )
    if config is None:
        config = _from_keywords(options)
    elif not isinstance(config, VariationalConfig):
        config = config.variational()
    base = training_base(model, config)
    plan = plan_file(model, config, base) if config.is_of_files else None
    return convert.make_variational(model, config, plan, base)


def _from_keywords(options: dict[str, Any]) -> VariationalConfig:
    refuse_old_names(options, "make_variational")
    known = set(VariationalConfig.__dataclass_fields__)
    if unknown := sorted(set(options) - known):
        raise OptionError(
            f"make_variational: expected options among {', '.join(sorted(known))}, found {unknown[0]!r}; "
            f"check the spelling ({offer(unknown[0], sorted(known))})"
        )
    return VariationalConfig(**options)


def save(model: nn.Module, path: str | Path) -> int:
    """Write a coded model as one safetensors file, read it back, and return its bytes.

    With streams="network" the file is for `load` alone; names and shapes are the module's.

    Raises:
        OptionError: the model is not variational, or not coded, or has a base.
        WrittenWeightError: evaluation has other weights than those that were coded.
        ChecksumError: what was written does not decode to the model's weights.
        OutputWriteError: the file cannot be written.
    """
    model, path = unwrapped(model), Path(path)
    variational = convert.check_evaluated(model)
    if variational.base is not None:
        raise OptionError(
            f"{path}: expected a model without a base, which this file cannot state, found one with; write "
            "a repository (compress_model, MiracleTrainer.compress)"
        )
    check_model(model)
    half = planned_half(model) or frozenset()
    rounded = round_as_written(model) if half else []  # without a plan the file keeps all bits
    names = _names(model, variational)
    entries = _coded_entries(variational, names)
    dense = convert.posterior_mean(model)
    plain = {name: t for name, t in module_tensors(dense).items() if name not in names.values()}

    def check(written: Path) -> None:
        require_same(path, read_state(written, dense), module_tensors(dense))

    n_bytes = write_network(path, entries, plain, check, half & set(plain))
    say_what_changed(path, rounded)
    _say_if_above(variational.plan, n_bytes, path)
    return n_bytes


def compress_model(
    model: nn.Module,
    out: str | Path,
    *,
    size: str | int | None = None,
    bits_per_weight: float | None = None,
    tokenizer: Any = None,
    overwrite: bool = False,
    progress: bool = True,
) -> Report:
    """Write a coded transformers model as a repository that plain `from_pretrained` loads.

    Afterwards the model in memory is what the file decodes to: vectors that it holds in 16 bits are rounded,
    as `code_model` has done already, and with a budget the other tensors are as they were coded. What changed
    is logged, as are tensors that `from_pretrained` gives in another dtype.

    In a distributed run the first process writes. Others may call this too: they wait, and load what it
    wrote.

    Args:
        size, bits_per_weight: of the whole files; tensors that are not variational are then coded without
            training to meet it. None means that they stay plain.

    Raises:
        OptionError: the model is not coded, has one stream for the whole network, adapters on top, or other
            tensors than its class makes of its config.
        WrittenWeightError: evaluation has other weights than those that were coded.
        ChecksumError: what was written does not decode to the model's weights.
        ProcessError: the first process does not write, or the file is not to be seen from this one.
    """
    model, variational = unwrapped(model), variational_of(model)
    if variational.config.streams != "tensor":
        raise OptionError(
            "streams: expected 'tensor' for a repository, found 'network'; use save and load, or "
            "MiracleHubMixin"
        )
    refuse_adapters(model)
    require_own_tensors(model)
    convert.check_evaluated(model)
    check_model(model)
    payloads = _coded_entries(variational, _names(model, variational))
    rounded, half = round_as_written(model), planned_half(model)
    dense: Any = convert.posterior_mean(model)
    kept = variational.config.modules_to_save or []
    options = CompressOptions(
        size=size, bits_per_weight=bits_per_weight, overwrite=overwrite, progress=progress,
        modules_to_not_convert=[name for name in module_tensors(dense) if matches(name, kept)],
    )  # fmt: skip
    number, base = zlib.crc32(b"".join(payloads.values())), variational.base and variational.base.folder
    made = (tokenizer, options, payloads, half, base)
    report = written_once(
        Path(out), number, lambda: asdict(_write_repository(dense, Path(out).absolute(), *made))
    )
    _require_there(Path(out))
    loaded = type(dense).from_pretrained(out, **loading_options(base))  # as a stranger does
    coded = {name: tensor for name, tensor in module_tensors(dense).items() if name in payloads}
    require_same(Path(out), loaded.state_dict(), coded)
    say_what_changed(Path(out), [*rounded, *adopt(model, loaded)])
    say_other_dtypes(Path(out), dense, loaded)
    return _beside_its_plan(Report(**report), variational.plan, options, Path(out))


def loading_options(base: Path | None) -> dict[str, Any]:
    """What `from_pretrained` is told of a repository that may be a difference to a base."""
    from miracle_hub.plugin.config import MiracleConfig

    return {} if base is None else {"quantization_config": MiracleConfig(base=base)}


def _beside_its_plan(report: Report, plan: FilePlan | None, options: CompressOptions, out: Path) -> Report:
    """The report with the budget that the model was made variational for, unless another was given since."""
    if plan is None or options.has_budget:
        return report
    _say_if_above(plan, report.compressed_bytes, out)
    return replace(report, budget_bytes=plan.budget_bytes)


def _say_if_above(plan: FilePlan | None, n_bytes: int, path: Path) -> None:
    """A file is as planned, unless what it holds plainly became more."""
    if plan is not None and n_bytes > plan.budget_bytes:
        _LOGGER.warning(
            "%s: expected at most %s bytes, found %s: the model has more to store plainly than when it was "
            "made variational, or vectors that float16 holds no longer; call make_variational last, or ask "
            "for less",
            path, f"{plan.budget_bytes:,}", f"{n_bytes:,}",
        )  # fmt: skip


def _require_there(out: Path) -> None:
    """
    Raises:
        ProcessError: the first process wrote to another disk.
    """
    if not out.exists():
        raise ProcessError(
            f"{out}: expected what the first process wrote, found nothing; write to a disk that all "
            "processes share, or call compress_model in the first one alone"
        )


def _write_repository(
    dense: Any,
    out: Path,
    tokenizer: Any,
    options: CompressOptions,
    payloads: Mapping[str, bytes],
    half: frozenset[str] | None,
    base: Path | None,
) -> Report:
    """Save an ordinary model beside the output and compress that, with the payloads that training made.

    Args:
        base: to which they are differences.
    """
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    # Beside the output, where the next run finds what a killed one left, and not where the system keeps it.
    with temporary_beside(out) as temporary:
        folder = temporary / out.name
        with writing(folder):
            dense.save_pretrained(folder, save_original_format=False)  # or names are not those of payloads
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
        origin = getattr(dense.config, "_name_or_path", None) or None
        origin = None if origin is None or Path(origin).exists() else origin
        return compress_folder(
            folder, out, options, coded=payloads, half=half, base=base,
            card=lambda target, report: write_card(target, report, folder, origin, base),
            roles=lambda _: _roles_in(dense, is_planned=half is not None),
        )  # fmt: skip


def _roles_in(model: nn.Module, is_planned: bool) -> Roles:
    """Which tensors of a module are parameters, and which are buffers.

    Args:
        is_planned: so that statistics have the bytes that they were planned with, whatever they became.
    """
    buffers, parameters = (
        frozenset(name for name, _ in named(remove_duplicate=False))
        for named in (model.named_buffers, model.named_parameters)
    )
    moving = statistics_of(model) if is_planned else frozenset()
    return Roles(buffers - moving, parameters | moving, type(model).__name__)


def refuse_adapters(model: Any) -> None:
    """
    Raises:
        OptionError: the model has adapters, which a repository of its own class cannot hold.
    """
    if hasattr(model, "peft_config") or getattr(model, "_hf_peft_config_loaded", False):
        raise OptionError(
            f"model: expected a transformers model, found adapters of PEFT on it ({type(model).__name__}); "
            "call model.eval() and model.merge_and_unload() before code_model, and code what that returns"
        )


def _names(model: nn.Module, variational: Variational) -> dict[tuple[int, int], str]:
    """The names of coded weights, by stream and member; of tensors that are in use no longer there is none.

    Raises:
        WrittenWeightError: one of them shares its message with others.
    """
    names = coded_names(model)
    for i, stream in enumerate(variational.streams):
        lost = [member.name for m, member in enumerate(stream.members) if (i, m) not in names]
        if lost and len(lost) < len(stream.members):
            raise WrittenWeightError(
                f"{lost[0]}: expected the module that was coded, found another in its place; its values are "
                "part of the message of all: replace modules before make_variational"
            )
        if lost:
            _LOGGER.warning("%s is in use no longer, and not written", lost[0])
    return names


def _coded_entries(variational: Variational, names: Mapping[tuple[int, int], str]) -> Mapping[str, bytes]:
    """What a file holds of the streams in use: a payload per tensor, or one entry for all."""
    entries = {}
    for i, stream in enumerate(variational.streams):
        if (i, 0) not in names:
            continue
        message, scales = message_of(stream), stream.scales().cpu()
        if variational.config.streams == "network":
            specs = [
                spec_of(names[i, m], torch.empty(own.shape, dtype=own.dtype, device="meta"), own.sharing)
                for m, own in enumerate(stream.members)
            ]
            header = NetworkHeader(stream.code, tuple(specs))
            entries[STREAM], weights = encode_stream_entry(header, scales, message)
            for m, own in enumerate(stream.members):
                require_finite(weights[names[i, m]].to(own.dtype), names[i, m])
        else:
            own, name = stream.members[0], names[i, 0]
            base = None if stream.layout.base is None else stream.layout.base.cpu()
            given = (own.shape, own.dtype, stream.code, scales, message, name, base)
            entries[name] = payload_of_stream(*given)
    return entries
