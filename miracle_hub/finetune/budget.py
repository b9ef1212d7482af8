"""A budget of the whole file → codes of all streams: the file has at least 99 % of it, and never more.

The size of a file is known before any training: of every stream the header, the scales and the messages, of
every other tensor its bytes, and the header of the safetensors file. Which vectors a repository holds in 16
bits instead of 32, which is else decided by their values, is decided by those at the start.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from miracle_hub.code import Code, StreamCode
from miracle_hub.codec.dtypes import DTYPE_NAMES
from miracle_hub.codec.exact import exact_payload
from miracle_hub.codec.modules import module_tensors
from miracle_hub.codec.naming import STREAM
from miracle_hub.codec.network import network_entries, network_file, spec_of
from miracle_hub.codec.plan import in_order
from miracle_hub.codec.repository import sharded, total_bytes
from miracle_hub.codec.source import narrowing_metadata
from miracle_hub.codec.stream_payload import header_of_stream
from miracle_hub.coding.matrix import FEWEST_ROWS
from miracle_hub.coding.narrowing import is_held_in_half
from miracle_hub.errors import BudgetError
from miracle_hub.format.network import NetworkHeader, SharedSpec, encode_network
from miracle_hub.format.payload import SCALE_BYTES
from miracle_hub.format.spec import TensorSpec, bytes_entry
from miracle_hub.names import matches
from miracle_hub.options import DEFAULT_SHARD_SIZE
from miracle_hub.sizes import amount, asked_for, budget_bytes, parse_size
from miracle_hub.training.based import TrainingBase
from miracle_hub.training.codes import USED_UP, Codes, FilePlan, Unit, codes_within
from miracle_hub.training.config import VariationalConfig
from miracle_hub.training.convert import sharings_of, units_of
from miracle_hub.training.layout import scale_columns
from miracle_hub.training.targets import Target, find_targets


def plan_file(model: nn.Module, config: VariationalConfig, base: TrainingBase | None = None) -> FilePlan:
    """What the file of a model will be, within the budget of the options.

    Args:
        base: to which it will be a difference.

    Raises:
        BudgetError: the budget is below the least or above the most that the model's file can have, or no
            two neighboring rates use it up; the message says which sizes are possible.
        OptionError: nothing matches, or a parameter cannot be converted.
    """
    targets = find_targets(model, config, None if base is None else set(base.tensors))
    n_weights = sum(parameter.numel() for parameter in model.parameters())
    budget = budget_bytes(config.bits_per_weight, config.size, n_weights)
    file = (
        _network_of(model, targets, config)
        if config.streams == "network"
        else _files(model, targets, config, base)
    )
    units, ladder = units_of(targets, config), list(config.codes())
    least, most = (file.n_bytes(_uniform(units, code)) for code in (ladder[-1], ladder[0]))
    plan = _plan(file, units, ladder, budget) if least <= budget <= most else None
    asked, in_bits = asked_for(config.bits_per_weight, budget), config.bits_per_weight is not None
    if plan is None:
        raise _impossible(asked, in_bits, (least, most), n_weights)
    if plan.n_bytes < USED_UP * budget and file.few_rows:
        plain = file.with_one_scale(file.few_rows)
        again = _plan(plain, units_of(targets, config, file.few_rows), ladder, budget)
        plan = max(plan, again or plan, key=lambda one: one.n_bytes)
    if plan.n_bytes < USED_UP * budget:
        sizes = [file.n_bytes(_uniform(units, code)) for code in ladder]
        raise _between(budget, plan.n_bytes, min(size for size in sizes if size > budget))
    return plan


def _plan(file: "_File", units: Sequence[Unit], ladder: Sequence[Code], budget: int) -> FilePlan | None:
    """What fills the budget best, if anything is within it."""
    codes = codes_within(units, ladder, file.n_bytes, budget)
    return None if codes is None else FilePlan(codes, budget, file.n_bytes(codes), file.half, file.one_scale)


def _uniform(units: Sequence[Unit], code: Code) -> Codes:
    return {unit.name: unit.fitted(code) for unit in units}


def _impossible(asked: str, in_bits: bool, sizes: tuple[int, int], n_weights: int) -> BudgetError:
    unit = n_weights / 8 / 10_000  # rates are rounded inwards, so that asking for the printed one works
    ends = (
        (min(sizes), math.ceil(min(sizes) / unit) / 10_000, "at the lowest rate, what is not coded plain"),
        (max(sizes), math.floor(max(sizes) / unit) / 10_000, "at the highest rate"),
    )
    least, most = (amount(n_bytes, rate, why, in_bits=in_bits) for n_bytes, rate, why in ends)
    least = least if in_bits else least.replace(" bytes", "", 1)  # which the other end says
    return BudgetError(
        f"{asked}, but the file of this model can have {least} to {most}; ask for "
        f"{'bits' if in_bits else 'a size'} in between, or code other modules"
    )


def _between(budget: int, below: int, above: int) -> BudgetError:
    return BudgetError(
        f"size: {budget:,} bytes were asked for, but the file of this model, which is small or has few rows, "
        f"can have {below:,} or {above:,} bytes and nothing in between; ask for one of them, or code other "
        "modules"
    )


class _File(Protocol):
    """The file or files that a model will become."""

    @property
    def half(self) -> frozenset[str] | None:
        """See `FilePlan`."""
        ...

    @property
    def one_scale(self) -> frozenset[str]:
        """See `FilePlan`."""
        ...

    @property
    def few_rows(self) -> frozenset[str]:
        """Tensors whose rows have a scale each, but are too few to meet a size by."""
        ...

    def with_one_scale(self, names: frozenset[str]) -> "_File":
        """The same, but rows of some tensors share a scale."""
        ...

    def n_bytes(self, codes: Codes) -> int:
        """The size with the codes of streams."""
        ...


@dataclass(frozen=True)
class _Network:
    """What `save` writes of a network with one stream."""

    specs: tuple[SharedSpec, ...]
    plain: Mapping[str, Tensor]
    half: None = None
    one_scale: frozenset[str] = frozenset()
    few_rows: frozenset[str] = frozenset()

    def with_one_scale(self, names: frozenset[str]) -> "_Network":
        """Every tensor has one scale in any case."""
        return self

    def n_bytes(self, codes: Codes) -> int:
        """Exact."""
        (code,) = codes.values()
        header = NetworkHeader(code, self.specs)
        stream = len(encode_network(header, b"", b"")) + SCALE_BYTES * len(self.specs)
        stream += code.message_bytes(header.n_values)
        return network_file("", network_entries(self.plain, {STREAM: stream})).n_bytes


def _network_of(model: nn.Module, targets: list[Target], config: VariationalConfig) -> _Network:
    sharings = sharings_of(targets, config)
    specs = tuple(spec_of(t.name, t.parameter, own) for t, own in zip(targets, sharings, strict=True))
    return _Network(specs, _plain(model, targets))


def _plain(model: nn.Module, targets: Sequence[Target]) -> dict[str, Tensor]:
    coded = {target.name for target in targets}
    return {name: tensor for name, tensor in module_tensors(model).items() if name not in coded}


@dataclass(frozen=True)
class _Files:
    """What `save` and `compress_model` write of a model with a stream per tensor: the larger of both.

    Attributes:
        coded: shape and dtype of the coded tensors, by name.
        plain: all others, as `save` writes them.
        stored: the entries of all others in a repository; empty for a module that becomes none.
        exact: bytes of buffers that a repository keeps exactly in fewer of them, by name.
        half, one_scale: see `FilePlan`.
        has_row_scales: whether rows that are long have a scale each.
        is_difference: to a base, which only a repository can be.
    """

    coded: Mapping[str, tuple[tuple[int, ...], str]]
    plain: Mapping[str, Tensor]
    stored: Sequence[TensorSpec]
    exact: Mapping[str, int]
    half: frozenset[str] | None
    has_row_scales: bool
    is_difference: bool = False
    one_scale: frozenset[str] = frozenset()

    @property
    def few_rows(self) -> frozenset[str]:
        """See `_File`."""
        return frozenset(name for name in self.coded if 0 < self._n_row_scales(name) < FEWEST_ROWS)

    def _n_row_scales(self, name: str) -> int:
        shape, _ = self.coded[name]
        columns = scale_columns(shape) if self.has_row_scales and name not in self.one_scale else 0
        return math.prod(shape) // columns if columns else 0

    def with_one_scale(self, names: frozenset[str]) -> "_Files":
        """See `_File`."""
        return replace(self, one_scale=names)

    def n_bytes(self, codes: Codes) -> int:
        """Exact but for the name under which a tied tensor is stored, of which it counts the longest."""
        payloads = {
            name: _payload_bytes(shape, dtype, codes[name], self._n_row_scales(name) > 0)
            for name, (shape, dtype) in self.coded.items()
        }
        if self.is_difference:
            return self._repository_bytes(payloads)
        alone = network_file("", network_entries(self.plain, payloads), self.half or ())
        return max(alone.n_bytes, self._repository_bytes(payloads) if self.half is not None else 0)

    def _repository_bytes(self, payloads: Mapping[str, int]) -> int:
        coded = sorted(
            (bytes_entry(name, n_bytes) for name, n_bytes in payloads.items()), key=lambda e: e.name
        )
        files = sharded([*self.stored, *coded], parse_size(DEFAULT_SHARD_SIZE))
        half = self.half or frozenset()
        return total_bytes(
            replace(file, metadata=file.metadata | narrowing_metadata(file.entries, half)) for file in files
        )


def _files(
    model: nn.Module, targets: Sequence[Target], config: VariationalConfig, base: TrainingBase | None
) -> _Files:
    coded = {t.name: (tuple(t.parameter.shape), DTYPE_NAMES[t.parameter.dtype]) for t in targets}
    plain, stored, exact, half = _plain(model, targets), list[TensorSpec](), dict[str, int](), None
    if is_hub_model(model):
        tensors = _stored(model, {id(target.parameter) for target in targets})
        unchanged = frozenset[str]() if base is None else base.unchanged
        tensors = {name: tensor for name, tensor in tensors.items() if name not in unchanged}
        kept = config.modules_to_save or []
        half = frozenset(n for n, t in tensors.items() if not matches(n, kept) and is_held_in_half(n, t))
        entries = network_entries(tensors, {})
        moving = statistics_of(model)
        exact = {name: n for name, t in tensors.items() if name not in moving and (n := _exact_bytes(t))}
        stored = in_order(
            replace(e, dtype="F16") if e.name in half else e for e in entries if e.name not in exact
        )
        own = {id(tensors[name]) for name in half}  # under all their names
        half |= {name for name, t in model.state_dict(keep_vars=True).items() if id(t) in own}
        plain |= {
            n: torch.empty_like(plain[n], dtype=torch.float16, device="meta") for n in half & set(plain)
        }
    return _Files(coded, plain, stored, exact, half, config.scales == "row", base is not None)


def statistics_of(model: nn.Module) -> frozenset[str]:
    """Buffers that training moves, by all their names: they are all zeros or ones, which is few bytes, only
    before it.
    """
    return frozenset(
        f"{prefix}.{name}".lstrip(".")
        for prefix, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, _NormBase)
        for name in module._buffers
    )


def _exact_bytes(tensor: Tensor) -> int:
    """Of a buffer that a repository keeps exactly in fewer bytes than plain; else 0."""
    if isinstance(tensor, nn.Parameter) and tensor.is_floating_point():
        return 0
    payload = exact_payload(tensor.detach().cpu())
    return 0 if payload is None or len(payload) >= tensor.nbytes else len(payload)


def is_hub_model(model: nn.Module) -> bool:
    """Whether it becomes a repository: a model of transformers, which is not imported here."""
    return any(kind.__name__ == "PreTrainedModel" for kind in type(model).__mro__)


def _stored(model: nn.Module, coded: set[int]) -> dict[str, Tensor]:
    """What a repository holds besides payloads, each tensor under the longest of its names."""
    left_out = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    tensors = {name: t for name, t in model.state_dict(keep_vars=True).items() if isinstance(t, Tensor)}
    names: dict[int, str] = {}
    for name, tensor in tensors.items():
        if name not in left_out and id(tensor) not in coded:
            names[id(tensor)] = max(name, names.get(id(tensor), ""), key=len)
    return {name: tensors[name] for name in names.values()}


@lru_cache(maxsize=1 << 14)
def _payload_bytes(shape: tuple[int, ...], dtype: str, code: StreamCode, has_row_scales: bool) -> int:
    """Of one tensor; many of a model are alike."""
    return header_of_stream(shape, dtype, code, has_row_scales).payload_bytes
