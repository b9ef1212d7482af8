"""The choices whose files fill a size as nearly as rows allow, and never exceed it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from miracle_hub.codec.keeping import kept_bytes, said_of_kept
from miracle_hub.codec.plan import Plain, Plan, lay_out
from miracle_hub.codec.rates import Chosen, Curve, allocate, extreme_choices
from miracle_hub.codec.repository import total_bytes
from miracle_hub.errors import BudgetError
from miracle_hub.sizes import amount, asked_for

# Attempts at filling a budget to the byte: a choice.
_FILL_ROUNDS = 24


@dataclass(frozen=True)
class Budget:
    """The largest size of all safetensors files together.

    Attributes:
        n_bytes: never exceeded.
        other_bytes: of files in subfolders, which are copied as they are, and of stages above the first.
        n_weights: of the source, copied ones included.
        bits_per_weight: the same, if it was given so; for messages.
        max_shard_bytes: of one file, whose name begins with `stem`.
    """

    n_bytes: int
    other_bytes: int
    n_weights: int
    max_shard_bytes: int
    stem: str = "model"
    bits_per_weight: float | None = None


def meet_budget(plans: Mapping[str, Plan], curves: Sequence[Curve], budget: Budget) -> dict[str, Chosen]:
    """Choices whose files together fill the budget as nearly as rows allow, and never exceed it.

    Raises:
        BudgetError: it is below the least or above the most that the options allow.
    """
    least, most = (extreme_choices(curves, most) for most in (False, True))
    best, best_size = least, _size(plans, least, budget)
    _check_range(budget, plans, best_size, _size(plans, most, budget))
    payload_bytes = budget.n_bytes - best_size + sum(choice.n_bytes for choice in best.values())
    step_back = 1
    for _ in range(_FILL_ROUNDS):
        choices = allocate(curves, payload_bytes)
        found = _size(plans, choices, budget)
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


def require_reachable(plans: Mapping[str, Plan], curves: Sequence[Curve], budget: Budget) -> None:
    """Refuse what no choice can meet before anything slow begins.

    Calibration may store vectors of 32 bits in 16: what is so near to the least is left to `meet_budget`.

    Raises:
        BudgetError: the budget is below the least or above the most that the options allow.
    """
    sizes = [_size(plans, extreme_choices(curves, most), budget) for most in (False, True)]
    plain = [plan.source for plan in plans.values() if isinstance(plan, Plain)]
    saved = 2 * sum(source.n_weights for source in plain if source.dtype == "F32")
    if not sizes[0] - saved <= budget.n_bytes < sizes[0]:
        _check_range(budget, plans, *sizes)


def _size(plans: Mapping[str, Plan], choices: dict[str, Chosen], budget: Budget) -> int:
    return total_bytes(lay_out(plans, choices, budget.max_shard_bytes, budget.stem)) + budget.other_bytes


def _check_range(budget: Budget, plans: Mapping[str, Plan], least: int, most: int) -> None:
    # Rates are rounded inwards, so that asking for the printed one works.
    unit, in_bits = budget.n_weights / 8 / 10_000, budget.bits_per_weight is not None
    asked = asked_for(budget.bits_per_weight, budget.n_bytes)
    if budget.n_bytes < least:
        why = f"every matrix at the lowest rate, vectors plain{_said_of_kept(budget, plans)}"
        possible = amount(least, math.ceil(least / unit) / 10_000, why, in_bits=in_bits)
        raise BudgetError(
            f"{asked}, but the least possible is {possible}; ask for that or more{_said_of_others(budget)}"
        )
    if budget.n_bytes > most:
        why = "every matrix at the highest rate"
        possible = amount(most, math.floor(most / unit) / 10_000, why, in_bits=in_bits)
        raise BudgetError(f"{asked}, but the most this model can use is {possible}; ask for that or less")


def _said_of_others(budget: Budget) -> str:
    if not budget.other_bytes:
        return ""
    return f"; {budget.other_bytes:,} bytes of that are not the base's own: copied files or later stages"


def _said_of_kept(budget: Budget, plans: Mapping[str, Plan]) -> str:
    """Which tensors exceed the budget alone, if those that stay as they are do."""
    n_bytes = sum(kept_bytes(plans).values())
    if n_bytes <= budget.n_bytes:
        return ""
    return f"; tensors that stay as they are take {n_bytes:,} bytes alone: {said_of_kept(plans)}"
