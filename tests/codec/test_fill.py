"""Budgets of a model with the shapes of all-MiniLM-L6-v2: planned to the byte, nothing encoded."""

from pathlib import Path

import pytest

from miracle_hub.codec.budget import Budget, meet_budget
from miracle_hub.codec.ladder import ladder
from miracle_hub.codec.plan import Coded, Plan, lay_out, plan_tensor
from miracle_hub.codec.rates import Curve, Option
from miracle_hub.codec.repository import total_bytes
from miracle_hub.codec.source import SourceTensor
from miracle_hub.codec.trellis import Recipe

SHAPES: dict[str, tuple[int, ...]] = {
    "embeddings.word_embeddings.weight": (30522, 384),
    "embeddings.position_embeddings.weight": (512, 384),
}
for layer in range(6):
    for name, shape in {
        "query": (384, 384),
        "key": (384, 384),
        "value": (384, 384),
        "out": (384, 384),
    }.items():
        SHAPES[f"encoder.layer.{layer}.{name}.weight"] = shape
    SHAPES[f"encoder.layer.{layer}.up.weight"] = (1536, 384)
    SHAPES[f"encoder.layer.{layer}.down.weight"] = (384, 1536)
    SHAPES[f"encoder.layer.{layer}.bias"] = (4608,)


def planned() -> tuple[dict[str, Plan], list[Curve]]:
    """Plans and curves of errors that follow the Gaussian rate–distortion bound."""
    plans, curves = {}, []
    for i, (name, shape) in enumerate(SHAPES.items()):
        plan = plan_tensor(SourceTensor(name, "F32", shape, Path("none")), [])
        plans[name] = plan
        if isinstance(plan, Coded):
            n_weights = shape[0] * shape[1]
            options = [
                Option(
                    Recipe(code, True, shape[1], 128),
                    code.message_bytes(n_weights) + 2 * shape[0],
                    (1 + i % 5) * 4.0**-code.rate * n_weights**0.6,
                )
                for code in ladder(14, 0)
            ]
            curves.append(Curve(name, shape[0], tuple(options)))
    return plans, curves


@pytest.mark.parametrize("hundredths", range(36, 800, 3))
def test_every_rate_is_filled_to_within_half_a_thousandth(hundredths: int) -> None:
    plans, curves = planned()
    n_weights = sum(plan.source.n_weights for plan in plans.values())
    target = hundredths * n_weights // 800
    budget = Budget(target, 0, n_weights, 5 * 10**9)
    choices = meet_budget(plans, curves, budget)
    found = total_bytes(lay_out(plans, choices, budget.max_shard_bytes))
    assert 0.9995 * target <= found <= target
