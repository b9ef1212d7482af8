"""The cards of model_cards/ are those of the results, and are made again from results alone."""

import importlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard

import miracle_hub

ROOT = Path(__file__).parents[1]
RESULTS, CARDS = ROOT / "benchmarks" / "results", ROOT / "model_cards"


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[ModuleType, Any]]:
    """The generator and the benchmark that it reads, as scripts see each other."""
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    before = set(sys.modules)
    yield importlib.import_module("cards"), importlib.import_module("lenet")
    for name in set(sys.modules) - before:
        if name in ("cards", "lenet", "record"):
            del sys.modules[name]


def test_the_minilm_card_has_the_figures_of_its_benchmark() -> None:
    card = ModelCard.load(CARDS / "all-MiniLM-L6-v2-2-bits.md")
    results = json.loads((RESULTS / "minilm.json").read_text())["results"]
    (row,) = [row for row in results["compressed"] if row["asked"] == 2.0]
    dense = results["dense"]["spearman"]["test"]
    for text in (
        f"{row['bytes']:,} bytes of weights",
        f"{dense} before, {row['spearman']['test']} after (repeated by `python benchmarks/minilm.py`)",
        f"`{row['digest']}`",
    ):
        assert text in card.text, text
    data = card.data.to_dict()
    assert data["base_model"] == "sentence-transformers/all-MiniLM-L6-v2"
    assert data["base_model_relation"] == "quantized" and data["library_name"] == "transformers"


def test_the_lenet_card_has_the_figures_of_its_run() -> None:
    card, path = ModelCard.load(CARDS / "lenet-5-mnist.md"), RESULTS / "lenet" / "mean-kl-12420-0.json"
    if not path.exists():
        pytest.skip("results/lenet/mean-kl-12420-0.json is not there: run benchmarks/lenet.py")
    results = json.loads(path.read_text())["results"]
    assert f"{results['file_bytes']:,} bytes of weights" in card.text
    assert f"MNIST test error, %: {round(results['test_error'], 4)} (repeated by" in card.text
    assert "Occam bound from the 60,000 examples" in card.text


def test_every_plot_that_a_card_shows_is_there() -> None:
    for card in CARDS.glob("*.md"):
        if not card.is_symlink():
            shown = re.findall(r"!\[.*\]\((.+)\)", card.read_text())
            assert shown and all((CARDS / path).is_file() for path in shown)


def test_a_lenet_card_is_made_from_a_run_and_its_file(
    modules: tuple[ModuleType, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A run of nothing but coding, on noise."""
    cards, lenet = modules
    torch.manual_seed(0)
    network: Any = lenet.LeNet5()
    sharing = {"conv2.weight": 100.0, "fc1.weight": 2000.0, "fc2.weight": 50.0}
    miracle_hub.make_variational(
        network, message_bits=2000, streams="network", window_bits=8, sharing=sharing
    )
    options = miracle_hub.CodingOptions(groups=2, refit_steps=0)
    journal = miracle_hub.code_model(network, options=options, progress=False)
    (tmp_path / "lenet").mkdir()
    n_bytes = miracle_hub.save(network, tmp_path / "lenet" / "run.safetensors")
    machine = {"cpu": "an abacus", "cores": 1, "memory_gb": 0.5, "python": "3", "versions": {"torch": "2"}}
    results: dict[str, Any] = {
        "test_error": 91.5,
        "validation_error": 90.25,
        "validation_error_before_coding": 89.75,
        "coding": [vars(row) for row in journal.rows],
        "options": {"bits": 2000, "seed": 3},
    }
    (tmp_path / "lenet" / "run.json").write_text(json.dumps({"machine": machine, "results": results}))
    images = torch.randint(256, (100, 1, 28, 28), dtype=torch.uint8)
    monkeypatch.setattr(lenet, "mnist", lambda split: (images, torch.arange(100) % 10))
    monkeypatch.setattr(cards, "RESULTS", tmp_path)
    monkeypatch.setattr(cards, "CARDS", tmp_path)
    text = cards.lenet("run").read_text()
    for line in (
        f"| bytes | {n_bytes:,} |",
        "| weights | 431,080 |",
        "| hardware | 1 cores of an abacus, 0.5 GB |",
        "| written by | torch 2, Python 3 |",
        "- MNIST test error, %: 91.5 (repeated by `python benchmarks/lenet.py --bits 2000 --seed 3`)",
        ": 89.75 before, 90.25 after (repeated by",
        "Occam bound from the 100 examples",
        "![kl per group](tmp",
    ):
        assert line.replace("(tmp", "(lenet-5-mnist/kl_per_group.png)") in text, line
    assert (tmp_path / "lenet-5-mnist" / "kl_per_group.png").is_file()
