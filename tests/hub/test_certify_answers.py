"""A certificate is of one answer per row: whatever gives a row another answer another time is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

import miracle_hub
from miracle_hub import Certificate
from miracle_hub.errors import DataError, OptionError, SourceError

GENERATOR = torch.Generator().manual_seed(0)
ROWS, LABELS = torch.randn(60, 6, generator=GENERATOR), torch.randint(3, (60,), generator=GENERATOR)
BATCHES = [(ROWS[:40], LABELS[:40]), (ROWS[40:59], LABELS[40:59]), (ROWS[59:], LABELS[59:])]


class Net(nn.Module):
    """Three classes of rows of six numbers; `mend` is what is done to hidden values."""

    def __init__(self, mend: Any = None, layer: nn.Module | None = None) -> None:
        super().__init__()
        self.first, self.head, self.layer = nn.Linear(6, 8), nn.Linear(8, 3), layer
        self.mend, self.calls = mend, 0

    def forward(self, rows: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(rows))
        hidden = hidden if self.layer is None else self.layer(hidden)
        self.calls += 1
        return self.head(hidden if self.mend is None else self.mend(self, hidden))


class Stubborn(nn.BatchNorm1d):
    """Stays in training mode."""

    def train(self, mode: bool = True) -> "Stubborn":
        return super().train(True)


def certified(model: nn.Module, folder: Path, batches: Any = BATCHES, **options: Any) -> Certificate:
    save_file(model.state_dict(), folder / "n.safetensors")
    return miracle_hub.certify_network(
        model, folder / "n.safetensors", batches, **{"fitted": False, **options}
    )


@pytest.mark.parametrize(
    ("mend", "what"),
    [
        (lambda net, h: F.dropout(h, 0.1), "whenever the same rows are asked"),
        (lambda net, h: h + 0.1 * torch.randn_like(h), "whenever the same rows are asked"),
        (lambda net, h: h + net.calls % 2, "whenever the same rows are asked"),
        (lambda net, h: h + 0.01 * net.calls, "whenever the same rows are asked"),
        (lambda net, h: h - h.mean(0), "do not depend on the other rows"),
        (lambda net, h: h / h.std(), "do not depend on the other rows"),
        (lambda net, h: F.batch_norm(h, None, None, training=True), "do not depend on the other rows"),
        (lambda net, h: h + torch.arange(len(h))[:, None], "do not depend on the other rows"),
        (lambda net, h: h + len(h), "do not depend on the other rows"),
        (lambda net, h: h.roll(1, 0), "do not depend on the other rows"),
    ],
    ids=["dropout", "noise", "turns", "counts", "mean", "std", "batch norm", "place", "size", "neighbor"],
)
def test_answers_of_more_than_a_row_are_refused(mend: Any, what: str, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=what):
        certified(Net(mend), tmp_path)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.BatchNorm1d(8, track_running_stats=False), "layer .BatchNorm1d.: expected running statistics"),
        (Stubborn(8), "layer .Stubborn.: expected evaluation mode after eval"),
    ],
)
def test_layers_that_normalize_by_the_batch_are_named(layer: nn.Module, message: str, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=message):
        certified(Net(layer=layer), tmp_path)


@pytest.mark.parametrize("layer", [nn.BatchNorm1d(8), nn.Dropout(0.5), nn.LayerNorm(8)])
def test_layers_that_are_functions_of_a_row_in_evaluation_mode_are_certified(
    layer: nn.Module, tmp_path: Path
) -> None:
    found = certified(model := Net(layer=layer).train(), tmp_path)
    wrong = int((model.eval()(ROWS).argmax(1) != LABELS).sum())
    assert (found.errors, found.examples, found.classes, found.repeated) == (wrong, 60, 3, 0)


def test_the_order_of_rows_and_batches_changes_nothing(tmp_path: Path) -> None:
    model, order = Net(), torch.randperm(60, generator=torch.Generator().manual_seed(1))
    found = certified(model, tmp_path)
    for size in (1, 7, 60):
        again = zip(ROWS[order].split(size), LABELS[order].split(size), strict=True)
        assert certified(model, tmp_path, again) == found


def test_copies_of_rows_are_counted_and_tighten_nothing(tmp_path: Path) -> None:
    model = Net()
    once = certified(model, tmp_path)
    found = certified(model, tmp_path, BATCHES * 3)
    assert (found.examples, found.repeated) == (180, 120)
    assert found.errors == 3 * once.errors and found.repeated_errors == 2 * once.errors
    assert found.bound == once.bound
    assert (
        "120 of the examples repeat earlier ones, input and label; copies are no evidence, so this is the "
        f"larger one of the bounds of all of them and of the 60 distinct ones, {once.errors} of them wrong. "
    ) in found.statement
    assert f"kl({once.errors}/60 ‖ error)" in found.statement


def test_the_same_row_with_another_label_is_no_copy(tmp_path: Path) -> None:
    given = [(ROWS, LABELS), (ROWS, (LABELS + 1) % 3)]
    assert certified(Net(), tmp_path, given).repeated == 0


def test_copies_of_rows_that_are_right_do_not_hide_those_that_are_wrong() -> None:
    bare = Certificate(10, 100, 2, 8, False)
    padded = Certificate(10, 1100, 2, 8, False, repeated=1000, repeated_errors=0)
    assert padded.bound == bare.bound
    worse = Certificate(510, 600, 2, 8, False, repeated=500, repeated_errors=500)
    assert worse.bound > bare.bound  # all of them: the larger one


@pytest.mark.parametrize("bad", [float("inf"), float("nan"), -1, True, 3.0, "3", None, 10**3 + 0.5])
@pytest.mark.parametrize("name", ["errors", "examples", "classes", "n_bytes", "repeated", "repeated_errors"])
def test_counts_that_are_none_are_refused(name: str, bad: Any) -> None:
    counts: dict[str, Any] = dict(errors=1, examples=10, classes=2, n_bytes=8, fitted=True)
    with pytest.raises((OptionError, DataError), match="certificate: "):
        Certificate(**{**counts, name: bad})


def test_counts_of_numpy_are_counts() -> None:
    counts: Any = [np.int64(count) for count in (1, 10, 2, 8)]
    assert Certificate(*counts, fitted=True).bound == Certificate(1, 10, 2, 8, True).bound


@pytest.mark.parametrize("fitted", ["no", 0, 1, None, "--fitted"])
def test_fitted_is_true_or_false(fitted: Any, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="fitted: expected True .--fitted: .* or False .--held-out: "):
        Certificate(1, 10, 2, 8, fitted)
    with pytest.raises(OptionError, match="fitted: expected True"):
        certified(Net(), tmp_path, fitted=fitted)


@pytest.mark.parametrize("delta", [True, "0.05", None, 1.0, 0, float("nan"), float("inf")])
def test_a_delta_that_is_no_chance_is_refused_before_anything_is_read(delta: Any, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="delta: expected a probability"):
        certified(Net(), tmp_path, None, delta=delta)


@pytest.mark.parametrize("labels", [LABELS + 1, LABELS - 1, LABELS.float(), LABELS + 0j])
def test_labels_that_are_no_class_are_refused(labels: Tensor, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="whole numbers from 0 to 2"):
        certified(Net(), tmp_path, [(ROWS, labels)])


@pytest.mark.parametrize("batches", [[], [(ROWS[:0], LABELS[:0])], iter(())])
def test_no_rows_are_refused(batches: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="at least one example, found none"):
        certified(Net(), tmp_path, batches)


def test_inputs_of_several_tensors_are_taken_apart(tmp_path: Path) -> None:
    class Two(Net):
        def forward(self, rows: Any) -> Tensor:
            return super().forward(rows["a"] + rows["b"][0])

    given = [({"a": ROWS, "b": (ROWS,)}, LABELS)]
    assert certified(Two(), tmp_path, given).examples == 60
    with pytest.raises(DataError, match="expected inputs that are tensors, found str"):
        certified(Two(), tmp_path, [({"a": ROWS, "b": (ROWS,), "c": "x"}, LABELS)])
