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
from miracle_hub.codec.modules import module_tensors, read_state
from miracle_hub.codec.naming import STREAM
from miracle_hub.codec.network import encode_stream_entry, spec_of, write_network
from miracle_hub.codec.report import Report
from miracle_hub.codec.trellis import payload_of_stream
from miracle_hub.errors import ChecksumError, OptionError
from miracle_hub.files.whole import temporary_beside, writing
from miracle_hub.finetune.budget import plan_file
from miracle_hub.format.network import NetworkHeader
from miracle_hub.hub.card import write_card
from miracle_hub.names import matches
from miracle_hub.options import CompressOptions
from miracle_hub.training import convert
from miracle_hub.training.codes import FilePlan
from miracle_hub.training.config import VariationalConfig, refuse_old_names
from miracle_hub.training.model import Variational, variational_of
from miracle_hub.training.stream import message_of

if TYPE_CHECKING:
    from miracle_hub.plugin.config import MiracleConfig

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
            "check the spelling"
        )
    return VariationalConfig(**options)


def save(model: nn.Module, path: str | Path) -> int:
    """Write a coded model as one safetensors file, read it back, and return its bytes.

    With streams="network" the file is for `load` alone; names and shapes are the module's.

    Raises:
        OptionError: the model is not variational, or not coded.
        ChecksumError: what was written does not decode to the model's weights.
        OutputWriteError: the file cannot be written.
    """
    variational, path = variational_of(model), Path(path)
    messages = [message_of(stream) for stream in variational.streams]
    half = _round_vectors(model, variational.plan) or frozenset()
    dense = convert.posterior_mean(model)
    coded = {member.name for stream in variational.streams for member in stream.members}
    entries = _coded_entries(variational, messages)
    plain = {name: t for name, t in module_tensors(dense).items() if name not in coded}

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
        OptionError: the model is not coded, or has one stream for the whole network.
        ChecksumError: what was written does not decode to the model's weights.
    """
    variational = variational_of(model)
    if variational.config.streams != "tensor":
        raise OptionError(
            "streams: expected 'tensor' for a repository, found 'network'; use save and load, or "
            "MiracleHubMixin"
        )
    messages = [message_of(stream) for stream in variational.streams]
    payloads = _coded_entries(variational, messages)
    half = _round_vectors(model, variational.plan)
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
        )  # fmt: skip


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


def _coded_entries(variational: Variational, messages: list[Tensor]) -> Mapping[str, bytes]:
    """What a file holds of the streams: a payload per tensor, or one entry for all."""
    entries = {}
    for stream, message in zip(variational.streams, messages, strict=True):
        scales = stream.scales().cpu()
        if variational.config.streams == "network":
            specs = [
                spec_of(m.name, torch.empty(m.shape, dtype=m.dtype, device="meta"), m.sharing)
                for m in stream.members
            ]
            header = NetworkHeader(stream.code, tuple(specs))
            entries[STREAM], _ = encode_stream_entry(header, scales, message)
        else:
            member = stream.members[0]
            entries[member.name] = payload_of_stream(member.shape, member.dtype, stream.code, scales, message)
    return entries
