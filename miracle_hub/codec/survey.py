"""One look at every tensor to be coded: what it may become, and what tells it from others."""

import hashlib

import torch
from torch import Tensor

from miracle_hub.codec import payloads
from miracle_hub.codec.differences import differing, with_leaving_out
from miracle_hub.codec.payloads import Request
from miracle_hub.codec.plan import Coded, Exact, Plain, Plan, Why
from miracle_hub.codec.rates import Curve, Option
from miracle_hub.codec.source import SourceTensor
from miracle_hub.coding.matrix import matrix_columns
from miracle_hub.errors import SourceError


def survey(plans: dict[str, Plan], request: Request) -> tuple[list[Curve], dict[str, str]]:
    """What every tensor to be coded may become, and SHA-256 of its bytes; each is read once.

    Those that no codec takes become plain in `plans`.

    Raises:
        SourceError: there is nothing to code.
    """
    codecs, surveys, contents = payloads.codecs(), {}, {}
    for name, plan in [(n, p) for n, p in plans.items() if isinstance(p, Coded)]:
        weights = differing(plan)
        is_difference = plan.based is not None
        found = [codec.survey(plan.source, weights, request, is_difference) for codec in codecs]
        if all(each is None for each in found):
            plans[name] = Plain(plan.source, Why.OUT_OF_RANGE)
            continue
        surveys[name], contents[name] = found, _sha256(plan.source.load())
    if not surveys:
        whys = {p.why.text(p.source.dtype) for p in plans.values() if isinstance(p, Plain | Exact)}
        found = "; ".join(sorted(whys)) or "no tensors at all"
        raise SourceError(
            f"expected at least one tensor to compress, found none ({found}); keep this model as it is"
        )
    options: dict[str, list[Option]] = {name: [] for name in surveys}
    for i, codec in enumerate(codecs):
        asked = [name for name, found in surveys.items() if found[i] is not None]
        offers = codec.offers([surveys[name][i] for name in asked], request) if asked else []
        for name, offered in zip(asked, offers, strict=True):
            options[name] += offered
    curves = [Curve(n, _rows(plans[n].source), tuple(found)) for n, found in options.items()]
    return [with_leaving_out(c) if _is_difference(plans[c.name]) else c for c in curves], contents


def _is_difference(plan: Plan) -> bool:
    return isinstance(plan, Coded) and plan.based is not None


def _rows(source: SourceTensor) -> int:
    """Of the matrix view, by which budgets are filled."""
    return source.n_weights // matrix_columns(source.shape)


def _sha256(weights: Tensor) -> str:
    data = weights.contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.sha256(data.data).hexdigest()
