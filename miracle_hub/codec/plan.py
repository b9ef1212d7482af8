"""What happens to each tensor: it is coded here, coded already, or stays plain, and why."""

from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path

from torch import Tensor

from miracle_hub.code import MAX_DIMENSIONS
from miracle_hub.codec.payloads import codec_named, is_payload, is_stray_stream
from miracle_hub.codec.rates import LEFT_OUT, Chosen
from miracle_hub.codec.repository import OutputFile, sharded
from miracle_hub.codec.source import SourceTensor, list_tensors, narrowing_metadata
from miracle_hub.codec.stored import StoredTensor
from miracle_hub.coding.narrowing import half_holds, is_narrowable
from miracle_hub.errors import SourceError
from miracle_hub.format.payload import DTYPES
from miracle_hub.format.spec import TensorSpec, bytes_entry, item_bits
from miracle_hub.names import check_taken, matches

# Below this a payload's header and scales (40 bytes and more) outweigh what coding saves at 2 bits and more.
_SMALLEST_CODED = 1024
# Vectors are norms and biases, to which models are sensitive: choices, not measured.
_SMALLEST_CODED_VECTOR = 1 << 15


class Why(Enum):
    """Why a tensor stays plain; the value is for people, `{dtype}` its dtype."""

    NOT_FLOATING = "dtype {dtype} is not floating point"
    OTHER_DTYPE = "dtype {dtype}"
    EMPTY = "empty"
    EXCLUDED = "excluded by modules_to_not_convert"
    SHORT_VECTOR = f"a vector of fewer than {_SMALLEST_CODED_VECTOR} weights"
    SMALL = f"fewer than {_SMALLEST_CODED} weights"
    OUT_OF_RANGE = "root mean square outside 2^-40 … 2^40"
    TOO_LARGE = "values near the end of the range of {dtype}, or beyond that of F32"
    NO_BUDGET = "no budget for it"
    BUFFER = "a buffer of the model's class, kept exact"
    WHOLE = "whole numbers, kept exact"
    FEW = "few different values, kept exact"
    TABLE = "a table, kept exact"
    STATISTICS = "statistics of a batch norm"
    LOSSLESS = "every bit kept, as asked"
    BITS = "every bit kept, as what it has beyond the base's"

    def text(self, dtype: str) -> str:
        """For people."""
        return self.value.format(dtype=dtype)


@dataclass(frozen=True)
class Plain:
    """A tensor that is stored as it is, or in half the bits if `is_narrowed`.

    Attributes:
        tuned: what it became to suit what was coded, in its dtype and shape.
    """

    source: SourceTensor
    why: Why
    is_narrowed: bool = False
    tuned: Tensor | None = None

    def load(self) -> Tensor:
        """The tensor to store, but for the dtype."""
        return self.source.load() if self.tuned is None else self.tuned


@dataclass(frozen=True)
class Ready:
    """A tensor whose payload was made elsewhere, as by training."""

    source: SourceTensor
    payload: bytes


@dataclass(frozen=True)
class Coded:
    """A tensor that is to be coded here.

    Attributes:
        based: the base's tensor, if it is the difference to that which is coded.
    """

    source: SourceTensor
    based: StoredTensor | None = None


@dataclass(frozen=True)
class Same:
    """A tensor of which nothing is stored: it is the base's.

    Attributes:
        based: the base's tensor, if it differs from that, by what is not worth its bytes.
    """

    source: SourceTensor
    based: StoredTensor | None = None


@dataclass(frozen=True)
class Exact:
    """A tensor of which every bit is kept, by itself or beside a base's; its payload is made already."""

    source: SourceTensor
    why: Why
    payload: bytes


Plan = Plain | Exact | Ready | Coded | Same


def plan_tensor(tensor: SourceTensor, excluded: list[str] | str) -> Plain | Coded:
    """What happens to a tensor that nobody coded before, by its header alone.

    Raises:
        SourceError: it has more dimensions than readers take.
    """
    why = why_plain(tensor, excluded)
    if why is not None:
        return Plain(tensor, why)
    if len(tensor.shape) > MAX_DIMENSIONS:
        raise SourceError(
            f"{tensor.path}: {tensor.name}: expected at most {MAX_DIMENSIONS} dimensions, found shape "
            f"{list(tensor.shape)}; reshape it, or leave it out with modules_to_not_convert"
        )
    return Coded(tensor)


def why_plain(spec: TensorSpec, excluded: list[str] | str) -> Why | None:
    """Why a tensor stays plain, as far as its header tells; None if it is to be coded.

    Args:
        excluded: what the user wants to stay as it is.
    """
    if spec.dtype not in DTYPES:
        return Why.NOT_FLOATING if spec.dtype[0] in "IUB" else Why.OTHER_DTYPE
    if spec.n_weights == 0:
        return Why.EMPTY
    if matches(spec.name, excluded):
        return Why.EXCLUDED
    if len(spec.shape) < 2 and spec.n_weights < _SMALLEST_CODED_VECTOR:
        return Why.SHORT_VECTOR
    return Why.SMALL if spec.n_weights < _SMALLEST_CODED else None


def plan_all(
    weights: list[Path],
    excluded: list[str] | str,
    coded: Mapping[str, bytes],
    half: Set[str] | None = None,
) -> dict[str, Plan]:
    """The plan of every tensor of the source.

    Args:
        coded: payloads of tensors that are coded already.
        half: see `narrowed`.

    Raises:
        SourceError: a tensor looks like a payload or has more dimensions than readers take, or a payload is
            that of no tensor.
        OptionError: a name that the user excludes takes nothing.
    """
    plans: dict[str, Plan] = {}
    for tensor in list_tensors(weights):
        _refuse_coded(tensor)
        if tensor.name in coded:
            plans[tensor.name] = Ready(tensor, coded[tensor.name])
        else:
            plan = plan_tensor(tensor, excluded)
            plans[tensor.name] = narrowed(plan, half) if isinstance(plan, Plain) else plan
    if missing := sorted(set(coded) - set(plans)):
        raise SourceError(
            f"payloads: expected those of tensors of the source, found one of {missing[0]!r}, which it has "
            f"not; it has {', '.join(sorted(plans)[:4])}, …"
        )
    if not coded:  # with payloads the names are those of a module, of which a file has tied ones once
        check_taken(excluded, sorted(plans), "modules_to_not_convert", "the model")
    return plans


def _refuse_coded(tensor: SourceTensor) -> None:
    """
    Raises:
        SourceError: readers would take a plain tensor for a payload or a network's stream.
    """
    if not tensor.is_bytes:
        return
    head = tensor.head(4)
    if is_payload(head) or is_stray_stream(tensor.name, head):
        raise SourceError(
            f"{tensor.path}: {tensor.name}: expected plain numbers, found bytes that begin like a "
            f"compressed tensor ({bytes(head.tolist()).decode()}), which readers would take for one; "
            "decompress the source first, or store the tensor in another dtype or shape"
        )


def narrowed(plan: Plain, half: Set[str] | None = None) -> Plain:
    """Store a float32 weight or bias vector in 16 bits when float16 holds it; see `coding.narrowing`.

    Tensors that the user wants to stay as they are keep their 32 bits.

    Args:
        half: names of the vectors to store so, where that was decided before.
    """
    source = plan.source
    if half is not None:
        return replace(plan, is_narrowed=source.name in half)
    is_kept = plan.why is Why.EXCLUDED or source.dtype != "F32"
    if is_kept or not is_narrowable(source.name, source.shape):
        return plan
    return replace(plan, is_narrowed=half_holds(source.load()))


def entry_of(plan: Plan, choices: Mapping[str, Chosen]) -> TensorSpec | None:
    """The tensor as the output file will hold it; None if it holds nothing of it."""
    source = plan.source
    match plan:
        case Plain():
            return TensorSpec(source.name, "F16" if plan.is_narrowed else source.dtype, source.shape)
        case Ready() | Exact():
            return bytes_entry(source.name, len(plan.payload))
        case Coded():
            choice = choices[source.name]
            if choice.option.codec == LEFT_OUT:
                return None
            return bytes_entry(source.name, codec_named(choice.option.codec).payload_bytes(source, choice))
        case Same():
            return None


def lay_out(
    plans: Mapping[str, Plan], choices: Mapping[str, Chosen], max_shard_bytes: int, stem: str = "model"
) -> list[OutputFile]:
    """The output files. Plain tensors come first, widest dtype first, so that they stay aligned."""
    entries = [entry for plan in plans.values() if (entry := entry_of(plan, choices)) is not None]
    coded = sorted((e for e in entries if not isinstance(plans[e.name], Plain)), key=lambda e: e.name)
    entries = [*in_order([e for e in entries if isinstance(plans[e.name], Plain)]), *coded]
    files = sharded(entries, max_shard_bytes, stem)
    half = {n for n, plan in plans.items() if isinstance(plan, Plain) and plan.is_narrowed}
    return [replace(f, metadata=f.metadata | narrowing_metadata(f.entries, half)) for f in files]


def in_order(plain: Iterable[TensorSpec]) -> list[TensorSpec]:
    """Plain tensors as a file has them, widest dtype first."""
    return sorted(plain, key=lambda entry: (-item_bits(entry.dtype), entry.name))
