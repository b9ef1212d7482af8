"""Sizes and rates: never exceeded, at least 99.5 % used, and refused with the least or most possible."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from miracle_hub.codec.budget import Budget, meet_budget
from miracle_hub.codec.inspection import inspect_folder
from miracle_hub.codec.payloads import Request
from miracle_hub.codec.plan import Plan, lay_out, plan_all
from miracle_hub.codec.rates import Curve
from miracle_hub.codec.report import Report
from miracle_hub.codec.repository import total_bytes
from miracle_hub.codec.source import weight_files
from miracle_hub.codec.survey import survey
from miracle_hub.coding.backend import choose
from miracle_hub.errors import BudgetError

Compress = Callable[..., Report]
SaveModel = Callable[..., Path]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def few_large() -> dict[str, Tensor]:
    return {"a.weight": randn(256, 384), "b.weight": 3 * randn(200, 300), "b.bias": randn(200)}


def many_small() -> dict[str, Tensor]:
    tensors = {}
    for i in range(25):
        tensors[f"encoder.layer.{i}.weight"] = (i + 1) * randn(40, 32, seed=i)
        tensors[f"encoder.layer.{i}.bias"] = randn(40, seed=i)
    return tensors


def odd() -> dict[str, Tensor]:
    shapes = [(40_000,), (10, 4096), (1000, 7), (31, 5, 3, 3), (2, 64, 48)]
    return {f"t{i}": randn(*shape, seed=i) for i, shape in enumerate(shapes)}


MODELS = {"few_large": few_large, "many_small": many_small, "odd": odd}


def weights_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("rate", [2.0, 3.37])
def test_a_rate_of_whole_files_is_met_and_never_exceeded(
    kind: str, rate: float, save_model: SaveModel, compress: Compress, tmp_path: Path
) -> None:
    tensors = MODELS[kind]()
    report = compress(save_model(tensors), tmp_path / "out", bits_per_weight=rate)
    found = 8 * weights_bytes(tmp_path / "out") / sum(tensor.numel() for tensor in tensors.values())
    assert 0.995 * rate <= found <= rate and found == report.bits_per_weight


@pytest.mark.parametrize(("size", "n_bytes"), [("20kB", 20_000), ("71.5 KiB", 73_216), (101_234, 101_234)])
def test_a_size_of_whole_files_is_met_and_never_exceeded(
    size: str | int, n_bytes: int, save_model: SaveModel, compress: Compress, tmp_path: Path
) -> None:
    report = compress(save_model(few_large()), tmp_path / "out", size=size)
    assert 0.995 * n_bytes <= weights_bytes(tmp_path / "out") <= n_bytes
    assert report.compressed_bytes == weights_bytes(tmp_path / "out")


class Measured(NamedTuple):
    """A model whose rate–error curves are known: planning it costs next to nothing."""

    plans: dict[str, Plan]
    curves: list[Curve]
    n_weights: int

    def size(self, n_bytes: int, max_shard_bytes: int) -> int:
        budget = Budget(n_bytes, 0, self.n_weights, max_shard_bytes)
        choices = meet_budget(self.plans, self.curves, budget)
        return total_bytes(lay_out(self.plans, choices, max_shard_bytes))


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory, save_anywhere: Any) -> dict[str, Measured]:
    models = {}
    for kind in MODELS:
        folder = save_anywhere(tmp_path_factory.mktemp("measured") / kind, MODELS[kind]())
        plans = plan_all(weight_files(folder), [], {})
        curves, _ = survey(plans, Request(8, 128, 0, len(plans), choose("cpu")))
        models[kind] = Measured(plans, curves, sum(plan.source.n_weights for plan in plans.values()))
    return models


@given(kind=st.sampled_from(list(MODELS)), share=st.floats(0, 1), shards=st.sampled_from([10**9, 20_000]))
@settings(deadline=None, max_examples=120, derandomize=True)
def test_any_size_between_the_least_and_the_most_is_met(
    measured: dict[str, Measured], kind: str, share: float, shards: int
) -> None:
    model = measured[kind]
    with pytest.raises(BudgetError) as raised:
        model.size(1, shards)
    low = number_after(str(raised.value), "least possible is ")
    with pytest.raises(BudgetError) as raised:
        model.size(10**9, shards)
    high = number_after(str(raised.value), "model can use is ")
    target = low + round(share * (high - low))
    assert 0.995 * target <= model.size(target, shards) <= target


def number_after(text: str, words: str) -> int:
    return int(text.split(words)[1].split(" bytes")[0].replace(",", ""))


def test_below_the_least_the_error_says_the_least_and_asking_for_it_works(
    model: Path, compress: Compress, tmp_path: Path
) -> None:
    with pytest.raises(BudgetError) as raised:
        compress(model, tmp_path / "out", size="600B")
    message = str(raised.value)
    least = number_after(message, "least possible is ")
    rate = float(message.split("(")[1].split(" bits per weight")[0])
    assert message == (
        f"size: 600 bytes were asked for, but the least possible is {least:,} bytes ({rate} bits per weight: "
        "every matrix at the lowest rate, vectors plain); ask for that or more"
    )
    assert compress(model, tmp_path / "a", size=least).compressed_bytes == least
    assert compress(model, tmp_path / "b", bits_per_weight=rate).compressed_bytes == least
    with pytest.raises(BudgetError):
        compress(model, tmp_path / "c", size=least - 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "model"]


def test_above_the_most_the_error_says_the_most_and_asking_for_it_works(
    model: Path, compress: Compress, tmp_path: Path
) -> None:
    with pytest.raises(BudgetError) as raised:
        compress(model, tmp_path / "out", bits_per_weight=12)
    message = str(raised.value)
    most = number_after(message, "bits per weight (")
    rate = float(message.split("can use is ")[1].split(" bits per weight")[0])
    assert message == (
        f"bits_per_weight: 12 were asked for (18,672 bytes), but the most this model can use is {rate} bits "
        f"per weight ({most:,} bytes: every matrix at the highest rate); ask for that or less"
    )
    assert compress(model, tmp_path / "a", size=most).compressed_bytes == most
    assert 0.995 * most <= compress(model, tmp_path / "b", bits_per_weight=rate).compressed_bytes <= most
    with pytest.raises(BudgetError):
        compress(model, tmp_path / "c", size=most + 1)


@pytest.mark.parametrize("rate", [0, -1, 64, math.nan, math.inf])
def test_a_rate_that_is_none_is_named(rate: float, model: Path, compress: Compress, tmp_path: Path) -> None:
    with pytest.raises(BudgetError) as raised:
        compress(model, tmp_path / "out", bits_per_weight=rate)
    assert str(raised.value) == (
        f"bits_per_weight: expected a number above 0 and below 64, found {rate}; 2 to 4 suit most models"
    )


def test_more_bits_never_give_a_larger_error(
    save_model: SaveModel, compress: Compress, tmp_path: Path
) -> None:
    source = save_model(few_large())
    errors = []
    for rate in (1, 2, 4):
        compress(source, tmp_path / f"out{rate}", bits_per_weight=rate)
        errors.append([tensor.relative_error for tensor in inspect_folder(tmp_path / f"out{rate}").tensors])
    for lower, higher in zip(errors, errors[1:], strict=False):
        assert all(a >= b for a, b in zip(lower, higher, strict=True))
    assert errors[0][0] < 0.45 and errors[2][0] < 0.02
