"""Variational models as users make them, and the small files and repositories they become."""

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from miracle_hub.codec.compress import compress_folder
from miracle_hub.codec.decompress import load_state_dict
from miracle_hub.codec.handed_out import require_finite
from miracle_hub.codec.keeping import Roles
from miracle_hub.codec.modules import module_tensors, read_state
from miracle_hub.codec.naming import STREAM
from miracle_hub.codec.network import encode_stream_entry, spec_of, write_network
from miracle_hub.codec.report import Report
from miracle_hub.codec.trellis import payload_of_stream
from miracle_hub.errors import ChecksumError, OptionError, WrittenWeightError
from miracle_hub.files.whole import temporary_beside, writing
from miracle_hub.finetune.budget import plan_file
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
from miracle_hub.training.stream import message_of

if TYPE_CHECKING:
    from miracle_hub.plugin.config import MiracleConfig

_LOGGER = logging.getLogger("miracle_hub")


_LOGGER = logging.getLogger("miracle_hub")


def make_variational(
    model: nn.Module, config: "MiracleConfig | VariationalConfig | None" = None, **options: Any
) -> nn.Module:
    """Give a model's weights Gaussian posteriors, in place, and return it.

    Make the optimizer after this: the parameters are others. In training mode every forward pass has a draw
    of the weights (the test channel has no noise), in evaluation mode they are the posterior's means.

    Args:
        config: or the same as keywords: `make_variational(model, bits_per_weight=1.0)`. Of a budget of the
            whole file (`bits_per_weight`, `size`), which `save` or `compress_model` write, at least 99 % are
            used, and never more: header, vectors, scales and messages are planned before training.

    Raises:
        OptionError: nothing matches, a parameter cannot be converted, or an option is unknown.
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
    plan = plan_file(model, config) if config.is_of_files else None
    return convert.make_variational(model, config, plan)


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
        OptionError: the model is not variational, or not coded.
        WrittenWeightError: evaluation has other weights than those that were coded.
        ChecksumError: what was written does not decode to the model's weights.
        OutputWriteError: the file cannot be written.
    """
    variational, path = convert.check_evaluated(model), Path(path)
    check_model(model)
    half = _round_vectors(model, variational.plan) or frozenset()
    names = _names(model, variational)
    entries = _coded_entries(variational, names)
    dense = convert.posterior_mean(model)
    plain = {name: t for name, t in module_tensors(dense).items() if name not in names.values()}

    def check(written: Path) -> None:
        _require_same(path, read_state(written, dense), module_tensors(dense))

    n_bytes = write_network(path, entries, plain, check, half & set(plain))
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

    Args:
        size, bits_per_weight: of the whole files; tensors that are not variational are then coded without
            training to meet it. None means that they stay plain.

    Raises:
        OptionError: the model is not coded, or has one stream for the whole network, or adapters on top.
        WrittenWeightError: evaluation has other weights than those that were coded.
        ChecksumError: what was written does not decode to the model's weights.
    """
    variational = variational_of(model)
    if variational.config.streams != "tensor":
        raise OptionError(
            "streams: expected 'tensor' for a repository, found 'network'; use save and load, or "
            "MiracleHubMixin"
        )
    refuse_adapters(model)
    convert.check_evaluated(model)
    check_model(model)
    half = _round_vectors(model, variational.plan)
    payloads = _coded_entries(variational, _names(model, variational))
    dense, kept = convert.posterior_mean(model), variational.config.modules_to_save or []
    options = CompressOptions(
        size=size, bits_per_weight=bits_per_weight, overwrite=overwrite, progress=progress,
        modules_to_not_convert=[name for name in module_tensors(dense) if matches(name, kept)],
    )  # fmt: skip
    report = _write_repository(dense, Path(out).absolute(), tokenizer, options, payloads, half)
    coded = {name: tensor for name, tensor in module_tensors(dense).items() if name in payloads}
    _require_same(Path(out), load_state_dict(out), coded)
    if variational.plan is None or options.has_budget:
        return report
    _say_if_above(variational.plan, report.compressed_bytes, Path(out))
    return replace(report, budget_bytes=variational.plan.budget_bytes)


def _say_if_above(plan: FilePlan | None, n_bytes: int, path: Path) -> None:
    """A file is as planned, unless what it holds plainly became more."""
    if plan is not None and n_bytes > plan.budget_bytes:
        _LOGGER.warning(
            "%s: expected at most %s bytes, found %s: the model has more to store plainly than when it was "
            "made variational; call make_variational last",
            path, f"{plan.budget_bytes:,}", f"{n_bytes:,}",
        )  # fmt: skip


def _round_vectors(model: nn.Module, plan: FilePlan | None) -> frozenset[str] | None:
    """Round what the plan of the file has in 16 bits, in place; the names of what could be rounded."""
    if plan is None or plan.half is None:
        return None
    tensors = {name: t for name, t in model.state_dict(keep_vars=True).items() if name in plan.half}
    half = frozenset(
        name for name, tensor in tensors.items() if bool(tensor.detach().half().isfinite().all())
    )
    for name in sorted(set(tensors) - half):
        _LOGGER.warning(
            "%s: expected numbers that float16 holds, as before training, found larger ones: it is stored in "
            "32 bits, by which the file may exceed its budget; ask for less, or exclude it",
            name,
        )
    with torch.no_grad():
        for name in half:
            tensors[name].copy_(tensors[name].half())
    return half


def _write_repository(
    dense: Any,
    out: Path,
    tokenizer: Any,
    options: CompressOptions,
    payloads: Mapping[str, bytes],
    half: frozenset[str] | None,
) -> Report:
    """Save an ordinary model beside the output and compress that, with the payloads that training made."""
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    # Beside the output, where the next run finds what a killed one left, and not where the system keeps it.
    with temporary_beside(out) as temporary:
        folder = temporary / out.name
        with writing(folder):
            dense.save_pretrained(folder, save_original_format=False)  # or names are not those of payloads
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
        base = getattr(dense.config, "_name_or_path", None) or None
        base = None if base is None or Path(base).exists() else base
        return compress_folder(
            folder, out, options, coded=payloads, half=half,
            card=lambda target, report: write_card(target, report, folder, base),
            roles=lambda _: _roles_in(dense),
        )  # fmt: skip


def _roles_in(model: nn.Module) -> Roles:
    """Which tensors of a module are parameters, and which are buffers."""
    buffers, parameters = (
        frozenset(name for name, _ in named(remove_duplicate=False))
        for named in (model.named_buffers, model.named_parameters)
    )
    return Roles(buffers, parameters, type(model).__name__)


def _require_same(path: Path, found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """
    Raises:
        ChecksumError: what was written does not decode to the model's weights.
    """
    for name, tensor in expected.items():
        if not torch.equal(found[name].cpu(), tensor.cpu()):
            raise ChecksumError(
                f"{path}: {name}: what was written does not decode to the model's weights; report this"
            )


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
            entries[name] = payload_of_stream(own.shape, own.dtype, stream.code, scales, message, name)
    return entries
