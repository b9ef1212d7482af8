"""Every bit of a model kept: each tensor as what it has beyond a base's, or in fewer bytes by itself."""

from dataclasses import replace

from torch import Tensor
from tqdm import tqdm

from miracle_hub.codec.bits import bits_payload
from miracle_hub.codec.differences import Differences
from miracle_hub.codec.exact import exact_payload
from miracle_hub.codec.finite import first_non_finite
from miracle_hub.codec.keeping import Roles, keep_exact
from miracle_hub.codec.plan import Coded, Exact, Plain, Plan, Same, Why
from miracle_hub.options import CompressOptions

# Only what is as good as another tensor takes more of its bytes beside a base's. By itself a matrix takes
# 0.83 of them in float32, 0.68 in bfloat16, and far less where it is simple; to try that takes longer.
_MAY_BE_SHORTER_ALONE = 2 / 3
_TELLING = (Why.NOT_FLOATING, Why.OTHER_DTYPE)


def keep(
    plans: dict[str, Plan], roles: Roles, differences: Differences | None, options: CompressOptions
) -> list[str]:
    """Replace the plans of tensors whose every bit is kept; returns the names of those with NaN or infinity.

    They are those that are no weights, or, in a lossless compression, all. Its payloads are made here, and
    held in memory: how long they are depends on the values.

    Args:
        roles: see `keep_exact`.
        differences: to a base, if there is one.

    Raises:
        NonFiniteWeightError: weights are not finite, and bits are to be lost.
        SourceError: a tensor cannot be read. BaseModelError: one of the base's cannot.
    """
    if not options.exact:
        return keep_exact(plans, roles)
    non_finite = []
    for name, plan in tqdm(plans.items(), desc="lossless", unit="tensors", disable=not options.progress):
        if isinstance(plan, Same):
            continue
        values = plan.source.load()
        if first_non_finite(values) is not None:
            non_finite.append(name)
        if isinstance(plan, Plain | Coded):
            plans[name] = _kept(plan, values)
    if differences is not None:
        digests = differences.base.digests.items()
        used = {name: digest for name, digest in digests if _is_of_base(plans[name])}
        differences.base = replace(differences.base, digests=used)
    return non_finite


def _kept(plan: Plain | Coded, values: Tensor) -> Plain | Exact:
    source = plan.source
    if isinstance(plan, Plain) and plan.why in (Why.EXCLUDED, Why.EMPTY):
        return Plain(source, plan.why)
    beside = _beside_base(plan, values)
    if beside is not None and len(beside) <= _MAY_BE_SHORTER_ALONE * source.n_bytes:
        return Exact(source, Why.BITS, beside)
    alone = exact_payload(values)
    if beside is not None and (alone is None or len(beside) <= len(alone)):
        return Exact(source, Why.BITS, beside)
    why = plan.why if isinstance(plan, Plain) and plan.why in _TELLING else Why.LOSSLESS
    return Plain(source, why) if alone is None else Exact(source, why, alone)


def _beside_base(plan: Plain | Coded, values: Tensor) -> bytes | None:
    """The payload of what a tensor has beyond that of a base; None where there is none."""
    if isinstance(plan, Plain) or plan.based is None:
        return None
    base = plan.based.load_base()
    return None if base is None else bits_payload(values, base)


def _is_of_base(plan: Plan) -> bool:
    return isinstance(plan, Same) or (isinstance(plan, Exact) and plan.why is Why.BITS)
