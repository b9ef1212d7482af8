"""Calibrated differences to a base: what is fitted is what is loaded, and nearer to the fine-tune."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertForSequenceClassification

import miracle_hub
from miracle_hub.calibrate import recipe
from miracle_hub.calibrate.factors import Factors
from miracle_hub.codec import payloads
from miracle_hub.codec.report import Report
from miracle_hub.codec.stored import stored_in

WIDER = {"hidden_size": 64, "intermediate_size": 128, "num_labels": 5}
QUICK: dict[str, Any] = {"window_bits": 8, "progress": False, "effort": 1}


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tenth of the steps of tiny models."""
    short = (replace(each, most_steps=40, looks=2) for each in recipe.EFFORTS)
    monkeypatch.setattr(recipe, "EFFORTS", tuple(short))


@pytest.fixture
def folders(saved: Callable[..., tuple[Any, Path]], tmp_path: Path) -> tuple[Path, Path]:
    """A base, and a fine-tune that moved in a few directions."""
    model, base = saved(BertForSequenceClassification, **WIDER)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 2 and "layer" in name:
                low = torch.randn(len(p), 2, generator=generator) @ torch.randn(
                    2, p.shape[1], generator=generator
                )
                p += 0.3 * p.std() * low
    tuned = base.with_name("tuned")
    model.save_pretrained(tuned)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tuned / name).write_bytes((base / name).read_bytes())
    return base, tuned


def difference(folders: tuple[Path, Path], out: Path, **options: Any) -> Report:
    base, tuned = folders
    return miracle_hub.compress(tuned, out, base=base, **{**QUICK, **options})


def answers(folder: Path, base: Path | None = None) -> Tensor:
    also: dict[str, Any] = (
        {} if base is None else {"quantization_config": miracle_hub.MiracleConfig(base=base)}
    )
    model = BertForSequenceClassification.from_pretrained(folder, **also)
    ids = torch.randint(5, 20, (64, 8), generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        return model(input_ids=ids).logits.log_softmax(-1)


def divergence(p: Tensor, q: Tensor) -> float:
    return float((p.exp() * (p - q)).sum(1).mean())


@pytest.mark.parametrize("size", ["6kB", "12kB"])
def test_a_calibrated_difference_meets_its_size_and_is_no_farther_than_one_that_is_not(
    folders: tuple[Path, Path], text_file: Path, tmp_path: Path, size: str
) -> None:
    base, tuned = folders
    wanted, found = answers(tuned), {}
    for calibrate in (None, str(text_file)):
        out = tmp_path / f"{size} {calibrate is None}"
        report = difference(folders, out, size=size, calibrate=calibrate)
        assert report.compressed_bytes <= int(size[:-2]) * 1000
        assert not miracle_hub.verify(out, base=base).defects
        found[calibrate is None] = divergence(wanted, answers(out, base))
    assert found[False] < divergence(wanted, answers(base))
    assert found[False] <= 1.05 * found[True]


def test_what_is_told_of_a_calibrated_difference_is_of_what_is_loaded(
    folders: tuple[Path, Path], text_file: Path, tmp_path: Path
) -> None:
    report = difference(folders, tmp_path / "out", size="6kB", calibrate=str(text_file))
    assert report.calibration is not None
    codecs = {t.facts[0].codec for t in stored_in([tmp_path / "out" / "model.safetensors"]) if t.facts}
    assert "thin" in codecs
    assert any("factors" in line for line in report.calibration_lines)


def test_factors_have_the_gradient_of_their_product() -> None:
    left, right = torch.randn(2, 5, dtype=torch.float64), torch.randn(2, 7, dtype=torch.float64)
    one = object.__new__(Factors)
    one.left, one.right = nn.Parameter(left), nn.Parameter(right)
    gradient = torch.randn(5, 7, dtype=torch.float64)
    weights = nn.Parameter(left.T @ right)
    weights.grad = gradient.clone()
    one.take(weights)
    own = [nn.Parameter(left.clone()), nn.Parameter(right.clone())]
    (own[0].T @ own[1] * gradient).sum().backward()
    for found, expected in zip((one.left, one.right), own, strict=True):
        assert found.grad is not None and expected.grad is not None
        assert torch.allclose(found.grad, expected.grad)
    assert weights.grad is None


def test_payloads_of_fitted_factors_are_differences(
    folders: tuple[Path, Path], text_file: Path, tmp_path: Path
) -> None:
    difference(folders, tmp_path / "out", size="6kB", calibrate=str(text_file))
    for tensor in stored_in([tmp_path / "out" / "model.safetensors"]):
        if tensor.facts and tensor.facts[0].codec == "thin":
            payload = payloads.read(tensor.parts[0].load(), tensor.name)
            assert payload is not None and payload.facts.is_difference
            assert 0 < payload.facts.relative_error < 2
