"""Which tensors are coded, which stay plain, and how large the files will be, to the byte."""

import json
import math
from dataclasses import dataclass, replace

from miracle_hub.codec.artifact import OutputFile, shard_entries
from miracle_hub.codec.rates import Choice, Sample, allocate, extreme_choices
from miracle_hub.codec.source import SourceTensor, item_bits
from miracle_hub.codec.tensor import matrix_columns
from miracle_hub.coding.rotation import widest_rotation
from miracle_hub.errors import BudgetError
from miracle_hub.files.container import Entry
from miracle_hub.format.payload import DTYPES, Header, Segment
from miracle_hub.names import matches

# Below this a payload's header and scales outweigh what coding saves.
_SMALLEST_CODED = 1024
_SMALLEST_CODED_VECTOR = 1 << 15
# Relative squared error of rounding to 11 bits, with room for a few subnormal elements.
_NARROWING_ERROR = 2.0**-22
_FILL_ROUNDS = 24
# Far inside the range of scales, so that rows and squares stay inside theirs.
LARGEST_RMS = 2.0**40
EXCLUDED = "excluded by modules_to_not_convert"
OUT_OF_RANGE = "root mean square outside 2^-40 … 2^40"


@dataclass(frozen=True)
class Budget:
    """The largest size of all safetensors files together.

    Attributes:
        n_bytes: never exceeded.
        other_bytes: of files in subfolders, which are copied as they are, and of stages above the first.
        n_weights: of the source, copied ones included.
        max_shard_bytes: of one file, whose name begins with `stem`.
    """

    n_bytes: int
    other_bytes: int
    n_weights: int
    max_shard_bytes: int
    stem: str = "model"


@dataclass(frozen=True)
class TensorPlan:
    """What happens to one tensor; `reason` says why it is not coded here (empty: it is).

    Attributes:
        payload: of a tensor that training has coded.
    """

    source: SourceTensor
    reason: str
    columns: int = 1
    rotation: int = 1
    narrowed: bool = False
    payload: bytes | None = None


def reason_plain(name: str, dtype: str, shape: tuple[int, ...], excluded: list[str] | str) -> str:
    """Why a tensor is stored plainly; empty when it is coded."""
    n_weights = math.prod(shape)
    if dtype not in DTYPES:
        return f"dtype {dtype} is not floating point" if dtype[0] in "IUB" else f"dtype {dtype}"
    if n_weights == 0:
        return "empty"
    if matches(name, excluded):
        return EXCLUDED
    if len(shape) < 2 and n_weights < _SMALLEST_CODED_VECTOR:
        return f"a vector of fewer than {_SMALLEST_CODED_VECTOR} weights"
    if n_weights < _SMALLEST_CODED:
        return f"fewer than {_SMALLEST_CODED} weights"
    return ""


def plan_tensor(tensor: SourceTensor, rotation: int, excluded: list[str] | str) -> TensorPlan:
    """The plan of one tensor, rotated by the widest power of two up to `rotation` that divides its rows."""
    reason = reason_plain(tensor.name, tensor.dtype, tensor.shape, excluded)
    if reason:
        return TensorPlan(tensor, reason)
    columns = matrix_columns(tensor.shape)
    return TensorPlan(tensor, "", columns, widest_rotation(columns, rotation))


def planned_header(plan: TensorPlan, choice: Choice) -> Header:
    """The header that the tensor's payload will have, but for its digest and error."""
    segments = tuple(Segment(s.rows, s.code, s.row_scales) for s in choice.segments())
    source = plan.source
    return Header(source.dtype, source.shape, plan.columns, plan.rotation, segments)


def entry_of(plan: TensorPlan, choices: dict[str, Choice]) -> Entry:
    """The tensor as the output file will hold it."""
    source = plan.source
    if plan.payload is not None:
        return Entry(source.name, "U8", (len(plan.payload),), len(plan.payload))
    if not plan.reason:
        n_bytes = planned_header(plan, choices[source.name]).payload_bytes
        return Entry(source.name, "U8", (n_bytes,), n_bytes)
    if plan.narrowed:
        return Entry(source.name, "F16", source.shape, source.n_bytes // 2)
    return Entry(source.name, source.dtype, source.shape, source.n_bytes)


def file_metadata(entries: list[Entry], plans: dict[str, TensorPlan]) -> dict[str, str]:
    """The files' metadata: which F16 tensors were F32 in the source."""
    half = [entry.name for entry in entries if entry.dtype == "F16"]
    narrowed = [name for name in half if plans[name].narrowed]
    metadata = {"format": "pt"}
    if narrowed:
        metadata["narrowed_from_F32"] = "*" if narrowed == half else json.dumps(narrowed)
    return metadata


def lay_out(
    plans: dict[str, TensorPlan], choices: dict[str, Choice], max_shard_bytes: int, stem: str = "model"
) -> list[OutputFile]:
    """The output files. Plain tensors come first, widest dtype first, so that they stay aligned."""
    entries = [entry_of(plan, choices) for plan in plans.values()]
    entries.sort(key=lambda e: (_is_coded(plans[e.name]), -item_bits(e.dtype), e.name))
    files = shard_entries(entries, max_shard_bytes, stem)
    return [replace(file, metadata=file_metadata(file.entries, plans)) for file in files]


def _is_coded(plan: TensorPlan) -> bool:
    return not plan.reason or plan.payload is not None


def total_bytes(files: list[OutputFile]) -> int:
    """Bytes of the files together, headers included."""
    return sum(file.n_bytes for file in files)


def meet_budget(plans: dict[str, TensorPlan], samples: list[Sample], budget: Budget) -> dict[str, Choice]:
    """Choices whose files together fill the budget as nearly as rows allow, and never exceed it.

    Raises:
        BudgetError: it is below the least or above the most that the ladder allows.
    """

    def size(choices: dict[str, Choice]) -> int:
        return total_bytes(lay_out(plans, choices, budget.max_shard_bytes, budget.stem)) + budget.other_bytes

    _check_range(budget, *(size(extreme_choices(samples, most)) for most in (False, True)))
    best = extreme_choices(samples, most=False)
    best_size = size(best)
    payload_bytes = budget.n_bytes - best_size + sum(choice.n_bytes for choice in best.values())
    step_back = 1
    for _ in range(_FILL_ROUNDS):
        choices = allocate(samples, payload_bytes)
        found = size(choices)
        if best_size < found <= budget.n_bytes:
            best, best_size = choices, found
        if found == budget.n_bytes:
            break
        if found < budget.n_bytes:
            payload_bytes += budget.n_bytes - found
        else:
            # Sizes move by whole rows: stepping back by the excess alone could leave them as they are.
            payload_bytes -= max(found - budget.n_bytes, step_back)
            step_back *= 2
    return best


def _check_range(budget: Budget, least: int, most: int) -> None:
    # Rates are rounded inwards, so that asking for the printed one works.
    unit = budget.n_weights / 8 / 10_000
    if budget.n_bytes < least:
        raise BudgetError(
            f"size: {budget.n_bytes:,} bytes were asked for, but the least possible is {least:,} bytes "
            f"({math.ceil(least / unit) / 10_000} bits per weight: every matrix at the lowest rate, vectors "
            "plain); ask for that or more"
        )
    if budget.n_bytes > most:
        raise BudgetError(
            f"size: {budget.n_bytes:,} bytes were asked for, but the most this model can use is {most:,} "
            f"bytes ({math.floor(most / unit) / 10_000} bits per weight: every matrix at the highest rate); "
            "ask for that or less"
        )


def mark_narrowed(plan: TensorPlan) -> TensorPlan:
    """Store a float32 weight or bias vector in 16 bits when float16 holds it to about 11 bits.

    Other vectors (running statistics, rotary frequencies) keep their 32 bits: models can be
    sensitive to their last digits.
    """
    source = plan.source
    is_affine = source.name.endswith((".weight", ".bias")) and len(source.shape) == 1 and source.n_weights
    is_exact = plan.payload is not None or plan.reason == EXCLUDED
    if not plan.reason or is_exact or source.dtype != "F32" or not is_affine:
        return plan
    values = source.load().double()
    error = (values.half().double() - values).square().sum()
    return replace(plan, narrowed=bool(error <= _NARROWING_ERROR * values.square().sum()))
