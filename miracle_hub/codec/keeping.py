"""Which tensors are kept exact, because they are no weights: what the model's class says, else their values.

A mask or a table that is coded like weights loses what it stands for: a causal mask of zeros and ones lets a
model read the future. Exact tensors come before all rates, so that budgets count them.
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from miracle_hub.codec.constants import constant_kind
from miracle_hub.codec.exact import exact_payload
from miracle_hub.codec.finite import first_non_finite, is_taken
from miracle_hub.codec.plan import Coded, Exact, Plain, Plan, Ready, Same, Why
from miracle_hub.codec.source import SourceTensor
from miracle_hub.errors import NonFiniteWeightError

# Of the largest number of a dtype. Only of float16 is it far inside the range of what is coded.
_LARGEST_SHARE = 0.5
# Of a file; above it the rates of all others suffer: a choice.
_MUCH = 0.2


@dataclass(frozen=True)
class Roles:
    """What a model's class says of the tensors of its checkpoint, by their names there.

    Attributes:
        said_by: the class, or why there is none: then values decide.
        names: the class's, of tensors that it calls otherwise.
    """

    buffers: frozenset[str] = frozenset()
    parameters: frozenset[str] = frozenset()
    said_by: str = "values alone: no class of the model was asked"
    names: Mapping[str, str] = field(default_factory=dict)


def keep_exact(plans: dict[str, Plan], roles: Roles) -> list[str]:
    """Replace the plans of tensors that are no weights; returns the names of those with NaN or infinity.

    Every tensor is read, one at a time.

    Raises:
        NonFiniteWeightError: weights are not finite.
        SourceError: a tensor cannot be read.
    """
    non_finite = []
    for name, plan in plans.items():
        if isinstance(plan, Ready | Same):
            continue
        values = plan.source.load()
        if (at := first_non_finite(values)) is not None:
            if not _may_be_non_finite(plan, values, roles):
                raise _non_finite(plan.source, values, at)
            non_finite.append(name)
        plans[name] = _planned(plan, values, roles)
    return non_finite


def _may_be_non_finite(plan: Plan, values: Tensor, roles: Roles) -> bool:
    name = plan.source.name
    if isinstance(plan, Plain) and plan.why is Why.EXCLUDED:
        return True
    return name in roles.buffers or (name not in roles.parameters and is_taken(name, values, ()))


def _planned(plan: Plan, values: Tensor, roles: Roles) -> Plan:
    name = plan.source.name
    if isinstance(plan, Plain) and plan.why in (Why.EXCLUDED, Why.EMPTY):
        return plan
    if name in roles.buffers:
        return _kept(plan.source, values, Why.BUFFER)
    if isinstance(plan, Coded):
        kind = constant_kind(values, may_be_fitted=name in roles.parameters)
        if kind is not None:
            return _kept(plan.source, values, Why[kind.name])
        return Plain(plan.source, Why.TOO_LARGE) if _is_too_large(values) else plan
    if isinstance(plan, Plain) and plan.why is Why.NOT_FLOATING:
        return _kept(plan.source, values, plan.why)
    return plan


def _is_too_large(values: Tensor) -> bool:
    """Whether what is decoded, which may be larger than the source, could be infinite to readers."""
    largest, own = float(values.abs().max()), torch.finfo(values.dtype).max
    return largest > min(own * _LARGEST_SHARE, torch.finfo(torch.float32).max)


def _kept(source: SourceTensor, values: Tensor, why: Why) -> Plan:
    """Exact in fewer bytes where that is possible, else plain."""
    payload = exact_payload(values)
    if payload is None or len(payload) >= source.n_bytes:
        return Plain(source, why)
    return Exact(source, why, payload)


def _non_finite(source: SourceTensor, values: Tensor, at: int) -> NonFiniteWeightError:
    return NonFiniteWeightError(
        f"{source.name}: expected finite weights, found {values.flatten()[at].item()} at position {at} "
        f"({source.path}); repair the model, or leave the tensor out with modules_to_not_convert"
    )


def kept_bytes(plans: Mapping[str, Plan]) -> dict[str, int]:
    """Bytes of the tensors that are stored as they are, plain or exact, by name, the largest first."""
    found = {}
    for name, plan in plans.items():
        if isinstance(plan, Exact):
            found[name] = len(plan.payload)
        elif isinstance(plan, Plain):
            found[name] = plan.source.n_bytes // (2 if plan.is_narrowed else 1)
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def warn_of_kept(plans: Mapping[str, Plan], file_bytes: int) -> None:
    """Say it where tensors that stay as they are take much of a file: no rate can make up for that."""
    found = kept_bytes(plans)
    if sum(found.values()) <= _MUCH * file_bytes:
        return
    warnings.warn(
        f"expected at most {_MUCH:.0%} of {file_bytes:,} bytes to be tensors that stay as they are, found "
        f"{sum(found.values()) / file_bytes:.0%}: {said_of_kept(plans)}; leave less out with "
        "modules_to_not_convert, make what need not be saved a buffer that is not persistent, or allow for "
        "a larger file",
        stacklevel=3,
    )


def said_of_kept(plans: Mapping[str, Plan], most: int = 3) -> str:
    """The largest tensors that stay as they are, with their bytes and why, for people."""
    found = list(kept_bytes(plans).items())
    texts = []
    for name, n_bytes in found[:most]:
        plan = plans[name]
        assert isinstance(plan, Plain | Exact)
        texts.append(f"{name} ({n_bytes:,} bytes, {plan.why.text(plan.source.dtype)})")
    return ", ".join(texts) + (f" and {len(found) - most} more" if len(found) > most else "")
