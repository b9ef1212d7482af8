"""A budget of the whole file → the highest rate, or the most message bits, whose file stays within it.

The size of a file is known before any training: of every stream the header, the scales and the message, of
every other tensor its bytes, and the header of the safetensors file. What only training decides is taken at
its worst: whether a repository holds a trained vector in 16 bits instead of 32 depends on its values. So a
file may be smaller than its budget, also by up to a step of the rates, and its report says how large it is.
"""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor, nn

from miracle_hub.code import Code
from miracle_hub.codec.dtypes import DTYPE_NAMES
from miracle_hub.codec.guard import GUARD, placeholder
from miracle_hub.codec.modules import module_tensors
from miracle_hub.codec.naming import STREAM
from miracle_hub.codec.network import network_entries, network_file, spec_of
from miracle_hub.codec.repository import sharded
from miracle_hub.coding.matrix import matrix_columns
from miracle_hub.errors import BudgetError
from miracle_hub.format.network import NetworkHeader, SharedSpec, encode_network
from miracle_hub.format.payload import SCALE_BYTES, Header, Segment
from miracle_hub.format.spec import TensorSpec, bytes_entry
from miracle_hub.options import DEFAULT_SHARD_SIZE, amount, asked_for, budget_bytes, parse_size
from miracle_hub.training.config import VariationalConfig
from miracle_hub.training.convert import sharing_factors, sharing_of
from miracle_hub.training.layout import scale_columns
from miracle_hub.training.targets import Target, find_targets


def within_budget(model: nn.Module, config: VariationalConfig) -> VariationalConfig:
    """The options with `rate` or `message_bits` instead of the budget of a file.

    Raises:
        BudgetError: the budget is below the least or above the most that the model's file can have.
        OptionError: nothing matches, or a parameter cannot be converted.
    """
    targets = find_targets(model, config)
    n_weights = sum(parameter.numel() for parameter in model.parameters())
    budget = budget_bytes(config.bits_per_weight, config.size, n_weights)
    if config.streams == "network":
        file: _File = _network_file(model, targets, config)
    else:
        file = _files(model, targets, config.scales)
    sizes = []
    for candidate, code_for in _candidates(file, config):
        try:
            sizes.append(file.n_bytes(code_for))
            if sizes[-1] <= budget <= sizes[0] and file.n_bytes(candidate.code_for) <= budget:
                return candidate
        except BudgetError:  # a rate at which some stream has no code
            continue
    asked, in_bits = asked_for(config.bits_per_weight, budget), config.bits_per_weight is not None
    raise _impossible(asked, in_bits, sizes, n_weights)


def _impossible(asked: str, in_bits: bool, sizes: list[int], n_weights: int) -> BudgetError:
    if not sizes:
        return BudgetError(
            "budget: expected streams that some rate suits, found none; share weights, choose shorter "
            "windows, or code fewer modules"
        )
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


CodeFor = Callable[[int, str], Code]  # as VariationalConfig.code_for


class _File(Protocol):
    """The file or files that a model will become."""

    @property
    def n_values(self) -> int:
        """Values that are coded."""
        ...

    def n_bytes(self, code_for: CodeFor) -> int:
        """The size with the codes of streams; it may turn out smaller, and never larger.

        Raises:
            BudgetError: no code suits a stream.
        """
        ...


def _candidates(file: _File, config: VariationalConfig) -> Iterator[tuple[VariationalConfig, CodeFor]]:
    """The options at every rate, from the highest on, with the codes that streams then get.

    A sliding code is the same for all of them; that the options look for it anew costs time.
    """
    own = replace(config, bits_per_weight=None, size=None, rate=1.0)
    for code in config.codes():
        if config.streams == "network":
            candidate = replace(own, rate=None, message_bits=code.message_bits(file.n_values))
        else:
            candidate = replace(own, rate=code.rate)
        is_block = config.code == "block"
        yield candidate, candidate.code_for if is_block else lambda n_values, where, code=code: code


@dataclass(frozen=True)
class _NetworkFile:
    """What `save` writes of a network with one stream."""

    specs: tuple[SharedSpec, ...]
    plain: dict[str, Tensor]

    @property
    def n_values(self) -> int:
        """Values that are coded."""
        return sum(spec.n_values for spec in self.specs)

    def n_bytes(self, code_for: CodeFor) -> int:
        """Exact.

        Raises:
            BudgetError: no code suits the stream.
        """
        code = code_for(self.n_values, f"{len(self.specs)} tensors")
        stream = len(encode_network(NetworkHeader(code, self.specs), b"", b""))
        stream += SCALE_BYTES * len(self.specs) + code.message_bytes(self.n_values)
        return network_file("", network_entries(self.plain, {STREAM: stream})).n_bytes


def _network_file(model: nn.Module, targets: Sequence[Target], config: VariationalConfig) -> _NetworkFile:
    factors = sharing_factors(list(targets), config)
    specs = tuple(spec_of(t.name, t.parameter, sharing_of(t, factors[t.name], config)) for t in targets)
    coded = {target.name for target in targets}
    plain = {name: tensor for name, tensor in module_tensors(model).items() if name not in coded}
    return _NetworkFile(specs, plain)


@dataclass(frozen=True)
class _Files:
    """What `save` or `compress_model` writes of a model with a stream per tensor, at most.

    Attributes:
        coded: shape and dtype of the coded tensors, by name.
        plain: the entries of all others, as they are now.
        scales: of the options.
    """

    coded: dict[str, tuple[tuple[int, ...], torch.dtype]]
    plain: list[TensorSpec]
    scales: str

    @property
    def n_values(self) -> int:
        """Values that are coded."""
        return sum(math.prod(shape) for shape, _ in self.coded.values())

    def n_bytes(self, code_for: CodeFor) -> int:
        """An upper bound.

        Raises:
            BudgetError: no code suits a stream.
        """
        entries = list(self.plain)
        for name, (shape, dtype) in self.coded.items():
            code = code_for(math.prod(shape), name)
            n_bytes = _payload_bytes(shape, DTYPE_NAMES[dtype], code, self.scales == "row")
            entries.append(bytes_entry(name, n_bytes))
        files = sharded(entries, parse_size(DEFAULT_SHARD_SIZE))
        return sum(file.n_bytes for file in files) + _room(entries, len(files))


def _files(model: nn.Module, targets: Sequence[Target], scales: str) -> _Files:
    coded = {t.name: (tuple(t.parameter.shape), t.parameter.dtype) for t in targets}
    own = {id(target.parameter) for target in targets}
    aliases: dict[int, str] = {}
    tensors = {name: t for name, t in model.state_dict(keep_vars=True).items() if isinstance(t, Tensor)}
    for name, tensor in tensors.items():  # of a tied tensor's names the longest may be written
        aliases[id(tensor)] = max(name, aliases.get(id(tensor), ""), key=len)
    plain = {aliases[id(tensor)]: tensor for tensor in tensors.values() if id(tensor) not in own}
    return _Files(coded, network_entries(plain, {}), scales)


@lru_cache(maxsize=1 << 14)
def _payload_bytes(shape: tuple[int, ...], dtype: str, code: Code, has_row_scales: bool) -> int:
    """Of one tensor; many of a model are alike."""
    columns = matrix_columns(shape)
    segment = Segment(math.prod(shape) // columns, code, has_row_scales and scale_columns(shape) > 0)
    return Header(dtype, shape, columns, 1, (segment,)).payload_bytes


def _room(entries: list[TensorSpec], n_files: int) -> int:
    """What headers may grow by: offsets in another order, names of narrowed vectors, metadata, shards."""
    digits = len(str(sum(entry.n_bytes for entry in entries)))
    offset, short = 0, 0
    for entry in entries:
        short += 2 * digits - len(str(offset)) - len(str(offset + entry.n_bytes))
        offset += entry.n_bytes
    names = sum(_narrowing(entry) for entry in entries)
    return short + names + n_files * _METADATA


def _narrowing(entry: TensorSpec) -> int:
    """Bytes that halving a vector adds at most: its name goes to the metadata, a list of JSON within JSON."""
    if entry.dtype != "F32" or len(entry.shape) != 1:
        return 0
    return max(0, len(json.dumps(json.dumps(entry.name))) + 2 - entry.n_bytes // 2)


# Of one file: {"format": "pt", "narrowed_from_F32": "[…]", "miracle_guard": "…"} with its key, and the
# padding of the header, twice for the shard more that another order may need.
_METADATA = 2 * (
    len('"__metadata__":{"format":"pt","narrowed_from_F32":"[]"},') + len(json.dumps(placeholder(GUARD))) + 8
)
