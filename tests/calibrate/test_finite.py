"""NaN on the way through a model is found in the layer where it begins."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from miracle_hub.calibrate.finite import first_not_finite
from miracle_hub.calibrate.sensitivity import measure
from miracle_hub.errors import CalibrationError


class Deep(nn.Module):
    """Layers one after the other, of which one squares as often as it takes to overflow."""

    def __init__(self, at: int, says: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))
        for i, layer in enumerate(self.layers):
            assert isinstance(layer, nn.Linear)
            nn.init.constant_(layer.weight, 1e30 if i in (at - 1, at) else 1.0)
        self.says = says

    def forward(self, x: Tensor) -> Any:
        for layer in self.layers:
            x = layer(x)
        return {"tensor": x, "tuple": (x, x), "dict": {"logits": x}}[self.says]


@pytest.mark.parametrize("says", ["tensor", "tuple", "dict"])
@pytest.mark.parametrize("at", [1, 2, 3])
def test_the_first_layer_without_finite_numbers_is_named(at: int, says: str) -> None:
    assert first_not_finite(Deep(at, says), {"x": torch.ones(2, 4)}) == f"layers.{at} (Linear)"


def test_a_model_with_finite_numbers_has_no_such_layer_and_no_hook_left() -> None:
    model = Deep(-5, "tensor")
    assert first_not_finite(model, {"x": torch.ones(2, 4)}) is None
    assert not any(module._forward_hooks for module in model.modules())


def test_calibration_names_the_layer() -> None:
    model = Deep(2, "tensor")
    with pytest.raises(
        CalibrationError, match=r"^Deep: .* found NaN or infinity, first in layers\.2 \(Linear\)"
    ):
        measure(model, [{"x": torch.ones(2, 4)}], {"layers.0.weight"}, seed=0)
