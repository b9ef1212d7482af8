"""Curves of all tensors by what is known of their errors' costs: measured, or by rules that need no data."""

from collections.abc import Mapping

from miracle_hub.codec.curvature import Curvature
from miracle_hub.codec.differences import by_answers, differing
from miracle_hub.codec.knowledge import Knowledge, weighed
from miracle_hub.codec.payloads import Request
from miracle_hub.codec.plan import Coded, Plan
from miracle_hub.codec.rates import Curve


def by_cost(
    curves: list[Curve],
    plans: Mapping[str, Plan],
    known: Mapping[str, Curvature],
    worth: Mapping[str, float],
    request: Request,
    knowledge: Knowledge | None,
) -> list[Curve]:
    """Curves by what errors cost, as far as anything is known of that.

    Args:
        worth: by which errors are multiplied already, beside sizes.
    """
    coded = {curve.name: plan for curve in curves if isinstance(plan := plans[curve.name], Coded)}
    if knowledge is not None and any(plan.based for plan in coded.values()):
        return by_answers(curves, coded, knowledge.without)
    costs = {
        name: curvature.cost(differing(coded[name]), request.rotation, request.backend)
        for name, curvature in known.items()
    }
    return weighed(curves, costs, {name: plan.source.n_weights for name, plan in coded.items()}, worth)
