"""The penalty on what a fine-tuning changes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from miracle_hub import UpdatePenalty
from miracle_hub.errors import OptionError
from miracle_hub.finetune.penalty import KINDS


class Line(nn.Module):
    """A model whose loss pulls every weight, half of them hardly."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(64))
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        pull = torch.linspace(0, 1, 64)
        return {"loss": (0.5 * (self.weight - 1 - pull).square()).sum() + 0 * x.sum()}


def trained(model: nn.Module, folder: Path, *penalties: UpdatePenalty, **options: Any) -> torch.Tensor:
    arguments = TrainingArguments(
        str(folder), max_steps=60, learning_rate=0.05, per_device_train_batch_size=2, report_to=[],
        use_cpu=True, save_strategy="no", disable_tqdm=True, dataloader_pin_memory=False, optim="sgd",
        lr_scheduler_type="constant", max_grad_norm=100.0, **options,
    )  # fmt: skip
    rows: Any = [{"x": torch.zeros(1)} for _ in range(8)]
    Trainer(model=model, args=arguments, train_dataset=rows, callbacks=list(penalties)).train()
    return model.get_parameter("weight").detach() - 1


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_is_that_of_the_penalty(kind: str) -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 3).double()
    penalty = UpdatePenalty(model, kind, 0.5)
    assert penalty.penalty() == 0
    starts = [p.detach().clone() for p in model.parameters()]
    for p in model.parameters():
        p.data += torch.randn_like(p)
        p.grad = torch.zeros_like(p)
    penalty.on_pre_optimizer_step(None, None, None)
    for p, start in zip(model.parameters(), starts, strict=True):
        change = (p.detach() - start).requires_grad_()
        cost = {
            "ratio": change.abs().sum() / change.norm(),
            "l1": change.abs().sum(),
            "l2": change.square().sum(),
        }[kind]
        (expected,) = torch.autograd.grad(0.5 * cost, change)
        torch.testing.assert_close(p.grad, expected)


def test_few_weights_move_under_the_ratio_and_small_changes_vanish_under_l1(tmp_path: Path) -> None:
    plain = trained(Line(), tmp_path)
    model = Line()
    l1 = trained(model, tmp_path, UpdatePenalty(model, "l1", 0.3))
    assert int((plain.abs() > 0.02).sum()) >= 60
    assert int((l1.abs() > 0.02).sum()) <= 48 and float(l1[-1]) == pytest.approx(0.7, abs=0.05)
    model = Line()
    ratio = trained(model, tmp_path, UpdatePenalty(model, "ratio", 0.5))
    assert int((ratio.abs() > 0.02).sum()) <= 58 and float(ratio[-1]) > float(plain[-1])


def test_a_penalty_without_effect_would_be_refused(tmp_path: Path) -> None:
    with pytest.raises(
        OptionError, match="expected a kind of ratio, l1, l2 and a weight above 0, found 'l3'"
    ):
        UpdatePenalty(Line(), "l3")
    with pytest.raises(OptionError, match="found 'l1' and 0; correct it"):
        UpdatePenalty(Line(), "l1", 0)

    class Arguments:
        fp16, max_grad_norm = True, 0.0

    with pytest.raises(OptionError, match="expected gradients of the loss, found those of a scaled one"):
        UpdatePenalty(Line()).on_train_begin(Arguments(), None, None)
