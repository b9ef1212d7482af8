"""Which tensors are coded, which stay plain, and how large the files will be, to the byte."""

import json
import math
from dataclasses import dataclass, replace

from miracle_hub.codec.artifact import OutputFile, shard_entries
from miracle_hub.codec.rates import Choice, Sample, allocate, extreme_choices
from miracle_hub.codec.source import SourceTensor
from miracle_hub.codec.tensor import matrix_columns
from miracle_hub.coding.rotation import check_width, widest_rotation
from miracle_hub.errors import BudgetError
from miracle_hub.format.container import Entry
from miracle_hub.format.payload import DTYPES, Header, Segment

# Below this a payload's header and scales outweigh what coding saves.
_SMALLEST_CODED = 1024
_SMALLEST_CODED_VECTOR = 1 << 15
# Relative squared error of rounding to 11 bits, with room for a few subnormal elements.
_NARROWING_ERROR = 2.0**-22
_FILL_ROUNDS = 12


@dataclass(frozen=True)
class TensorPlan:
    """What happens to one tensor; `reason` says why it stays plain (empty: it is coded)."""

    source: SourceTensor
    reason: str
    columns: int = 1
    rotation: int = 1
    narrowed: bool = False


def reason_plain(name: str, dtype: str, shape: tuple[int, ...], excluded: list[str]) -> str:
    """Why a tensor is stored plainly; empty when it is coded."""
    n_weights = math.prod(shape)
    if dtype not in DTYPES:
        return f"dtype {dtype} is not floating point" if dtype[0] in "IUB" else f"dtype {dtype}"
    if n_weights == 0:
        return "empty"
    if any(part in name for part in excluded):
        return "excluded by modules_to_not_convert"
    if len(shape) < 2 and n_weights < _SMALLEST_CODED_VECTOR:
        return f"a vector of fewer than {_SMALLEST_CODED_VECTOR} weights"
    if n_weights < _SMALLEST_CODED:
        return f"fewer than {_SMALLEST_CODED} weights"
    return ""


def plan_tensor(tensor: SourceTensor, rotation: int | None, excluded: list[str]) -> TensorPlan:
    """The plan of one tensor; `rotation` None picks the widest up to 128 that divides its rows.

    Raises:
        OptionError: an explicit rotation width does not divide the tensor's columns.
    """
    reason = reason_plain(tensor.name, tensor.dtype, tensor.shape, excluded)
    if reason:
        return TensorPlan(tensor, reason)
    columns = matrix_columns(tensor.shape)
    if rotation is None:
        return TensorPlan(tensor, "", columns, widest_rotation(columns))
    check_width(rotation, columns, tensor.name)
    return TensorPlan(tensor, "", columns, rotation)


def planned_header(plan: TensorPlan, choice: Choice) -> Header:
    """The header that the tensor's payload will have, but for its digest and error."""
    segments = tuple(Segment(s.rows, s.code, s.row_scales) for s in choice.segments())
    source = plan.source
    return Header(source.dtype, source.shape, plan.columns, plan.rotation, segments)


def entry_of(plan: TensorPlan, choices: dict[str, Choice]) -> Entry:
    """The tensor as the output file will hold it."""
    source = plan.source
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
    plans: dict[str, TensorPlan], choices: dict[str, Choice], max_shard_bytes: int
) -> list[OutputFile]:
    """The output files. Plain tensors come first, widest dtype first, so that they stay aligned."""
    entries = [entry_of(plan, choices) for plan in plans.values()]
    width = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4}
    entries.sort(key=lambda e: (not plans[e.name].reason, -width.get(e.dtype, 2), e.name))
    files = shard_entries(entries, max_shard_bytes)
    return [replace(file, metadata=file_metadata(file.entries, plans)) for file in files]


def total_bytes(files: list[OutputFile]) -> int:
    return sum(file.n_bytes for file in files)


def meet_budget(
    plans: dict[str, TensorPlan],
    samples: list[Sample],
    target_bytes: int,
    max_shard_bytes: int,
) -> dict[str, Choice]:
    """Choices whose files together take at most `target_bytes`, and as nearly that as rows allow.

    Args:
        target_bytes: for the files that `lay_out` describes.

    Raises:
        BudgetError: the target is below the least or above the most that the ladder allows.
    """

    def size(choices: dict[str, Choice]) -> int:
        return total_bytes(lay_out(plans, choices, max_shard_bytes))

    _check_range(target_bytes, *(size(extreme_choices(samples, most)) for most in (False, True)))
    best = extreme_choices(samples, most=False)
    best_size = size(best)
    budget = target_bytes - best_size + sum(choice.n_bytes for choice in best.values())
    for _ in range(_FILL_ROUNDS):
        choices = allocate(samples, budget)
        found = size(choices)
        if best_size < found <= target_bytes:
            best, best_size = choices, found
        if found == target_bytes:
            break
        budget += target_bytes - found
    return best


def _check_range(target: int, least: int, most: int) -> None:
    if target < least:
        raise BudgetError(
            f"size: {target:,} bytes were asked for, but the least possible is {least:,} bytes (every "
            "matrix at 0.25 bits per weight, vectors plain); ask for that or more"
        )
    if target > most:
        raise BudgetError(
            f"size: {target:,} bytes were asked for, but the most this model can use is {most:,} bytes "
            "(every matrix at 8 bits per weight); ask for that or less"
        )


def mark_narrowed(plan: TensorPlan) -> TensorPlan:
    """Store a float32 weight or bias vector in 16 bits when float16 holds it to about 11 bits.

    Other vectors (running statistics, rotary frequencies) keep their 32 bits: models can be
    sensitive to their last digits.
    """
    source = plan.source
    is_affine = source.name.endswith((".weight", ".bias")) and len(source.shape) == 1
    if not plan.reason or source.dtype != "F32" or not is_affine:
        return plan
    values = source.load().double()
    error = (values.half().double() - values).square().sum()
    return replace(plan, narrowed=bool(error <= _NARROWING_ERROR * values.square().sum()))
