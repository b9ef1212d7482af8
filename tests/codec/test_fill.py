"""Budgets of a model with the shapes of all-MiniLM-L6-v2: planned to the byte, nothing encoded."""

from pathlib import Path

import pytest
import torch

from miracle_hub.codec.plan import Budget, TensorPlan, lay_out, meet_budget, plan_tensor, total_bytes
from miracle_hub.codec.rates import Option, Sample, ladder
from miracle_hub.codec.source import SourceTensor

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


def planned() -> tuple[dict[str, TensorPlan], list[Sample]]:
    """Plans and samples whose errors follow the Gaussian rate–distortion curve."""
    plans, samples = {}, []
    for i, (name, shape) in enumerate(SHAPES.items()):
        plan = plan_tensor(SourceTensor(name, Path("none"), "F32", shape), 128, [])
        plans[name] = plan
        if not plan.reason:
            n_weights = shape[0] * shape[1]
            options = [
                Option(
                    code,
                    True,
                    code.message_bytes(n_weights) + 2 * shape[0],
                    (1 + i % 5) * 4.0**-code.rate * n_weights**0.6,
                )
                for code in ladder(14, 0)
            ]

            samples.append(Sample(name, shape[0], plan.columns, torch.zeros(1, 1), 1.0, options))
    return plans, samples


@pytest.mark.parametrize("hundredths", range(36, 800, 3))
def test_every_rate_is_filled_to_within_half_a_thousandth(hundredths: int) -> None:
    plans, samples = planned()
    n_weights = sum(plan.source.n_weights for plan in plans.values())
    target = hundredths * n_weights // 800
    budget = Budget(target, 0, n_weights, 5 * 10**9)
    choices = meet_budget(plans, samples, budget)
    found = total_bytes(lay_out(plans, choices, budget.max_shard_bytes))
    assert 0.9995 * target <= found <= target
